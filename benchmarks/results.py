"""Where measured figures are kept, and the pictures of the latency table and of the roofline."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots import BLUE, GREY, ORANGE
from helpers.run import ROOT


def without_place(corpus: dict) -> dict:
    """What is told of a corpus but for where it lies, which is the measuring machine's own business."""
    return {name: fact for name, fact in corpus.items() if name != "source"}


def result_path(name: str, facts: dict) -> Path:
    """Where a figure measured on a `machine` is kept: results/NAME-cuda.json, or NAME-cpu-MAKER.json."""
    maker = "" if facts["device"] == "cuda" else f"-{re.match('[a-z]*', facts['name'].lower())[0] or 'other'}"
    return ROOT / "results" / f"{name}-{facts['device']}{maker}.json"


def latency_figure(rows: Sequence[dict]) -> Figure:
    """Median milliseconds per reply: a panel per model and batch size, a bar per variant, whiskers to the 95th
    percentile, and beside each bar how many times as fast as the classic tutorial. `rows` are a latency report's."""
    table = pd.DataFrame(rows).dropna(subset="p50 ms")
    models, sizes, variants = (list(dict.fromkeys(table[column])) for column in ("model", "batch", "variant"))
    upright = len(models) <= len(sizes)  # as few panels side by side as may be
    grid = [[(model, size) for model in models] for size in sizes]
    grid = grid if upright else [list(column) for column in zip(*grid, strict=True)]
    size = (2 + 4.5 * len(grid[0]), len(grid) * (0.8 + 0.27 * len(variants)))
    figure, panels = plt.subplots(len(grid), len(grid[0]), figsize=size, squeeze=False)
    for axes, (model, batch) in zip(panels.flat, itertools.chain(*grid), strict=True):
        part = table[(table["model"] == model) & (table["batch"] == batch)].set_index("variant").reindex(variants)
        whisker = [np.zeros(len(part)), (part["p95 ms"] - part["p50 ms"]).fillna(0)]
        names = ["classic tutorial" if variant == "textbook" else variant for variant in variants]
        drawn = axes.barh(names, part["p50 ms"].fillna(0), xerr=whisker, color=BLUE, ecolor=GREY)
        pairs = zip(part["p50 ms"], part["vs textbook"], strict=True)
        labels = ["not timed" if value != value else f"{value:.3g} ms · {ratio:.1f}×" for value, ratio in pairs]
        axes.bar_label(drawn, labels, padding=4)
        axes.set_title(f"{model}, batch {batch}", fontsize=11)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.grid(axis="y", visible=False)
    for axes in panels[:, 1:].flat:
        axes.tick_params(labelleft=False)
    figure.supxlabel("milliseconds per reply (median, whisker 95%) · × the classic tutorial", fontsize=11)
    return figure


def roofline(machines: dict[str, tuple[pd.DataFrame, dict]]) -> Figure:
    """The roofline model (Williams et al. 2009), a panel per machine: FLOPs per second against FLOPs per byte, the roof
    that the peaks allow, and the parts of the model below it, the larger the longer they take. `machines` gives for
    each name a table of `profiling.bounds` and the peaks. Parts without matrix products have no place here."""
    figure, panels = plt.subplots(1, len(machines), figsize=(0.8 + 3.9 * len(machines), 3.8), squeeze=False)
    for axes, (name, (table, peaks)) in zip(panels[0], machines.items(), strict=True):
        parts = table.drop("other", errors="ignore").astype(dict.fromkeys(["ms", "GFLOP/s", "GB/s"], float))
        parts = parts[parts["GFLOP/s"] > 0].assign(intensity=lambda part: part["GFLOP/s"] / part["GB/s"])
        ridge = peaks["GFLOP/s"] / peaks["GB/s"]
        left, right = min(parts["intensity"].min(), ridge) / 3, max(parts["intensity"].max(), ridge) * 30
        corners = np.array([left, ridge, right])
        axes.loglog(corners, np.minimum(corners * peaks["GB/s"], peaks["GFLOP/s"]), color=GREY)
        axes.text(left * 2, left * peaks["GB/s"], f"{peaks['GB/s']:,.0f} GB/s", color=GREY, va="center")
        axes.text(
            right, peaks["GFLOP/s"] * 1.1, f"{peaks['GFLOP/s']:,.0f} GFLOP/s", color=GREY, ha="right", va="bottom"
        )
        axes.scatter(parts["intensity"], parts["GFLOP/s"], 20 + 400 * parts["ms"] / parts["ms"].sum(), BLUE, alpha=0.8)
        bottom = min(parts["GFLOP/s"].min() / 3, left * peaks["GB/s"])
        axes.set(xlim=(left, right), ylim=(bottom, peaks["GFLOP/s"] * 3), title=name)
        axes.set(xlabel="FLOPs per byte", ylabel="GFLOP/s" if axes is panels[0][0] else "")
        gap, free = np.log(peaks["GFLOP/s"] * 3 / bottom) / 13, np.log(peaks["GFLOP/s"] * 0.75)
        for part, row in parts.sort_values("GFLOP/s", ascending=False).iterrows():
            free = min(free, np.log(row["GFLOP/s"]))  # names stand in a column, none on another
            arrow = {"arrowstyle": "-", "color": ORANGE, "linewidth": 0.8}
            point = row["intensity"], row["GFLOP/s"]
            axes.annotate(part, point, (right / 8, np.exp(free)), va="center", arrowprops=arrow)
            free -= gap
    return figure
