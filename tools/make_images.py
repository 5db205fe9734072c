"""The pictures of README and notebooks, drawn from `results/` and from a run; `make images` calls this.

python tools/make_images.py --run runs/sample
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch

from helpers import plots
from helpers.bench import compared
from helpers.chat import Chatbot
from helpers.run import ROOT, Run
from helpers.settings import UserError
from helpers.training import read_metrics

IMAGES, RESULTS = ROOT / "images", ROOT / "results"
QUESTION = "Anna has a red hat and a blue box. What colour is the box?"


def architecture() -> plt.Figure:
    """Encoder, attention and decoder at the moment when the fourth word of the reply is chosen."""
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    axes.set(xlim=(-0.6, 11.0), ylim=(-1.1, 4.9))
    axes.axis("off")

    def box(x: float, y: float, text: str, colour: str, width: float = 0.9) -> None:
        patch = plt.Rectangle((x - width / 2, y - 0.25), width, 0.5, facecolor=colour, edgecolor="black", alpha=0.85)
        axes.add_patch(patch)
        axes.text(x, y, text, ha="center", va="center", fontsize=10)

    def arrow(a: tuple[float, float], b: tuple[float, float], **style) -> None:
        arrowprops = {"arrowstyle": "->", "color": "black", "shrinkA": 0, "shrinkB": 0} | style
        axes.annotate("", xy=b, xytext=a, arrowprops=arrowprops)

    blue, orange, green, grey = "#c5d7ee", "#fbd7a8", "#cfe8bd", "#e4e4e0"
    query, weights = ["where", "is", "ruth", "?"], [0.08, 0.07, 0.8, 0.05]
    for i, (word, weight) in enumerate(zip(query, weights, strict=True)):
        axes.text(i, -0.9, word, ha="center", style="italic")
        box(i, 0, r"$\overrightarrow{h},\ \overleftarrow{h}$", blue)
        arrow((i, -0.65), (i, -0.25))
        arrow((i, 0.25), (4.0, 2.25), color="#3465a4", linewidth=0.6 + 5 * weight, alpha=0.8)
        axes.text(i - 0.28, 0.42, f"{weight:.2f}", color="#3465a4", fontsize=9)
        if i:
            arrow((i - 0.55, 0.08), (i - 0.45, 0.08))
            arrow((i - 0.45, -0.08), (i - 0.55, -0.08))
    said = ["<sos>", "ruth", "is", "at"]
    for t, word in enumerate(said):
        x = 6 + 1.3 * t
        axes.text(x, -0.9, word, ha="center", style="italic")
        box(x, 0, f"$h_{t + 1}$", orange)
        arrow((x, -0.65), (x, -0.25))
        arrow((x - 0.85 if t else 4.95, 0), (x - 0.45, 0))
    box(4.5, 0, "bridge", grey)
    arrow((3.45, 0), (4.05, 0))
    box(4.3, 2.5, "context $c_4 = \\sum_s a_4(s)\\, \\bar h_s$", green, 2.9)
    x = 6 + 1.3 * 3
    box(x - 0.6, 2.5, r"$\tilde h_4 = \tanh(W_c [c_4; h_4])$", green, 2.9)
    arrow((x, 0.25), (x, 2.25))
    arrow((5.75, 2.5), (x - 2.05, 2.5))
    arrow((x - 0.5, 0.2), (4.9, 2.25), linestyle="--", color="#888a85")
    axes.text(6.5, 1.75, "score$(h_4, \\bar h_s)$", color="#555753", fontsize=9)
    box(x - 0.6, 3.6, r"softmax$(W_s \tilde h_4)$", grey, 2.9)
    arrow((x - 0.6, 2.75), (x - 0.6, 3.35))
    axes.text(x - 0.6, 4.5, "the", ha="center", style="italic")
    arrow((x - 0.6, 3.85), (x - 0.6, 4.4))
    axes.text(1.5, -1.1, "query: bidirectional GRU", ha="center", va="top", fontsize=9, color="#555753")
    axes.text(7.95, -1.1, "response: GRU, one word after another", ha="center", va="top", fontsize=9, color="#555753")
    return figure


def result(name: str) -> dict:
    """A file of `results/`. Raises UserError if nobody has measured it yet."""
    path = RESULTS / name
    if not path.is_file():
        raise UserError(f"results/{name} is missing: see 'make help' for the command that measures it.")
    return json.loads(path.read_text(encoding="utf-8"))


def pictures(run: Run) -> dict[str, plt.Figure]:
    """Every picture by its file's name."""
    bot = Chatbot.load(run, torch.device("cpu"))
    query, said, weights = bot.attention(bot.reply(QUESTION, "greedy"))
    sweep, profile, bench = (result(name) for name in ("sweep-excerpt.json", "profile-cpu.json", "bench-cpu.json"))
    importance, interval = (
        pd.DataFrame(sweep[part]["all trials"]).set_index("parameter") for part in ("importance", "fANOVA interval")
    )
    parts = {name: pd.DataFrame(profile[name]).T["ms"] for name in ("before", "after")}
    return {
        "architecture": architecture(),
        "training_curves": plots.training_curves(read_metrics(run)),
        "attention": plots.attention(query, said, weights.numpy()).figure,
        "compare": plots.compare(result("compare-cornell_excerpt.json")["models"]),
        "sweep_importance": plots.grouped_bars(importance[["fANOVA", "PED-ANOVA", "forest"]], "importance", interval),
        "profile": plots.grouped_bars(pd.DataFrame(parts), "milliseconds a step"),
        "bench": plots.ratios(compared(bench), "times as fast as the textbook way (dashed)"),
        "scale": plots.scale(bench["scale"]),
        "latency_table": plots.latency(result("latency-cpu.json")["rows"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the run whose training and attention are drawn")
    options = parser.parse_args()
    plots.style()
    try:
        for name, figure in pictures(Run(Path(options.run))).items():
            plots.save(figure, IMAGES / f"{name}.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
