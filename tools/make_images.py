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
from matplotlib import colormaps, patches
from matplotlib.animation import FuncAnimation, PillowWriter

from benchmarks.bench import compared
from benchmarks.mistakes import overview, prices
from benchmarks.results import latency_figure, roofline
from benchmarks.speedrun import QUICK, TEXTBOOK, best_of, curves_of
from benchmarks.sweep_report import losses_by_value, panels_by_value
from helpers import plots
from helpers.chat import Chatbot, Reply
from helpers.run import ROOT, Run
from helpers.settings import UserError, command_line
from helpers.text import SOS
from tools.mistake_tables import RIDDLE
from tools.tables import measured, renamed, result, times

IMAGES = ROOT / "images"
CPU = torch.device("cpu")
QUESTION = "Anna has a red hat and a blue box. What colour is the box?"
SHADES = {"query": "#cfe2f0", "reply": "#fbdfa8", "other": "#e8e8e5"}  # of a diagram's boxes; what is on them is black


class Diagram:
    """A figure without axes, on which boxes and arrows have their places by hand."""

    def __init__(self, width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.figure, self.axes = plt.subplots(figsize=(width, height))
        self.axes.set(xlim=x, ylim=y)
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, **style) -> None:
        self.axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 14} | style)

    def box(self, x: float, y: float, text: str, kind, width: float, height: float = 0.66, **style) -> None:
        """`kind` is one of SHADES, or a colour."""
        shape = patches.BoxStyle("round", pad=0, rounding_size=0.1)
        place = (x - width / 2, y - height / 2), width, height
        colour = SHADES.get(kind, kind) if isinstance(kind, str) else kind
        self.axes.add_patch(patches.FancyBboxPatch(*place, boxstyle=shape, facecolor=colour, edgecolor="#555753"))
        self.text(x, y, text, **style)

    def arrow(self, *points: tuple[float, float], **style) -> None:
        """A line through the points with its head at the last."""
        style = {"color": "#555753", "linewidth": 1.2} | style
        self.axes.plot(*zip(*points[:-1], strict=True), **style)
        head = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0} | style
        self.axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=head)


@torch.no_grad()
def chosen(bot: Chatbot, answer: Reply, step: int) -> tuple[list[float], dict[str, float]]:
    """The score of each word of the query when a word of the reply was chosen, and the three likeliest words there."""
    ids, lengths = bot.encode(answer.query)
    words = torch.tensor([[SOS, *bot.vocabulary.encode(answer.words)]])
    memory, state = bot.model.encode(ids, lengths)
    states, _ = bot.model.decoder.recur(bot.model.embedding(words), state.hidden)
    likely = bot.model(ids, lengths, words)[0, step].softmax(0).topk(3)
    best = dict(zip(bot.vocabulary.decode(likely.indices.tolist()), likely.values.tolist(), strict=True))
    return bot.model.decoder.attention.scores(states, memory.keys)[0, step].tolist(), best


def architecture(bot: Chatbot) -> plt.Figure:
    """Encoder, attention and decoder when the bot says which colour the box has; scores and weights are its own."""
    answer = bot.reply(QUESTION, "greedy")
    if "blue" not in answer.words:
        raise UserError(f"This bot says {answer.text!r}, not blue. Draw from the run of 'make run-all'.")
    step = answer.words.index("blue")
    query, said, weights = bot.attention(answer)
    scores, likely = chosen(bot, answer, step)
    t, last = step + 1, len(query) - 1
    draw = Diagram(12.5, 7.1, (-0.65, last + 5.9), (-1.25, 10.6))
    zero, floor, most = 4.2, 5.9, max(map(abs, scores))
    for s, (word, score, weight) in enumerate(zip(query, scores, weights[step].tolist(), strict=True)):
        draw.text(s, -0.5, word, style="italic", fontsize=13)
        draw.axes.add_patch(patches.Rectangle((s - 0.43, -0.1), 0.86, 1.9, facecolor="#f1f1ef"))
        draw.box(s, 0.4, f"$\\overrightarrow{{h}}_{{{s + 1}}}$", "query", 0.64, fontsize=13)
        draw.box(s, 1.3, f"$\\overleftarrow{{h}}_{{{s + 1}}}$", "query", 0.64, fontsize=13)
        draw.box(s, 2.6, f"$\\bar h_{{{s + 1}}}$", "query", 0.72)
        draw.arrow((s, 1.8), (s, 2.27))
        if s:
            draw.arrow((s - 0.68, 0.4), (s - 0.32, 0.4))
            draw.arrow((s - 0.32, 1.3), (s - 0.68, 1.3))
        draw.axes.bar(s, score / most, 0.6, zero, color=plots.GREY)
        draw.axes.bar(s, weight, 0.6, floor, color=plots.BLUE)
        draw.text(s, floor - 0.28, f"{weight:.2f}" if weight >= 0.005 else "0", fontsize=12)
    for height in (zero, floor):
        draw.axes.hlines(height, -0.45, last + 0.45, color="#555753", linewidth=0.8)
    bridge, first, end = last + 1.2, last + 2.4, last + 4.8
    labels = {
        2.6: "$\\bar h_s = \\overrightarrow{h}_s + \\overleftarrow{h}_s$", zero: f"score$(h_{t}, \\bar h_s)$",
        floor + 0.4: f"$a_{t}(s)$ = softmax of\nthe scores",
    }  # fmt: skip
    for height, label in labels.items():
        draw.text(last + 0.7, height, label, ha="left")
    # The bridge takes both final states: the forward one is the last word's, the backward one the first word's.
    draw.box(bridge, 0.85, "bridge", "other", 0.66, 1.9, rotation=90)
    draw.arrow((last + 0.32, 0.4), (bridge - 0.33, 0.4))
    draw.arrow((-0.32, 1.3), (-0.52, 1.3), (-0.52, -0.95), (bridge, -0.95), (bridge, -0.1))
    before = bridge + 0.33
    for number, word, x in ((1, "<sos>", first), (2, said[0], first + 1.1), (t, said[step - 1], end)):
        draw.text(x, -0.5, word, style="italic")
        draw.arrow((x, -0.2), (x, 0.52))
        draw.box(x, 0.85, f"$h_{number}$", "reply", 0.64)
        draw.arrow((before, 0.85), (x - 0.32, 0.85), linestyle=":" if number == t else "-")
        before = x + 0.32
    state = {"color": plots.ORANGE, "linewidth": 2}
    draw.arrow((end - 0.12, 1.18), (end - 0.12, zero), (last + 3.1, zero), **state)
    draw.arrow((end + 0.12, 1.18), (end + 0.12, 7.2), **state)
    looked, mixed = answer.query.index("blue"), end - 1.6
    draw.box(looked, 7.65, f"context $c_{t} = \\sum_s a_{t}(s)\\, \\bar h_s$", "query", 4.6, 0.9)
    draw.arrow((looked, floor + 1.05), (looked, 7.2), color=plots.BLUE, linewidth=4)
    draw.box(mixed, 7.65, f"$\\tilde h_{t} = \\tanh(W_c [c_{t}; h_{t}] + b_c)$", "reply", 4.8, 0.9)
    draw.arrow((looked + 2.3, 7.65), (mixed - 2.4, 7.65), color=plots.BLUE, linewidth=2)
    draw.arrow((mixed, 8.1), (mixed, 8.65))
    draw.text(mixed - 2.5, 9.5, f"softmax$(W_s \\tilde h_{t} + b_s)$", ha="right")
    for place, (word, probability) in enumerate(likely.items()):
        height = 10.1 - 0.6 * place
        draw.text(mixed - 0.6, height, word, ha="right", style="italic", weight="normal" if place else "bold")
        draw.axes.barh(height, 2 * probability, 0.4, left=mixed - 0.4, color=plots.ORANGE)
        draw.text(mixed - 0.3 + 2 * probability, height, f"{probability:.3f}", ha="left", fontsize=12)
    return draw.figure


def moving(bot: Chatbot) -> FuncAnimation:
    """What the bot looks at while it answers QUESTION: a picture for each word of its reply, and the whole reply."""
    query, said, weights = bot.attention(bot.reply(QUESTION, "greedy"))
    cut, weights = query.index(".") + 1, weights.tolist()
    weights[-1] = [0.0] * len(query)  # EOS is not shown
    speakers = {"you": 2.35, "": 1.6, "bot": 0.3}
    draw = Diagram(7, 2.7, (-0.85, 7.95), (-0.05, 2.7))
    places = []  # of all words, those of the query first
    for height, words in zip(speakers.values(), (query[:cut], query[cut:], said[:-1]), strict=True):
        x = 0.0
        for word in words:
            width = 0.2 + 0.175 * len(word)
            places.append((x + width / 2, height, width, word))
            x += width + 0.12

    def picture(step: int) -> None:
        for drawn in [*draw.axes.texts, *draw.axes.patches, *draw.axes.lines]:
            drawn.remove()
        for speaker, height in speakers.items():
            draw.text(-0.2, height, speaker, ha="right", weight="bold")
        now = len(query) + step
        looks = [weight if weight > 0.05 else 0.0 for weight in weights[step]] + [0.0] * len(said)
        for (x, y, width, word), weight, number in zip(places[: now + 1], looks, range(now + 1), strict=False):
            if number < len(query):
                colour = colormaps["Blues"](0.2 + 0.65 * weight) if weight else SHADES["other"]
            else:
                colour = plots.ORANGE if number == now else SHADES["reply"]
            if weight:
                style = {"color": plots.BLUE, "linewidth": 10 * weight, "alpha": 0.5, "zorder": 0}
                draw.axes.plot([x, places[now][0]], [y, places[now][1]], **style)
            ink = "white" if weight > 0.6 else "black"
            draw.box(x, y, word, colour, width, 0.5, family="monospace", fontsize=15, color=ink)

    return FuncAnimation(draw.figure, picture, frames=[*range(len(said)), len(said) - 1])


def ratios(tables: dict[str, pd.DataFrame], xlabel: str) -> plt.Figure:
    """A panel per machine: bars of its table's `ratio`, whiskers from `low` to `high`, dashed where both are equal."""
    heights = [0.7 + 0.25 * len(table) for table in tables.values()]
    figure, panels = plt.subplots(len(tables), 1, figsize=(7, sum(heights)), height_ratios=heights, squeeze=False)
    for axes, (name, table) in zip(panels[:, 0], tables.items(), strict=True):
        names = [name.removesuffix(": target tokens/s") for name in table.index]
        whiskers = [table["ratio"] - table["low"], table["high"] - table["ratio"]]
        drawn = axes.barh(
            names, table["ratio"], xerr=np.clip(whiskers, 0, None), color=plots.BLUE, ecolor=plots.GREY, capsize=3
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
    """A panel per machine: the milliseconds of each part of a training step, stepwise and as a whole sequence."""
    figure, panels = plt.subplots(1, len(machines), figsize=(1 + 3.4 * len(machines), 4), squeeze=False)
    for axes, (name, found) in zip(panels[0], machines.items(), strict=True):
        parts = pd.DataFrame({kind: pd.DataFrame(found[kind]).T["ms"] for kind in ("before", "after")})
        parts.astype(float).loc[list(found["after"])].plot.barh(ax=axes, width=0.8, ylabel="")
        kernels = ", kernels alone" if found["machine"]["device"] == "cuda" else ""
        axes.set(title=name, xlabel=f"milliseconds per step{kernels}")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return figure


def scale(machines: dict[str, list[dict]]) -> plt.Figure:
    """Seconds and peak memory of preparing generated corpora by their lines, on log axes, a curve per machine."""
    figure, both = plt.subplots(1, 2, figsize=(8, 3.2))
    for axes, key, label in zip(both, ("seconds", "MB"), ("seconds", "peak memory, MB"), strict=True):
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
    figure, panels = plt.subplots(1, len(models), figsize=(3.9 * len(models), 3.4), sharey=True, squeeze=False)
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
    panels[0][0].set_ylabel("nats per token")
    return figure


def speedrun(machines: dict[str, dict], steps: bool = False) -> plt.Figure:
    """A panel per machine: nats per response against seconds since the start. The classic tutorial's program and two
    profiles of ours, a curve per seed, or with `steps` the first seed's of each recipe on the way; the dashed line is
    the best of the classic tutorial's program."""
    figure, panels = plt.subplots(len(machines), 1, figsize=(7, 4.2 * len(machines)), squeeze=False)
    for axes, (name, found) in zip(panels[:, 0], machines.items(), strict=True):
        shown = [TEXTBOOK, *found["recipes"]] if steps else [TEXTBOOK, QUICK, list(found["recipes"])[-1]]
        in_turn = colormaps["viridis"](np.linspace(0.85, 0.1, len(shown) - 1))  # the later a change, the darker
        colours = in_turn if steps else [plots.BLUE, plots.ORANGE]
        for recipe, colour in zip(shown, [plots.RED, *colours], strict=True):
            curves = curves_of(found)[recipe]
            for number, curve in enumerate(curves[: 1 if steps else None]):
                after, _, nats = zip(*curve, strict=True)
                label = renamed(recipe) if steps else renamed(recipe).rpartition(": ")[2]
                style = {"marker": "o", "markersize": 3} if steps else {"alpha": 0.8}
                axes.plot(after, nats, color=colour, label="_" * (number > 0) + label, **style)
            if recipe == TEXTBOOK:
                axes.axhline(best_of(curves), color=plots.RED, linestyle="--", linewidth=1)
        axes.set(xlabel="seconds since the start of the process", ylabel="nats per response", title=name)
        axes.set_ylim(top=32 if steps else 26)
        axes.legend(fontsize=10)
    return figure


def mistakes(machines: dict[str, dict]) -> plt.Figure:
    """A panel per machine and task: what each mistake adds to the nats per token, with its spread. Filled: the seeds
    tell it from 0; hollow: they do not. The axis is linear near 0 and logarithmic further out."""
    tasks = list(next(iter(machines.values()))["tasks"])
    tables = {name: prices(found).dropna(subset="nats") for name, found in machines.items()}
    order = list(dict.fromkeys(mistake for found in machines.values() for mistake in overview(found, "nats").index))
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
        wide = max(validation + training) > 20 * min(validation + training)
        axes.set(xlabel="update", title=letter, yscale="log" if wide else "linear")
    panels[0].set_ylabel("loss")
    panels[0].legend(loc="center")
    return figure


def from_results() -> dict[str, plt.Figure]:
    """The pictures of measured figures by their files' names, of all machines that there are files of."""
    sweep, benches = result("sweep-excerpt.json"), measured("bench")
    trials = pd.read_csv(ROOT / "results" / "sweep-excerpt.csv")
    importance, interval = (
        pd.DataFrame(sweep[part]["adam alone"]).set_index("parameter") for part in ("importance", "fANOVA interval")
    )
    classic = [
        row | {"model": machine} for machine, found in measured("latency").items() for row in found["rows"]
        if row["model"].startswith("classic") and row["batch"] == 1
    ]  # fmt: skip
    bars = plots.grouped_bars(importance[["fANOVA", "forest"]], "importance, Adam alone", interval)
    bars.axes[0].legend(loc="lower right")
    roofs = {name: (pd.DataFrame(one["after"]).T, one["peaks"]) for name, one in measured("profile").items()}
    return {
        "compare": compare(result("compare-cornell_excerpt.json")["models"]),
        "sweep_importance": bars,
        "sweep_trials": panels_by_value({name: losses_by_value(trials, name) for name in sweep["spec"]["parameters"]}),
        "speedrun": speedrun(measured("speedrun")),
        "speedrun_steps": speedrun(measured("speedrun"), steps=True),
        "mistakes": mistakes(measured("mistakes")),
        "mistakes_riddle": whose_curve(next(iter(measured("mistakes").values()))),
        "profile": before_and_after(measured("profile")),
        "roofline": roofline(roofs),
        "bench": ratios(
            {name: compared(found) for name, found in benches.items()}, "times as fast as the classic tutorial (dashed)"
        ),
        "scale": scale({name: found["scale"] for name, found in benches.items() if "scale" in found}),
        "latency_table": latency_figure(classic),
    }


def from_run(run: Run) -> dict[str, plt.Figure]:
    """The pictures of a trained model by their files' names."""
    bot = Chatbot.load(run, CPU)
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
    if options.run:
        moving(Chatbot.load(Run(Path(options.run)), CPU)).save(IMAGES / "attention.gif", PillowWriter(fps=1))


if __name__ == "__main__":
    sys.exit(main())
