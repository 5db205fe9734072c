"""Two processes on the CPU train what one does."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from helpers import checkpoint
from helpers.batches import Prepared
from helpers.run import Run
from helpers.training import fit, read_metrics
from tests.conftest import CPU, TINY, off

PLAIN = TINY.change(dropout=0.0, query_dropout=0.0, updates=50, validate_every=25, batch_size=31)
CASES = {
    "sgd": PLAIN.change(optimizer="sgd", learning_rate=0.5),
    "adam": PLAIN.change(optimizer="adam", clip=0.1),
    "empty shares": PLAIN.change(optimizer="sgd", batch_size=1, updates=6, validate_every=6),
}


def small(data):
    """The first examples of each part: fifty updates are then several epochs with a short last batch."""
    return dataclasses.replace(data, splits={name: pairs.first(300) for name, pairs in data.splits.items()})


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = small(Prepared.load(folder / "data.pt"))
    for name, settings in CASES.items():
        run = Run(folder / f"two {name}")
        model = fit(run, data, settings, CPU, off(run), progress_bar=False)
        torch.save(model.state_dict(), folder / f"{name} {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    prepared.save(folder / "data.pt")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    for name, settings in CASES.items():
        run = Run(folder / f"one {name}")
        fit(run, small(prepared), settings, CPU, off(run), progress_bar=False)
    return folder


@pytest.mark.parametrize("name", ["sgd", "empty shares"])
def test_with_sgd_two_processes_end_with_the_weights_of_one(folder, name):
    one = checkpoint.load(Run(folder / f"one {name}").checkpoint)["model"]
    two = checkpoint.load(Run(folder / f"two {name}").checkpoint)["model"]
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("name", CASES)
def test_each_updates_loss_and_tokens_are_those_of_the_whole_batch(folder, name):
    one, two = (read_metrics(Run(folder / f"{who} {name}")) for who in ("one", "two"))
    assert [row.get("tokens") for row in one] == [row.get("tokens") for row in two]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "validation_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_all_processes_end_with_the_same_model(folder, name):
    first, second = (torch.load(folder / f"{name} {rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_one_process_goes_on_where_two_stopped_and_the_other_way_round(corpus_folder, tmp_path):
    sizes = ["hidden_size=16", "embedding_size=16", "held_out_share=0.15", "validate_every=3"]

    def train(processes, updates, *more):
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "--", "helpers"]
        command = [sys.executable, *(start if processes > 1 else ["-m", "helpers"]), "train"]
        command += ["--corpus", corpus_folder, "--run", tmp_path / "run", "--device", "cpu"]
        done = subprocess.run(
            [*map(str, command), *more, "--set", *sizes, f"updates={updates}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("best validation loss") == 1
        return [row["update"] for row in read_metrics(Run(tmp_path / "run")) if "loss" in row]

    assert train(2, 6) == list(range(1, 7))
    path = tmp_path / "run" / "checkpoint.pt"
    state = checkpoint.load(path)
    state["progress"]["update"] = 3  # as if it had been stopped there
    checkpoint.save(path, {key: value for key, value in state.items() if key != "format"})
    assert train(1, 6, "--resume") == list(range(1, 7))
    state["progress"]["update"] = 3
    checkpoint.save(path, {key: value for key, value in state.items() if key != "format"})
    assert train(2, 6, "--resume") == list(range(1, 7))
    assert not path.with_name("checkpoint.previous.pt").exists()
