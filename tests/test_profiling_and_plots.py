import gzip
import itertools
import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from benchmarks.results import latency_figure
from benchmarks.sweep_report import losses_by_value, panels_by_value
from helpers import plots
from helpers.evaluation import batch_loss
from helpers.model import new_model
from helpers.profiling import PARTS, bounds, labelled, machine_peaks, operator_table, part_table, profiled
from helpers.training import new_optimizer
from tests.conftest import CPU, TINY


def test_the_profile_counts_the_steps_operators():
    a = torch.ones(64, 64)
    table = operator_table(profiled(lambda: a @ a @ a, CPU))
    row = table[table["operator"] == "mm"].iloc[0]
    assert row["calls"] == 2
    assert row["self ms"] > 0
    assert row["self MB"] == pytest.approx(2 * 64 * 64 * 4 / 1e6, rel=0.05)
    assert table["share"].sum() == pytest.approx(1)
    assert table["self ms"].is_monotonic_decreasing


@pytest.fixture(scope="module")
def training_profiles(prepared):
    """A labelled training step with detail and without, and the number of FLOPs of its output layer."""
    model = new_model(TINY, len(prepared.vocabulary))
    optimizer = new_optimizer(model, TINY)
    batch = prepared.splits["train"].batch(torch.arange(32))

    def step():
        total, tokens = batch_loss(model, batch)
        with record_function("backward"):
            optimizer.zero_grad()
            (total / tokens).backward()
        with record_function("optimiser"):
            optimizer.step()

    with labelled(model):
        profiles = [profiled(step, CPU, 2, detail=detail) for detail in (True, False)]
    return *profiles, 2 * batch.targets.numel() * TINY.embedding_size * len(prepared.vocabulary)


def test_operators_stand_under_the_part_that_called_them(training_profiles):
    detailed, quick, output_flops = training_profiles
    table = part_table(detailed, 2)
    assert {*PARTS} - {"loss"} <= set(table.index)
    assert table.loc["project", "GFLOP"] * 1e9 == pytest.approx(output_flops, rel=0.02)
    assert table.loc["backward", "GFLOP"] >= 1.9 * table.loc["project", "GFLOP"]  # two products for each forward one
    assert part_table(quick, 2)["GFLOP"].sum() == 0  # without detail there are times and calls alone
    assert (part_table(quick, 2)["calls"] == table["calls"]).all()
    step = next(event for event in detailed.key_averages() if event.key == "step")
    assert table["ms"].sum() == pytest.approx(step.cpu_time_total / 2e3, rel=0.05)  # no time is lost
    assert 0 < table["Python ms"].sum() < table["ms"].sum()


def test_bytes_are_what_products_and_lookups_read_and_write():
    a, table, rows = torch.ones(64, 32), torch.ones(1000, 32), torch.arange(10)
    bias, weights = torch.ones(16), torch.ones(32, 16)

    def moved(work):
        return part_table(profiled(work, CPU, 2), 2)["MB"].sum() * 1e6 / 4  # as numbers

    assert moved(lambda: a.T @ a) == pytest.approx(2 * 64 * 32 + 32 * 32)
    bias_first = 16 + 2 * 64 * 16  # the bias is written into the result before the product is added there
    product = 16 + 64 * 32 + 32 * 16 + 64 * 16
    assert moved(lambda: torch.addmm(bias, a, weights)) == pytest.approx(product + bias_first, rel=0.1)
    assert moved(lambda: table.index_select(0, rows)) == pytest.approx(2 * 10 * 32 + 10)


def test_labels_are_gone_after_the_block(prepared):
    model = new_model(TINY, len(prepared.vocabulary))
    with labelled(model):
        pass
    assert not model.embedding._forward_hooks
    assert not model.decoder._forward_pre_hooks


def test_a_part_is_bound_by_what_needs_most_of_its_time():
    quick = pd.DataFrame({"ms": [10.0] * 4, "Python ms": [0.0, 0.0, 3.0, 1.0]}, index=list("abcd"))
    detailed = pd.DataFrame({"calls": [10, 10, 5000, 0], "GFLOP": [0.9, 0.01, 0.01, 0.1], "MB": [1.0, 90.0, 1.0, 1.0]},
                            quick.index)  # fmt: skip
    told = bounds(quick, detailed, {"GFLOP/s": 100.0, "GB/s": 10.0, "µs a call": 1.0})
    assert list(told["bound by"]) == ["compute", "memory", "overhead", "none of them"]
    assert told.loc["a", "compute"] == pytest.approx(0.9)
    assert told.loc["b", "memory"] == pytest.approx(0.9)
    assert told.loc["c", "overhead"] == pytest.approx(0.8)


def test_a_machine_s_peaks_are_numbers():
    peaks = machine_peaks(CPU)
    assert all(value > 0 for value in peaks.values())
    assert peaks["µs a call"] < 1000


def test_the_trace_is_what_the_file_holds(training_profiles, tmp_path):
    training_profiles[0].export_chrome_trace(str(tmp_path / "step.json.gz"))
    trace = json.loads(gzip.decompress((tmp_path / "step.json.gz").read_bytes()))["traceEvents"]
    assert {*PARTS} - {"loss"} <= {event["name"] for event in trace if event.get("cat") == "user_annotation"}
    memory = [event["args"] for event in trace if event.get("name") == "[memory]"]
    assert memory
    assert {place["Device Type"] for place in memory} == {0}
    assert max(place["Total Allocated"] for place in memory) > 0


def on_a_gpu() -> SimpleNamespace:
    """A profile as PyTorch makes it on a GPU: autograd works in a thread of its own (2) while the main one (1) waits.
    Of each event: name, thread, start, end, device bytes, shapes and the microseconds of its kernel."""
    rows = [
        ("ProfilerStep#3", 1, 0, 1000, 4800, [], 0), ("step", 1, 0, 990, 4800, [], 0),
        ("encode", 1, 10, 100, 800, [], 0), ("aten::tanh", 1, 20, 80, 800, [[10, 20]], 50),
        ("cudaLaunchKernel", 1, 30, 40, 0, [], 0), ("backward", 1, 200, 500, 0, [], 0),
        ("aten::tanh_backward", 2, 250, 450, 4000, [[10, 20]] * 2, 70), ("cudaLaunchKernel", 2, 260, 270, 0, [], 0),
        ("wait", 1, 600, 980, 0, [], 0), ("cudaDeviceSynchronize", 1, 610, 970, 0, [], 0),
    ]  # fmt: skip
    events = EventList(use_device="cuda")
    for number, (name, thread, start, end, moved, shapes, kernel) in enumerate(rows):
        about = {"input_shapes": shapes, "stack": [], "use_device": "cuda", "device_memory_usage": moved}
        events.append(FunctionEvent(number, name, thread, start, end, **about))
        if kernel:
            events[-1].append_kernel(name, 0, kernel)
    events._build_tree()
    activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    return SimpleNamespace(activities=activities, events=lambda: events, key_averages=events.key_averages)


def test_waiting_for_a_gpu_is_nobody_s_work():
    table = part_table(on_a_gpu(), 1)
    assert list(table.index) == ["encode", "backward", "other"]
    assert list(table["GPU ms"]) == pytest.approx([0.05, 0.07, 0])
    assert list(table["Python ms"]) == pytest.approx([0.03, 0, 0.22])  # 990 less the 90, 300 and 380 of what it called
    assert list(table["ms"]) == pytest.approx([0.09, 0.2, 0.22])


def test_on_a_gpu_memory_is_the_gpu_s():
    prof = on_a_gpu()
    assert list(part_table(prof, 1)["MB"]) == pytest.approx([(800 + 800) / 1e6, (1600 + 4000) / 1e6, 0])
    table = operator_table(prof, 1).set_index("operator")
    assert set(table.index) == {"tanh", "tanh_backward", "cudaLaunchKernel"}
    assert table.loc["tanh", "self MB"] == pytest.approx(800 / 1e6)
    assert table.loc["tanh_backward", "GPU ms"] == pytest.approx(0.07)


@pytest.fixture(autouse=True)
def _close():
    plots.style()
    yield
    plt.close("all")


# What colours look like to an eye without one kind of cone, in linear RGB (Machado et al. 2009, severity 1).
EYES = {
    "all cones": np.eye(3),
    "no long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no medium": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@pytest.mark.parametrize("eye", EYES)
def test_the_colours_differ_for_every_eye(eye):
    colours = np.array([to_rgb(colour) for colour in plt.rcParams["axes.prop_cycle"].by_key()["color"]])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(EYES[eye]), 0, 1) @ XYZ.T
    x, y, z = np.cbrt(seen / XYZ.sum(axis=1)).T
    lab = np.column_stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])
    apart = [np.linalg.norm(one - other) for one, other in itertools.combinations(lab, 2)]
    assert min(apart) > 12


def test_training_curves_mark_the_best_validation():
    rows = [{"update": i, "loss": 3 - i / 10, "gradient_norm": 1.0, "learning_rate": 0.1} for i in range(1, 11)]
    rows += [{"update": 5, "validation_loss": 2.0}, {"update": 10, "validation_loss": 2.5}]
    figure = plots.training_curves(rows, clip=2.0)
    assert "best, update 5" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["clip: 2"]


def test_attention_shows_every_word():
    axes = plots.attention(["a", "b"], ["c", "d", "<eos>"], np.eye(3)[:, :2])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["c", "d", "<eos>"]


def test_latency_bars_carry_their_numbers():
    row = {"model": "m", "variant": "x", "batch": 1, "p50 ms": 2.0, "p95 ms": 2.5, "vs textbook": 1.0}
    rows = [
        row,
        row | {"variant": "y", "p50 ms": 1.0, "vs textbook": 2.0},
        row | {"batch": 8, "p50 ms": 4.0, "p95 ms": 4.5},
    ]
    failed = {"model": "m", "variant": "z", "batch": 1}
    top, bottom = latency_figure([*rows, failed]).axes
    assert [text.get_text() for text in top.texts] == ["2 ms · 1.0×", "1 ms · 2.0×"]
    assert [text.get_text() for text in bottom.texts] == ["4 ms · 1.0×", "not timed"]


TRIALS = pd.DataFrame({"x": np.geomspace(1e-4, 1e-1, 9), "k": list("abababaab"), "validation loss": range(9)})
INTERVALS = pd.DataFrame({"low": [0.5, 1.0], "high": [1.5, 3.0]}, ["a", "b"])


def test_every_trial_is_drawn_at_its_value_with_a_bar_at_the_mean():
    groups = {name: losses_by_value(TRIALS, name) for name in ("x", "k")}
    panels = panels_by_value(groups).axes
    assert [panel.get_xlabel() for panel in panels] == ["x", "k"]
    for panel, by_value in zip(panels, groups.values(), strict=True):
        assert [label.get_text() for label in panel.get_xticklabels()] == list(by_value)
        points = np.concatenate([line.get_xydata() for line in panel.lines])
        bars = [segment for drawn in panel.collections for segment in drawn.get_segments()]
        for place, (losses, bar) in enumerate(zip(by_value.values(), bars, strict=True)):
            own = points[np.abs(points[:, 0] - place) < 0.3]
            assert sorted(own[:, 1]) == sorted(losses)
            assert bar[:, 1] == pytest.approx([losses.mean()] * 2)
            assert bar[:, 0].mean() == pytest.approx(place)


def test_the_others_draw(tmp_path):
    figures = [
        plots.bars({"a": 1.0, "b": 2.0}, "things"),
        plots.losses({"a": [3, 2, 1]}, window=2),
        plots.grouped_bars(pd.DataFrame({"u": [1.0, 2.0], "v": [2.0, 1.0]}, ["a", "b"]), "share", INTERVALS),
    ]
    for number, figure in enumerate(figures):
        plots.save(figure, tmp_path / "figures" / f"{number}.png")
    assert len(list((tmp_path / "figures").iterdir())) == len(figures)
