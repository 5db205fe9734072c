import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks import bench
from helpers.run import ROOT
from tests.conftest import CPU
from tools.make_images import ratios, scale

FOUND = {
    "peaks": {"fp32 GFLOP/s": 200.0, "bf16 GFLOP/s": 800.0},
    "scale": [{"lines": 30, "seconds": 1.0, "MB": 10.0}, {"lines": 300, "seconds": 10.0, "MB": 50.0}],
    "preparation": {"textbook": [10.0, 20.0], "ours": [40.0, 100.0]},
    "training": {
        "textbook": {"tokens": [100.0, 110.0, 90.0], "flops": [1e9] * 3},
        "fp32": {"tokens": [200.0, 220.0, 270.0], "flops": [1.5e11] * 3},
        "bf16": {"tokens": [500.0, 660.0, 450.0], "flops": [4e11] * 3},
    },
    "replies": {"textbook": [10.0], "batch 1": [20.0], "batch 64": [300.0]},
    "time to a loss": {"textbook": {"seconds": 100.0}, "ours": {"seconds": 25.0}},
}


def test_the_table_gives_medians_of_the_rounds_ratios_and_their_spread():
    rows = bench.compared(FOUND)
    row = rows.loc["training, bf16: target tokens/s"].to_dict()
    expected = {"textbook": 100, "ours": 500, "ratio": 5, "low": 5, "high": 6, "share of peak": 0.5}
    assert row == pytest.approx(expected)
    assert list(rows.loc["corpus lines/s", ["low", "high"]]) == [4, 5]
    assert rows.loc[f"whole trainings per hour to loss {bench.LOSS}", "ratio"] == 4


def test_the_pictures_show_the_measured_numbers():
    figure = ratios({"here": bench.compared(FOUND)}, "times")
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert texts == ["4.67×", "2.20×", "5.00×", "2.00×", "30.0×", "4.00×"]
    figure = scale({"here": FOUND["scale"]})
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), [1, 10])
    plt.close("all")


def test_the_made_up_dialogue_has_the_stated_size_and_both_ways_see_the_same_texts():
    pairs, texts, vocabulary = bench.made_up_dialogue(50)
    assert len(vocabulary) == bench.WORDS + 4
    assert (len(pairs), len(texts)) == (50, 50)
    lengths = [len(text.split()) for pair in texts for text in pair]
    assert set(lengths) == set(range(2, 10))
    assert bench._texts(pairs, vocabulary) == texts


def test_both_ways_train_in_a_worker_and_count_their_tokens_and_operations(monkeypatch):
    monkeypatch.setattr(bench, "UPDATES", 1)
    monkeypatch.setattr(bench, "WORDS", 50)
    worker = bench.Worker(CPU)
    for way in ("textbook", "fp32"):
        tokens, flops = worker.train(way)
        assert tokens > 0
        # every target token passes at least the output matrix, forwards and twice backwards
        assert flops / tokens > 3 * 2 * 500 * 50


@pytest.mark.parametrize("way", ["textbook", "ours"])
def test_both_ways_of_preparing_are_timed_on_the_same_corpus(corpus_folder, way):
    assert bench._prepare(way, corpus_folder) > 0


def test_only_our_own_processes_keep_freed_memory(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "outside")
    with bench.process("ours") as ours, bench.process("textbook") as theirs:
        assert ours.apply(os.getenv, ("MALLOC_TRIM_THRESHOLD_",)) == bench.MEMORY["MALLOC_TRIM_THRESHOLD_"]
        assert theirs.apply(os.getenv, ("MALLOC_TRIM_THRESHOLD_",)) is None
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "outside"
    sys.path.insert(0, str(ROOT / "tools"))
    import environment

    assert bench.MEMORY == environment.MEMORY  # what make runs the notebooks with


def test_the_peaks_are_rates_of_this_machine():
    found = bench.peaks(CPU)
    assert set(found) == {"fp32 GFLOP/s", "bf16 GFLOP/s", "copy GB/s"}
    assert all(1 < value < 1e6 for value in found.values())


def test_a_process_lets_go_of_its_locks():
    inside = "import multiprocessing, builtins; builtins.kept = multiprocessing.get_context('spawn').RLock()"
    program = f"from benchmarks.bench import process\nwith process('ours') as alone: alone.apply(exec, ({inside!r},))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
