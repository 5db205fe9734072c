"""Two processes on the CPU train what one does."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from helpers.batches import Prepared
from helpers.run import Run
from helpers.settings import UserError
from helpers.training import Checkpoint, fit
from tests.conftest import CPU, TINY

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
        model = fit(run, data, settings, CPU, progress_bar=False)
        torch.save(model.state_dict(), folder / f"{name} {rank}.pt")
    refused_and_begun_anew(rank, folder, data)
    dist.destroy_process_group()


def refused_and_begun_anew(rank, folder, data):
    run, settings = Run(folder / "kept"), CASES["empty shares"]
    fit(run, data, settings, CPU, progress_bar=False)
    if rank == 0:  # who writes
        shutil.copy(run.checkpoint, folder / "before")
    dist.barrier()  # here both go on in one process; a command would end
    with pytest.raises(UserError) as raised:
        fit(run, data, settings.change(seed=2), CPU, progress_bar=False)
    (folder / f"refused {rank}").write_text(str(raised.value))
    dist.barrier()
    if rank == 0:
        shutil.copy(run.checkpoint, folder / "after the refusal")
    fit(run, data, settings.change(seed=2), CPU, resume=False, progress_bar=False)


@pytest.fixture(scope="module")
def folder(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    prepared.save(folder / "data.pt")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    for name, settings in CASES.items():
        run = Run(folder / f"one {name}")
        fit(run, small(prepared), settings, CPU, progress_bar=False)
    return folder


@pytest.mark.parametrize("name", ["sgd", "empty shares"])
def test_with_sgd_two_processes_end_with_the_weights_of_one(folder, name):
    one = Checkpoint.load(Run(folder / f"one {name}").checkpoint).model
    two = Checkpoint.load(Run(folder / f"two {name}").checkpoint).model
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("name", CASES)
def test_each_updates_loss_and_tokens_are_those_of_the_whole_batch(folder, name):
    one, two = (Run(folder / f"{who} {name}").read_metrics() for who in ("one", "two"))
    assert [row.get("tokens") for row in one] == [row.get("tokens") for row in two]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "validation_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_all_processes_end_with_the_same_model(folder, name):
    first, second = (torch.load(folder / f"{name} {rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_processes_refuse_another_training_together_and_keep_it_aside_once(folder):
    run = Run(folder / "kept")
    for rank in (0, 1):
        told = (folder / f"refused {rank}").read_text()
        assert "checkpoint.pt was trained with other settings: seed 1, not 2. " in told
    before, after = (folder / "before").read_bytes(), (folder / "after the refusal").read_bytes()
    assert before == after == (run.folder / "checkpoint.1.pt").read_bytes()
    assert sorted(path.name for path in run.folder.glob("*.pt")) == ["checkpoint.1.pt", "checkpoint.pt"]
    assert Checkpoint.load(run.checkpoint).settings["seed"] == 2
    assert [row["update"] for row in run.read_metrics() if "loss" in row] == list(range(1, 7))


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
        return [row["update"] for row in Run(tmp_path / "run").read_metrics() if "loss" in row]

    assert train(2, 6) == list(range(1, 7))
    path = tmp_path / "run" / "checkpoint.pt"
    state = Checkpoint.load(path)
    state.progress["update"] = 3  # as if it had been stopped there
    state.save(path)
    assert train(1, 6, "--resume") == list(range(1, 7))
    assert Checkpoint.load(path).progress["update"] == 6
    state.save(path)
    assert train(2, 6, "--resume") == list(range(1, 7))
    assert Checkpoint.load(path).progress["update"] == 6
    assert not list(path.parent.glob("checkpoint.*.pt"))
