"""The pictures of README and notebooks, drawn from `results/` and from a run; `make images` calls this.

python -m tools.make_images --run runs/sample    # without --run, only what is drawn from results/
"""

import argparse
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from benchmarks.bench import compared
from benchmarks.mistakes import prices
from benchmarks.results import latency_figure
from benchmarks.speedrun import TEXTBOOK
from helpers import plots
from helpers.chat import Chatbot
from helpers.run import ROOT, Run
from helpers.settings import UserError, command_line
from tools.mistake_tables import RIDDLE
from tools.readme_tables import measured, result, times

IMAGES = ROOT / "images"
QUESTION = "Anna has a red hat and a blue box. What colour is the box?"


def architecture(bot: Chatbot) -> plt.Figure:
    """Encoder, attention and decoder at the moment when the bot says where Ruth is; the weights are the bot's own."""
    query, reply, weights = bot.attention(bot.reply("Ruth met Leo at the bank. Where is Ruth?", "greedy"))
    if "bank" not in reply:
        raise UserError(f"This bot says {' '.join(reply)!r}, not where Ruth is. Draw from the run of 'make run-all'.")
    step = reply.index("bank")
    figure, axes = plt.subplots(figsize=(13, 5.2), layout="constrained")
    axes.axis("off")

    def box(x: float, y: float, text: str, colour: str, width: float) -> None:
        patch = plt.Rectangle((x - width / 2, y - 0.3), width, 0.6, facecolor=colour, edgecolor="black", alpha=0.85)
        axes.add_patch(patch)
        axes.text(x, y, text, ha="center", va="center", fontsize=12)

    def arrow(a: tuple[float, float], b: tuple[float, float], **style) -> None:
        arrowprops = {"arrowstyle": "->", "color": "black", "shrinkA": 0, "shrinkB": 0} | style
        axes.annotate("", xy=b, xytext=a, arrowprops=arrowprops)

    def below(x: float, word: str) -> None:
        axes.text(x, -1.05, word, ha="center", style="italic", fontsize=12)
        arrow((x, -0.75), (x, -0.3))

    blue, orange, green, grey = "#c5d7ee", "#fbd7a8", "#cfe8bd", "#e4e4e0"
    last, context = len(query) - 1, len(query) / 2 + 1.5
    for i, (word, weight) in enumerate(zip(query, weights[step].tolist(), strict=True)):
        below(i, word)
        box(i, 0, f"$\\bar h_{{{i + 1}}}$", blue, 0.7)
        arrow((i, 0.3), (context, 2.5), color=plots.BLUE, linewidth=0.6 + 5 * weight, alpha=0.8)
        axes.text(i - 0.12, 0.5, f"{weight:.2f}", color=plots.BLUE, fontsize=10, ha="right")
        if i:
            arrow((i - 0.65, 0.1), (i - 0.35, 0.1))
            arrow((i - 0.35, -0.1), (i - 0.65, -0.1))
    bridge = last + 1.3
    box(bridge, 0, "bridge", grey, 0.9)
    arrow((last + 0.35, 0), (bridge - 0.45, 0))
    axes.plot([0, 0, bridge], [-1.25, -1.6, -1.6], color="black", linewidth=1)
    arrow((bridge, -1.6), (bridge, -0.3))
    axes.text(bridge - 0.15, -1.5, "the last state forwards (at ?) and backwards (at the first word)", fontsize=10,
              ha="right", color="#555753")  # fmt: skip
    for t, word in enumerate(["<sos>", *reply[:step]]):
        x = bridge + 1.3 + 1.1 * t
        below(x, word)
        box(x, 0, f"$h_{t + 1}$", orange, 0.7)
        arrow((x - 0.75 if t else bridge + 0.45, 0), (x - 0.35, 0))
    now, t = x - 0.8, step + 1
    box(context, 2.8, f"context $c_{t} = \\sum_s a_{t}(s)\\, \\bar h_s$", green, 3.2)
    box(now, 2.8, f"$\\tilde h_{t} = \\tanh(W_c [c_{t}; h_{t}] + b_c)$", green, 3.2)
    arrow((x, 0.3), (x, 2.5))
    arrow((context + 1.6, 2.8), (now - 1.6, 2.8))
    arrow((x - 0.35, 0.3), (context + 0.9, 2.5), linestyle="--", color=plots.GREY)
    axes.text(x - 2.4, 1.75, f"score$(h_{t}, \\bar h_s)$", color="#555753", fontsize=11, ha="center")
    box(now, 3.9, f"softmax$(W_s \\tilde h_{t} + b_s)$", grey, 3.2)
    arrow((now, 3.1), (now, 3.6))
    axes.text(now, 4.75, reply[step], ha="center", style="italic", fontsize=12)
    arrow((now, 4.2), (now, 4.65))
    axes.text(last / 2, -2.0, "query: bidirectional GRU, $\\bar h$ the sum of both directions", ha="center", va="top",
              fontsize=11, color="#555753")  # fmt: skip
    axes.text(x - 2.2, -2.0, "response: GRU, one word after another", ha="center", va="top", fontsize=11,
              color="#555753")  # fmt: skip
    axes.set(xlim=(-0.9, x + 1.2), ylim=(-2.4, 5.1))
    return figure


def ratios(tables: dict[str, pd.DataFrame], xlabel: str) -> plt.Figure:
    """A panel a machine: bars of its table's `ratio`, whiskers from `low` to `high`, dashed where both are equal."""
    heights = [0.7 + 0.25 * len(table) for table in tables.values()]
    figure, panels = plt.subplots(len(tables), 1, figsize=(7, sum(heights)), height_ratios=heights, squeeze=False)
    for axes, (name, table) in zip(panels[:, 0], tables.items(), strict=True):
        whiskers = [table["ratio"] - table["low"], table["high"] - table["ratio"]]
        drawn = axes.barh(
            table.index, table["ratio"], xerr=np.clip(whiskers, 0, None), color=plots.BLUE, ecolor=plots.GREY, capsize=3
        )
        axes.bar_label(drawn, [times(ratio) for ratio in table["ratio"]], padding=3)
        axes.axvline(1, color=plots.RED, linestyle="--")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.set_title(name)
    panels[-1, 0].set_xlabel(xlabel)
    return figure


def before_and_after(machines: dict[str, dict]) -> plt.Figure:
    """A panel a machine: the milliseconds of each part of a training step, stepwise and as a whole sequence."""
    figure, panels = plt.subplots(1, len(machines), figsize=(1.5 + 4 * len(machines), 4), squeeze=False)
    for axes, (name, found) in zip(panels[0], machines.items(), strict=True):
        parts = pd.DataFrame({kind: pd.DataFrame(found[kind]).T["ms"] for kind in ("before", "after")})
        parts.astype(float).loc[list(found["after"])].plot.barh(ax=axes, width=0.8, ylabel="")
        kernels = ", of kernels alone" if found["machine"]["device"] == "cuda" else ""
        axes.set(title=name, xlabel=f"milliseconds a step{kernels}")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return figure


def scale(machines: dict[str, list[dict]]) -> plt.Figure:
    """Seconds and peak memory of preparing generated corpora by their lines, on logarithmic axes, a curve a machine."""
    figure, both = plt.subplots(1, 2, figsize=(8, 3.2))
    for axes, key, label in zip(both, ("seconds", "MB"), ("seconds", "peak memory of the process, MB"), strict=True):
        for number, (name, points) in enumerate(machines.items()):
            lines, values = [point["lines"] for point in points], [point[key] for point in points]
            (drawn,) = axes.loglog(lines, values, "o-", label=name)
            for n, value in zip(lines, values, strict=True):
                text, place = f"{value:,.0f}" if value >= 10 else f"{value:.2g}", (0, 6 if number else -14)
                colour = drawn.get_color()
                axes.annotate(text, (n, value), xytext=place, textcoords="offset points", ha="center", color=colour)
        proportional = [values[-1] * n / lines[-1] for n in lines]
        axes.loglog(lines, proportional, color=plots.GREY, linestyle="--", label="proportional")
        axes.set(xlabel="lines of the corpus", ylabel=label)
        axes.margins(0.15)
    both[1].legend(loc="lower right")
    return figure


def compare(models: dict[str, dict]) -> plt.Figure:
    """The loss of several models side by side, each from its `training curve` and `validation curve`."""
    figure, panels = plt.subplots(1, len(models), figsize=(4.5 * len(models), 3.4), sharey=True, squeeze=False)
    for axes, (name, model) in zip(panels[0], models.items(), strict=True):
        updates, values = zip(*model["training curve"], strict=True)
        axes.plot(updates, pd.Series(values).rolling(5, min_periods=1).mean(), label="training, with dropout")
        updates, values = zip(*model["validation curve"], strict=True)
        axes.plot(updates, values, "o-", markersize=3, label="validation")
        best = int(np.argmin(values))
        label = f"best, update {updates[best]:,}"
        axes.plot(updates[best], values[best], "*", color=plots.RED, markersize=12, label=label)
        axes.set(xlabel="update", title=name)
        axes.legend()
    panels[0][0].set_ylabel("nats per token, each on its own split")
    return figure


def speedrun(machines: dict[str, dict]) -> plt.Figure:
    """A panel a machine: nats per response against seconds since the start, a curve a recipe, the first seed's; the
    dashed line is the textbook's best."""
    figure, panels = plt.subplots(len(machines), 1, figsize=(8, 4.2 * len(machines)), squeeze=False)
    for axes, (name, found) in zip(panels[:, 0], machines.items(), strict=True):
        order = [TEXTBOOK, *found["recipes"]]
        first = [run for run in found["runs"] if run["seed"] == 1]
        for run in sorted(first, key=lambda run: order.index(run["recipe"])):
            after, _, nats = zip(*run["curve"], strict=True)
            textbook = run["recipe"] == TEXTBOOK
            axes.plot(after, nats, "o-", markersize=3, color=plots.RED if textbook else None, label=run["recipe"])
            if textbook:
                axes.axhline(min(nats), color=plots.RED, linestyle="--", linewidth=1)
        axes.set(xlabel="seconds since the start of the process", ylabel="nats per response", title=name)
        axes.set_ylim(top=32)
        axes.legend(fontsize=8)
    return figure


def mistakes(machines: dict[str, dict]) -> plt.Figure:
    """A panel per machine and task: what each mistake adds to the nats per token, with its spread. Filled: the seeds
    tell it from 0; hollow: they do not. The axis is linear near 0 and logarithmic further out."""
    tasks = list(next(iter(machines.values()))["tasks"])
    tables = {name: prices(found).dropna(subset="nats") for name, found in machines.items()}
    order = list(dict.fromkeys(mistake for table in tables.values() for mistake in table["mistake"]))
    size = (3.4 + 2 * len(tasks), 1.2 + 0.42 * len(order) * len(machines))
    figure, panels = plt.subplots(len(machines), len(tasks), figsize=size, sharey=True, squeeze=False)
    for (name, table), line in zip(tables.items(), panels, strict=True):
        for axes, task in zip(line, tasks, strict=True):
            rows = table[table["task"] == task]
            places = [order.index(mistake) for mistake in rows["mistake"]]
            sure = rows["nats"].abs() > rows["nats ±"]
            axes.axvline(0, color="black", linewidth=0.8)
            axes.errorbar(rows["nats"], places, xerr=rows["nats ±"], fmt="none", color=plots.GREY)
            axes.scatter(rows["nats"], places, s=60, zorder=3, edgecolors=plots.BLUE, linewidths=1.5,
                         c=[plots.BLUE if one else "white" for one in sure])  # fmt: skip
            axes.set_xscale("symlog", linthresh=0.1)
            axes.set_xticks([-0.1, 0, 0.1, 1], ["−0.1", "0", "0.1", "1"], fontsize=12)
            axes.set_title(task if len(machines) == 1 else f"{name}: {task}", fontsize=14)
            axes.set_yticks(range(len(order)), [textwrap.fill(mistake, 30) for mistake in order], fontsize=12)
        line[0].invert_yaxis()
    figure.supxlabel("nats per token that the mistake adds (95% interval; hollow: not told from 0)", fontsize=13)
    return figure


def whose_curve(found: dict) -> plt.Figure:
    """The curves of the page's riddle: training and validation loss of four ways of the first seed, unnamed."""
    figure, panels = plt.subplots(1, len(RIDDLE), figsize=(3.1 * len(RIDDLE), 3.4))
    for letter, (task, way), axes in zip("ABCDEF", RIDDLE, panels, strict=False):
        (run,) = [one for one in found["runs"] if (one["task"], one["way"], one["seed"]) == (task, way, 1)]
        updates, validation, training, _ = zip(*run["curve"], strict=True)
        axes.plot(updates, training, color=plots.ORANGE, linestyle="--", label="training")
        axes.plot(updates, validation, "o-", color=plots.BLUE, markersize=3, label="validation")
        axes.set(xlabel="update", title=letter, yscale="log")
    panels[0].set_ylabel("loss")
    panels[0].legend()
    return figure


def from_results() -> dict[str, plt.Figure]:
    """The pictures of measured figures by their files' names, of all machines that there are files of."""
    sweep, benches = result("sweep-excerpt.json"), measured("bench")
    importance, interval = (
        pd.DataFrame(sweep[part]["all trials"]).set_index("parameter") for part in ("importance", "fANOVA interval")
    )
    classic = [
        row | {"model": machine} for machine, found in measured("latency").items() for row in found["rows"]
        if row["model"].startswith("classic") and row["batch"] in (1, 64)
    ]  # fmt: skip
    return {
        "compare": compare(result("compare-cornell_excerpt.json")["models"]),
        "sweep_importance": plots.grouped_bars(importance[["fANOVA", "PED-ANOVA", "forest"]], "importance", interval),
        "speedrun": speedrun(measured("speedrun")),
        "mistakes": mistakes(measured("mistakes")),
        "mistakes_riddle": whose_curve(next(iter(measured("mistakes").values()))),
        "profile": before_and_after(measured("profile")),
        "bench": ratios(
            {name: compared(found) for name, found in benches.items()}, "times as fast as the textbook way (dashed)"
        ),
        "scale": scale({name: found["scale"] for name, found in benches.items() if "scale" in found}),
        "latency_table": latency_figure(classic),
    }


def from_run(run: Run) -> dict[str, plt.Figure]:
    """The pictures of a trained model by their files' names."""
    bot = Chatbot.load(run, torch.device("cpu"))
    query, said, weights = bot.attention(bot.reply(QUESTION, "greedy"))
    return {
        "architecture": architecture(bot),
        "training_curves": plots.training_curves(run.read_metrics(), bot.settings.clip),
        "attention": plots.attention(query, said, weights.numpy()).figure,
    }


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="the run whose training and attention are drawn")
    options = parser.parse_args()
    plots.style()
    figures = from_results() | (from_run(Run(Path(options.run))) if options.run else {})
    for name, figure in figures.items():
        plots.save(figure, IMAGES / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
