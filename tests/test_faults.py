"""What machines do to a long training: killed, full disks, Ctrl-C, a second run. `make soak` runs the long series."""

import contextlib
import dataclasses
import json
import math
import os
import pkgutil
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from helpers.__main__ import main
from helpers.batches import prepare
from helpers.corpus import read_corpus
from helpers.evaluation import Likelihood, batch_loss
from helpers.run import Run
from helpers.settings import UserError
from helpers.training import Checkpoint, Interrupted, NotFiniteError, fit, load_model
from tests.conftest import CPU, SOAK, TINY

# The command line, telling in a pipe when a validation (v) and a write of the checkpoint (c) begin and end (.).
DRIVER = """
import os, sys
from helpers import training
from helpers.__main__ import main

def told(letter, function):
    def inner(*arguments, **options):
        os.write(PIPE, letter)
        result = function(*arguments, **options)
        os.write(PIPE, b".")
        return result
    return inner

PIPE = int(sys.argv.pop(1))
training.evaluate = told(b"v", training.evaluate)
training.Checkpoint.save = told(b"c", training.Checkpoint.save)
sys.exit(main(sys.argv[1:]))
"""
PHASES = {"c": "checkpoint write", "v": "validation", ".": "step"}
LONG = TINY.change(
    embedding_size=64, hidden_size=64, updates=60 if SOAK else 40, validate_every=4, schedule="cosine",
    warmup_updates=5, word_dropout=0.1, query_dropout=0.1,
)  # fmt: skip
VARIANTS = [(optimizer, precision) for optimizer in ("adam", "adamw", "sgd") for precision in ("fp32", "bf16")]
KILLS = 4 if SOAK else 3  # of each variant


class Training:
    """`python -m helpers train` in a process of its own, watched through the driver's pipe."""

    def __init__(self, corpus, profile, folder, *more) -> None:
        self.pipe, theirs = os.pipe()
        command = [sys.executable, "-c", DRIVER, str(theirs), "train", "--corpus", str(corpus)]
        command += ["--run", str(folder), "--profile", str(profile), "--resume", *more]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        os.close(theirs)
        self.told = ""

    def wait_for(self, letters: str) -> None:
        """Until these letters have been told, in this order, from now on."""
        for letter in letters:
            while True:
                byte = os.read(self.pipe, 1).decode()
                assert byte, self.process.communicate()
                self.told += byte
                if byte == letter:
                    break

    def end(self, number: int) -> tuple[int, str, str]:
        """Send a signal (0: none); exit status, standard error, and the last thing told: where it was hit."""
        if number:
            assert self.process.poll() is None, "it had ended already"
            self.process.send_signal(number)
        _, error = self.process.communicate(timeout=60)
        while byte := os.read(self.pipe, 4096):
            self.told += byte.decode()
        os.close(self.pipe)
        assert "Traceback" not in error, error
        return self.process.returncode, error, self.told[-1:]


@pytest.fixture(scope="module")
def reference(corpus_folder, tmp_path_factory):
    """Of an optimiser and a precision: the profile's file, the settings, all states and the metrics, uninterrupted."""
    made = {}

    def make(optimizer: str, precision: str):
        if (optimizer, precision) not in made:
            folder = tmp_path_factory.mktemp("reference")
            profile = folder / "profile.yaml"
            settings = LONG.change(optimizer=optimizer, precision=precision, decoder_learning_ratio=2.0)
            profile.write_text(yaml.safe_dump(settings.to_dict()))
            run, states, save = Run(folder / "run"), {}, Checkpoint.save

            def keep(state, path):
                save(state, path)
                states[state.progress["update"]] = Checkpoint.load(path)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Checkpoint, "save", keep)
                fit(run, prepare(read_corpus(corpus_folder), settings), settings, CPU, progress_bar=False)
            made[optimizer, precision] = profile, settings, states, timeless(run)
        return made[optimizer, precision]

    return make


def timeless(run: Run) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.read_metrics()]


def equal(a, b) -> bool:
    """The same, tensors bit for bit, however deep."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and equal(vars(a), vars(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def assert_whole(folder, states: dict, rows: list[dict]) -> None:
    """A finished run equals the uninterrupted one: weights, optimiser, rates, progress; and has each step once."""
    run = Run(folder)
    assert equal(Checkpoint.load(run.checkpoint), states[LONG.updates])
    assert timeless(run) == rows
    assert [row["update"] for row in rows if "loss" in row] == list(range(1, LONG.updates + 1))
    assert not list(run.folder.glob(".*.tmp"))


@pytest.mark.parametrize(("optimizer", "precision"), VARIANTS if SOAK else VARIANTS[3:4])
def test_killed_at_any_moment_and_resumed_a_run_ends_as_if_nothing_had_happened(
    reference, corpus_folder, tmp_path, optimizer, precision
):
    profile, _, states, rows = reference(optimizer, precision)
    chance = random.Random(f"{optimizer} {precision}")
    aims = ["c", "v", ".", chance.choice("cv.")][:KILLS]
    chance.shuffle(aims)
    hit = []
    for aim in aims:
        child = Training(corpus_folder, profile, tmp_path)
        child.wait_for("c." * chance.randint(1, 2))  # a checkpoint of its own first, so that each resume is seen
        if aim != ".":
            child.wait_for(aim)
        time.sleep(chance.random() * {"c": 0.006, "v": 0.02, ".": 0.03}[aim])
        status, _, last = child.end(signal.SIGKILL)
        assert status == -signal.SIGKILL
        hit.append(last)
        state = Checkpoint.load(Run(tmp_path).checkpoint)
        assert equal(state, states[state.progress["update"]])
    assert Training(corpus_folder, profile, tmp_path).end(0)[0] == 0
    assert_whole(tmp_path, states, rows)
    counts = ", ".join(f"{hit.count(letter)} in a {name}" for letter, name in PHASES.items())
    print(f"\n{optimizer} {precision}: {len(hit)} kills ({counts}), every state and the end bit for bit the same")


def test_ctrl_c_breaks_in_at_once_and_names_the_checkpoint_from_which_a_resumed_run_ends_the_same(
    reference, corpus_folder, tmp_path
):
    profile, _, states, rows = reference("adamw", "bf16")
    child = Training(corpus_folder, profile, tmp_path)
    child.wait_for("c.")
    time.sleep(0.02)
    before = time.perf_counter()
    status, error, _ = child.end(signal.SIGINT)
    assert status == 130
    assert time.perf_counter() - before < 5
    said = re.search(
        r"stopped in update (\d+)\. (\S+) of update (\d+) is kept\. Resume to go on from there\.$", error.strip()
    )
    assert said, error
    run, update = Run(tmp_path), int(said[3])
    assert said[2] == str(run.checkpoint)
    assert LONG.validate_every <= update < int(said[1]) <= LONG.updates
    state = Checkpoint.load(run.checkpoint)
    assert state.progress["update"] == update
    assert equal(state, states[update])
    assert [row["update"] for row in run.read_metrics() if "loss" in row][:update] == list(range(1, update + 1))
    assert Training(corpus_folder, profile, tmp_path).end(0)[0] == 0
    assert_whole(tmp_path, states, rows)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def pressed(function, at: int):
    """The function, whose call number `at` begins with Ctrl-C."""
    calls = []

    def inner(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            press_ctrl_c()
        return function(*arguments, **options)

    return inner


@pytest.mark.parametrize(
    ("where", "name", "call", "update"),
    [
        ("an update", "helpers.training.batch_loss", 7, 7),
        ("a validation", "helpers.training.evaluate", 2, 9),
        ("the writing of the metrics", "helpers.run.Run.append_metrics", 2, 9),
        ("the writing of the checkpoint", "helpers.run.torch.save", 2, 9),
        ("the moment before it takes its place", "helpers.run.os.replace", None, 9),
    ],
)
def test_wherever_ctrl_c_breaks_in_the_resumed_run_ends_as_if_uninterrupted(
    prepared, tmp_path, monkeypatch, where, name, call, update
):
    run, straight, settings = Run(tmp_path / "run"), Run(tmp_path / "straight"), TINY.change(schedule="cosine")
    fit(straight, prepared, settings, CPU, progress_bar=False)
    with monkeypatch.context() as patch:
        function = pkgutil.resolve_name(name)
        if call is None:  # the second time that a checkpoint does: other files take their places in the same way

            def replaced(source, target, *, places=[]):  # noqa: B006, it remembers
                places.append(target)
                if places.count(run.checkpoint) == 2:
                    press_ctrl_c()
                return function(source, target)

            patch.setattr(name, replaced)
        else:
            patch.setattr(name, pressed(function, call))
        with pytest.raises(Interrupted) as raised:
            fit(run, prepared, settings, CPU, progress_bar=False)
    assert str(raised.value) == (
        f"stopped in update {update}. {run.checkpoint} of update 4 is kept. Resume to go on from there."
    )
    assert Checkpoint.load(run.checkpoint).progress["update"] == 4
    assert not list(run.folder.glob(".*.tmp"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fit(run, prepared, settings, CPU, progress_bar=False)
    assert equal(Checkpoint.load(run.checkpoint), Checkpoint.load(straight.checkpoint))
    assert timeless(run) == timeless(straight)


def test_ctrl_c_before_the_first_validation_says_that_there_is_no_checkpoint_yet(prepared, tmp_path, monkeypatch):
    run, straight = Run(tmp_path / "run"), Run(tmp_path / "straight")
    fit(straight, prepared, TINY, CPU, progress_bar=False)
    with monkeypatch.context() as patch:
        patch.setattr("helpers.training.batch_loss", pressed(batch_loss, 3))
        with pytest.raises(KeyboardInterrupt, match=r"^stopped in update 3\. No checkpoint was written yet\.$"):
            fit(run, prepared, TINY, CPU, progress_bar=False)
    assert not run.checkpoint.exists()
    with pytest.raises(UserError, match="03_training"):
        load_model(run.checkpoint, CPU)
    fit(run, prepared, TINY, CPU, progress_bar=False)
    assert equal(Checkpoint.load(run.checkpoint), Checkpoint.load(straight.checkpoint))
    assert timeless(run) == timeless(straight)


def test_ctrl_c_in_a_training_that_starts_over_loses_no_former_checkpoint(prepared, tmp_path, monkeypatch):
    run = Run(tmp_path)
    fit(run, prepared, TINY, CPU, progress_bar=False)
    before = run.checkpoint.read_bytes()
    monkeypatch.setattr("helpers.training.batch_loss", pressed(batch_loss, 1))
    with pytest.raises(Interrupted, match=r"stopped in update 1\. No checkpoint was written yet\.$"):
        fit(run, prepared, TINY.change(learning_rate=1e-3), CPU, resume=False, progress_bar=False)
    assert not run.checkpoint.exists()
    assert (tmp_path / "checkpoint.1.pt").read_bytes() == before


@contextlib.contextmanager
def largest_file(size: int):
    """A disk that is full once a file has this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_with_a_word_and_spoils_nothing(reference, corpus_folder, tmp_path, capsys):
    profile, _, states, rows = reference("adamw", "bf16")
    run = Run(tmp_path)
    child = Training(corpus_folder, profile, tmp_path)
    child.wait_for("c.c.")
    child.end(signal.SIGKILL)
    before, at = run.checkpoint.read_bytes(), Checkpoint.load(run.checkpoint).progress["update"]
    command = ["train", "--corpus", str(corpus_folder), "--run", str(tmp_path), "--profile", str(profile), "--resume"]
    room = len(before) * 9 // 10  # two checkpoints of one training may differ by some bytes
    assert run.metrics.stat().st_size < run.data.stat().st_size < room
    for size, file in [
        (room, "checkpoint.pt"),
        (run.data.stat().st_size - 1, "data.pt"),
        (run.metrics.stat().st_size - 1, "data.pt"),
        (0, ".lock"),
    ]:
        with largest_file(size):
            assert main(command) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert f"{file} cannot be written: File too large" in error
        assert run.checkpoint.read_bytes() == before
        assert not list(tmp_path.glob(".*.tmp"))
    assert main(command) == 0
    assert_whole(tmp_path, states, rows)
    assert at < LONG.updates


def test_metrics_that_cannot_be_written_stop_with_a_word(prepared, tmp_path, capsys):
    # capsys, since under make soak stderr may be a log file, which the limit would hold for too
    run = Run(tmp_path)
    fit(run, prepared, TINY, CPU, progress_bar=False)
    limit = run.manifest.stat().st_size + 1  # room for the manifest, not for the metrics
    with largest_file(limit), pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: File too large"):
        fit(run, prepared, TINY.change(updates=100, validate_every=50), CPU, resume=False, progress_bar=False)
    assert Checkpoint.load(run.checkpoint.with_name("checkpoint.1.pt")).progress["update"] == TINY.updates


def stop_in(update: int):
    """A callback that presses Ctrl-C when an update has been made."""
    return lambda row: press_ctrl_c() if row["update"] == update and "loss" in row else None


@pytest.mark.parametrize("fault", ["full disk", "Ctrl-C"])
def test_a_resumed_run_that_fails_while_it_tidies_its_metrics_has_lost_none(
    prepared, tmp_path, monkeypatch, capsys, fault
):
    run, straight = Run(tmp_path / "run"), Run(tmp_path / "straight")
    fit(straight, prepared, TINY, CPU, progress_bar=False)
    with pytest.raises(Interrupted):
        fit(run, prepared, TINY, CPU, stop_in(10), progress_bar=False)
    before = timeless(run)
    assert len(before) == 8 + 2
    if fault == "full disk":
        with largest_file(run.metrics.stat().st_size // 2), pytest.raises(UserError, match=r"metrics\.jsonl"):
            fit(run, prepared, TINY, CPU, progress_bar=False)
    else:
        with monkeypatch.context() as patch:
            patch.setattr("helpers.run.os.fsync", pressed(os.fsync, 1))
            with pytest.raises(KeyboardInterrupt):
                fit(run, prepared, TINY, CPU, progress_bar=False)
    assert timeless(run) == before
    fit(run, prepared, TINY, CPU, progress_bar=False)
    assert timeless(run) == timeless(straight)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder_is_named(prepared, tmp_path):
    tmp_path.chmod(0o500)
    run = Run(tmp_path)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        fit(run, prepared, TINY, CPU, progress_bar=False)


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_does_not_block_it(
    reference, corpus_folder, tmp_path, capsys
):
    profile = reference("adamw", "bf16")[0]
    child = Training(corpus_folder, profile, tmp_path, "--set", "updates=100000")
    child.wait_for("c.")
    before = Run(tmp_path).data.stat().st_mtime_ns
    assert main(["train", "--corpus", str(corpus_folder), "--run", str(tmp_path), "--resume"]) == 1
    assert f"in use by process {child.process.pid} on " in capsys.readouterr().err
    assert Run(tmp_path).data.stat().st_mtime_ns == before
    child.end(signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    with Run(tmp_path).locked(), Run(tmp_path).locked():  # free again; and the same process may enter twice
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_another_number_of_threads_is_recorded_and_said(prepared, tmp_path, capsys):
    run = Run(tmp_path)
    with pytest.raises(Interrupted):
        fit(run, prepared, TINY, CPU, stop_in(5), progress_bar=False)
    assert "instead of" not in capsys.readouterr().err
    torch.set_num_threads(2)
    try:
        fit(run, prepared, TINY, CPU, progress_bar=False)
    finally:
        torch.set_num_threads(1)
    assert "resumed with threads 2 instead of 1" in capsys.readouterr().err
    manifest = json.loads(run.manifest.read_text())
    assert [(entry["from_update"], entry["threads"]) for entry in manifest["trained_with"]] == [(0, 1), (4, 2)]


@pytest.mark.parametrize("damage", ["not JSON", "[1]", "\udcff"])
def test_a_manifest_that_is_none_is_named(tmp_path, damage):
    run = Run(tmp_path)
    run.manifest.write_text(damage, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read .* Delete it"):
        run.record(a=1)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_gone_wrong_are_found_at_their_step(prepared, tmp_path, monkeypatch, where):
    run, straight = Run(tmp_path / "run"), Run(tmp_path / "straight")
    fit(straight, prepared, TINY, CPU, progress_bar=False)
    calls = []

    def poisoned(model, batch, teacher_forcing=True):
        total, tokens = batch_loss(model, batch, teacher_forcing)
        calls.append(1)
        if len(calls) == 7:
            if where == "loss":
                total = total * float("inf")
            else:
                total.register_hook(lambda gradient: gradient * float("nan"))
        return total, tokens

    with monkeypatch.context() as patch:
        patch.setattr("helpers.training.batch_loss", poisoned)
        with pytest.raises(NotFiniteError) as raised:
            fit(run, prepared, TINY, CPU, progress_bar=False)
    told = re.fullmatch(
        r"Update 7: the loss is (\S+) and the gradient norm nan, on examples \[([\d, ]+)\] …\.? "
        r"The last batch begins with ['\"](.*)['\"]\. (\S+) of update 4 is kept\. "
        r"In another run, try a lower learning_rate, clip=1, or precision=fp32\.",
        str(raised.value),
    )
    assert told, str(raised.value)
    assert math.isfinite(float(told[1])) == (where == "gradient")
    examples = [int(number) for number in told[2].split(",")]
    assert len(examples) == 8
    first = prepared.splits["train"].queries[examples[0]].tolist()
    assert told[3] == " ".join(prepared.vocabulary.decode(first))
    assert told[4] == str(run.checkpoint)
    assert Checkpoint.load(run.checkpoint).progress["update"] == 4
    assert [row["update"] for row in run.read_metrics() if "loss" in row] == [1, 2, 3, 4, 5, 6]
    fit(run, prepared, TINY, CPU, progress_bar=False)  # what is kept is good
    assert equal(Checkpoint.load(run.checkpoint), Checkpoint.load(straight.checkpoint))
    assert timeless(run) == timeless(straight)


def test_a_validation_loss_that_is_not_finite_does_not_reach_the_checkpoint(prepared, tmp_path, monkeypatch):
    run = Run(tmp_path)
    losses = iter([4.0, float("nan")])
    monkeypatch.setattr("helpers.training.evaluate", lambda *_: Likelihood(next(losses), 1, 1))
    kept = r"checkpoint\.pt of update 4 is kept\. In another run, try a lower learning_rate"
    with pytest.raises(NotFiniteError, match=rf"^The validation loss after update 8 is nan\. .*{kept}"):
        fit(run, prepared, TINY, CPU, progress_bar=False)
    assert Checkpoint.load(run.checkpoint).progress["update"] == 4
