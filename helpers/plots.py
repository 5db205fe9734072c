"""Every figure of the series, from plain data; each function returns the Axes or Figure that it drew on."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#3465a4", "#e07b00", "#4e9a06", "#a40000", "#888a85"


def style() -> None:
    """One look for all figures: call once, in a notebook's first cell."""
    matplotlib.rcParams.update({
        "figure.figsize": (7, 3.6), "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
        "axes.prop_cycle": matplotlib.cycler(color=(BLUE, ORANGE, GREEN, RED, GREY)), "legend.frameon": False,
    })  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """Keep a figure in the run's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes, for a widget; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def bars(values: dict[str, float], xlabel: str, fmt: str = "{:,.0f}") -> Figure:
    """Named values as horizontal bars with the numbers beside them."""
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.32 * len(values)))
    drawn = axes.barh(list(values), list(values.values()), color=BLUE)
    axes.bar_label(drawn, [fmt.format(value) for value in values.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    return figure


def training_curves(rows: Sequence[dict], clip: float = 0.0, window: int = 25) -> Figure:
    """Training loss (smoothed), validation loss, and below them gradient norm, its limit if any, and learning rate."""
    steps = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "validation_loss" in row]
    update, best = [row["update"] for row in steps], min(checks, key=lambda row: row["validation_loss"])
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1))
    top.plot(update, _smooth([row["loss"] for row in steps], window), label="training, with dropout (smoothed)")
    validations = [row["update"] for row in checks], [row["validation_loss"] for row in checks]
    top.plot(*validations, "o-", markersize=3, label="validation")
    where = best["update"], best["validation_loss"]
    top.plot(*where, "*", color=RED, markersize=12, label=f"best, update {best['update']}")
    top.set(ylabel="nats per token", yscale="log")
    top.legend()
    bottom.plot(update, _smooth([row["gradient_norm"] for row in steps], window))
    if clip:
        bottom.axhline(clip, color=RED, linestyle=":", label=f"clip: {clip:g}")
        bottom.legend(loc="lower left", bbox_to_anchor=(0.06, 0))  # beside the warm-up, below the norm
    bottom.set(xlabel="update", ylabel="gradient norm", yscale="log")
    right = bottom.twinx()
    right.plot(update, [row["learning_rate"] for row in steps], color=GREY, linestyle="--")
    right.set_ylabel("learning rate (dashed)")
    right.grid(visible=False)
    return figure


def losses(curves: dict[str, Sequence[float]], window: int = 1, ylabel: str = "nats per token") -> Figure:
    """Several losses by update on one pair of axes."""
    figure, axes = plt.subplots()
    for name, values in curves.items():
        axes.plot(np.arange(1, len(values) + 1), _smooth(values, window), label=name)
    axes.set(xlabel="update", ylabel=ylabel, ylim=(0, None))
    axes.legend()
    return figure


def attention(query: list[str], reply: list[str], weights: np.ndarray) -> Axes:
    """A heat-map: which word of the query (column) each word of the reply (row) looked at."""
    _, axes = plt.subplots(figsize=(0.9 + 0.45 * len(query), 1.2 + 0.32 * len(reply)))
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(query)), query, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(reply)), reply)
    axes.grid(visible=False)
    axes.set(xlabel="query", ylabel="reply")
    axes.figure.colorbar(image, ax=axes, label="attention weight")
    return axes


def grouped_bars(table: pd.DataFrame, xlabel: str, whiskers: pd.DataFrame | None = None) -> Figure:
    """One group of horizontal bars a row and one colour a column; `whiskers` gives low and high of the first column."""
    names = [str(name).replace("_", " ") for name in table.index]
    size = (7, 0.8 + 0.2 * len(table) * (len(table.columns) + 1))
    axes = table.astype(float).set_axis(names).plot.barh(figsize=size, width=0.8, xlabel=xlabel, ylabel="")
    if whiskers is not None:
        places = [bar.get_y() + bar.get_height() / 2 for bar in axes.containers[0]]
        bounds = whiskers.loc[table.index]
        axes.hlines(places, bounds["low"], bounds["high"], color="black", linewidth=1.2)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return axes.figure


def losses_by_value(groups: dict[str, dict[str, Sequence[float]]]) -> Figure:
    """One panel per parameter: the loss of every trial at the value it had, and a bar at the value's mean."""
    figure, panels = plt.subplots(1, len(groups), figsize=(1.9 * len(groups), 3.2), sharey=True, squeeze=False)
    for axes, (name, by_value) in zip(panels[0], groups.items(), strict=True):
        for place, losses in enumerate(by_value.values()):
            # Side by side in an order by chance: sorted ones would look like a trend.
            losses = np.random.default_rng(0).permutation(losses)
            spread = np.linspace(-0.2, 0.2, len(losses)) if len(losses) > 1 else 0
            axes.plot(place + spread, losses, "o", color=GREY, markersize=3, alpha=0.7)
            axes.hlines(losses.mean(), place - 0.35, place + 0.35, color=RED, linewidth=2)
        axes.set_xticks(range(len(by_value)), list(by_value), rotation=60, fontsize=8)
        axes.set_xlabel(name.replace("_", "\n"))
    panels[0][0].set_ylabel("validation loss")
    return figure


def latency(rows: Sequence[dict]) -> Figure:
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


def _smooth(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of the last `window` values."""
    return pd.Series(values, dtype=float).rolling(window, min_periods=1).mean().to_numpy()
