import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import plots
from helpers.profiling import operator_table, profiled
from tests.conftest import CPU


def test_the_profile_counts_the_steps_operators():
    a = torch.ones(64, 64)
    table = operator_table(profiled(lambda: a @ a @ a, CPU))
    row = table[table["operator"] == "mm"].iloc[0]
    assert row["calls"] == 2
    assert row["self ms"] > 0
    assert row["self MB"] == pytest.approx(2 * 64 * 64 * 4 / 1e6, rel=0.05)
    assert table["share"].sum() == pytest.approx(1)
    assert table["self ms"].is_monotonic_decreasing


@pytest.fixture(autouse=True)
def _close():
    plots.style()
    yield
    plt.close("all")


def test_training_curves_mark_the_best_validation():
    rows = [{"update": i, "loss": 3 - i / 10, "gradient_norm": 1.0, "learning_rate": 0.1} for i in range(1, 11)]
    rows += [{"update": 5, "validation_loss": 2.0}, {"update": 10, "validation_loss": 2.5}]
    figure = plots.training_curves(rows)
    assert "best, update 5" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_attention_shows_every_word():
    axes = plots.attention(["a", "b"], ["c", "d", "<eos>"], np.eye(3)[:, :2])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["c", "d", "<eos>"]


def test_latency_bars_carry_their_numbers():
    row = {"model": "m", "variant": "x", "batch": 1, "p50 ms": 2.0, "p95 ms": 2.5, "vs textbook": 1.0}
    rows = [row, row | {"variant": "y", "p50 ms": 1.0, "vs textbook": 2.0}, row | {"batch": 8, "p50 ms": 4.0}]
    failed = {"model": "m", "variant": "z", "batch": 1}
    top, bottom = plots.latency([*rows, failed]).axes
    assert [text.get_text() for text in top.texts] == ["2 ms · 1.0×", "1 ms · 2.0×"]
    assert [text.get_text() for text in bottom.texts] == ["4 ms · 1.0×", "not timed"]


def test_the_others_draw(tmp_path):
    from collections import Counter

    counts = Counter({f"w{i}": 1000 // (i + 1) for i in range(500)})
    figures = [
        plots.lengths([1, 2, 3], [2, 3, 9], 5),
        plots.zipf(counts, 2),
        plots.coverage(counts, 3),
        plots.bars({"a": 1.0, "b": 2.0}, "things"),
        plots.losses({"a": [3, 2, 1]}, window=2),
        plots.best_so_far([3.0, 2.0, 2.5]),
        plots.parallel_coordinates(
            pd.DataFrame({"x": [1, 2], "k": ["a", "b"], "validation loss": [1.0, 2.0]}), ["x", "k"]
        ),
    ]
    for number, figure in enumerate(figures):
        plots.save(figure, tmp_path / "figures" / f"{number}.png")
    assert len(list((tmp_path / "figures").iterdir())) == len(figures)
