"""What a notebook shows: figures from plain data (each function returns what it drew on), sources, the chat box."""

import html
import inspect
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e08a00", "#4bbfa0", "#a3123a", "#6f6f6f"  # apart for the colour-blind too


def style() -> None:
    """One look for all figures: call once, in a notebook's first cell."""
    matplotlib.rcParams.update({
        "figure.figsize": (7, 3.6), "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 11,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
        "axes.formatter.min_exponent": 3,  # 0.2, not 2 × 10⁻¹
        "axes.prop_cycle": matplotlib.cycler(color=(BLUE, ORANGE, GREEN, RED, GREY)), "legend.frameon": False,
    })  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """Keep a figure in the run's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def bars(values: dict[str, float], xlabel: str, fmt: str = "{:,.0f}") -> Figure:
    """Named values as horizontal bars with the numbers beside them."""
    size = (7, 0.6 + 0.32 * len(values))
    axes = pd.Series(values).plot.barh(figsize=size, width=0.8, color=BLUE, xlabel=xlabel)
    axes.bar_label(axes.containers[0], [fmt.format(value) for value in values.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    return axes.figure


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
    """A group of horizontal bars per row and a colour per column; `whiskers` gives low and high of the first column."""
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


def show(*things) -> None:
    """In a notebook, the highlighted source of classes and functions: the very code that runs."""
    from IPython.display import Markdown, display

    for thing in things:
        display(Markdown(f"```python\n{inspect.getsource(thing).rstrip()}\n```"))


def chat_box(bot):
    """Talking to a Chatbot: the conversation in a window, a line to type in below it, and what decides on a reply.
    What a reply looked at stands, folded, below it. `chat.css` holds the look."""
    import ipywidgets as widgets

    style = widgets.HTML(f"<style>{Path(__file__).with_name('chat.css').read_text(encoding='utf-8')}</style>")
    turns, line = widgets.VBox(), widgets.Text(placeholder="Say something and press Enter", continuous_update=False)
    decoder = widgets.Dropdown(options=list(bot.decoders()), description="decoder", layout={"width": "11em"})
    seed = widgets.BoundedIntText(0, min=0, max=9999, description="seed", layout={"width": "8em"})
    temperature = widgets.FloatSlider(0.8, min=0, max=1.5, step=0.1, description="temperature", disabled=True)
    restart, replies = widgets.Button(description="New conversation"), []

    def answer(change) -> None:
        if not change["new"]:  # our own emptying of the line
            return
        line.value, before = "", replies[-1] if replies else None  # at once: the next one may be typed meanwhile
        replies.append(bot.reply(change["new"], decoder.value, seed.value + len(replies), temperature.value, before))
        turns.children = (*turns.children, widgets.HTML(_turn(bot, change["new"][:500], replies[-1])))

    def start_over(_) -> None:
        replies.clear()
        turns.children = ()

    suggestions = [widgets.Button(description=query) for query in bot.examples]
    for button in suggestions:
        button.on_click(lambda pressed: setattr(line, "value", pressed.description))
    line.observe(answer, "value")
    decoder.observe(lambda change: setattr(temperature, "disabled", change["new"] != "sampling"), "value")
    restart.on_click(start_over)
    rows = [widgets.HBox(row).add_class("chat-row") for row in (suggestions, [decoder, seed, temperature, restart])]
    window = widgets.Box([turns]).add_class("chat-window")
    return widgets.VBox([style, window, line.add_class("chat-line"), *rows]).add_class("chat")


def _turn(bot, line: str, reply) -> str:
    """A line and its reply as HTML, with the weights: a row per word of the reply, a column per word of the line."""
    said = f"<div class='chat-you'><b>you</b><p>{html.escape(line)}</p></div>"
    said += f"<div class='chat-bot'><b>bot</b><p>{html.escape(reply.text)}</p>"
    if not reply.query:
        return said + "</div>"
    query, words, weights = bot.attention(reply)
    table = "<th></th>" + "".join(f"<th>{html.escape(word)}</th>" for word in query)
    for word, row in zip(words, weights.tolist(), strict=True):
        cells = [f"<td title='{share:.0%}' style='background:rgba(0,114,178,{share:.2f})'></td>" for share in row]
        table += f"</tr><tr><th>{html.escape(word)}</th>" + "".join(cells)
    return f"{said}<details><summary>what it looked at</summary><table><tr>{table}</tr></table></details></div>"


def _smooth(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of the last `window` values."""
    return pd.Series(values, dtype=float).rolling(window, min_periods=1).mean().to_numpy()
