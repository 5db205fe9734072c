"""Where measured figures are kept, and the picture of the latency table."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots import BLUE, GREY
from helpers.run import ROOT


def result_path(name: str, facts: dict) -> Path:
    """Where a figure measured on a `machine` is kept: results/NAME-cuda.json, or NAME-cpu-MAKER.json."""
    maker = "" if facts["device"] == "cuda" else f"-{re.match('[a-z]*', facts['name'].lower())[0] or 'other'}"
    return ROOT / "results" / f"{name}-{facts['device']}{maker}.json"


def latency_figure(rows: Sequence[dict]) -> Figure:
    """Median milliseconds per reply: a panel per model and batch size, a bar per variant, whiskers to the 95th
    percentile, and beside each bar how many times as fast as the textbook it is. `rows` are a latency report's."""
    table = pd.DataFrame(rows).dropna(subset="p50 ms")
    models, sizes, variants = (list(dict.fromkeys(table[column])) for column in ("model", "batch", "variant"))
    height = len(sizes) * (0.7 + 0.24 * len(variants))
    figure, panels = plt.subplots(len(sizes), len(models), figsize=(1.5 + 4.2 * len(models), height), squeeze=False)
    for (line, size), (column, model) in itertools.product(enumerate(sizes), enumerate(models)):
        axes = panels[line, column]
        part = table[(table["model"] == model) & (table["batch"] == size)].set_index("variant").reindex(variants)
        whisker = [np.zeros(len(part)), (part["p95 ms"] - part["p50 ms"]).fillna(0)]
        drawn = axes.barh(variants, part["p50 ms"].fillna(0), xerr=whisker, color=BLUE, ecolor=GREY)
        pairs = zip(part["p50 ms"], part["vs textbook"], strict=True)
        labels = ["not timed" if value != value else f"{value:.3g} ms · {ratio:.1f}×" for value, ratio in pairs]
        axes.bar_label(drawn, labels, padding=4, fontsize=8)
        axes.set_title(f"{model}\nbatch {size}" if line == 0 else f"batch {size}", fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.grid(axis="y", visible=False)
        if column:
            axes.tick_params(labelleft=False)
        if line == len(sizes) - 1:
            axes.set_xlabel("milliseconds per reply (p50, whisker p95) · × the textbook")
    return figure
