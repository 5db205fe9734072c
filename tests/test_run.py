import json
import os

import pytest
import torch

from helpers.run import ROOT, Run, atomic_write, choose_device, digest, machine, shown, training_digest
from helpers.settings import Settings, UserError


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp", ".hidden"])
def test_a_runs_name_cannot_leave_the_runs_folder(name):
    with pytest.raises(UserError, match="plain word"):
        Run.named(name)


def test_runs_lie_in_the_project_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("CHATBOT_RUNS", raising=False)
    assert Run.named("sample").folder == ROOT / "runs" / "sample"
    assert shown(Run.named("sample").data) == "runs/sample/data.pt"
    monkeypatch.setenv("CHATBOT_RUNS", str(tmp_path))
    assert Run.named("sample").folder == tmp_path / "sample"
    assert shown(Run.named("sample").data) == "runs/sample/data.pt"


def test_the_manifest_gathers_facts(tmp_path):
    run = Run(tmp_path)
    run.record(corpus="sample")
    run.record(updates=3)
    manifest = json.loads(run.manifest.read_text())
    assert (manifest["corpus"], manifest["updates"], manifest["torch"]) == ("sample", 3, torch.__version__)
    assert {"python", "processor", "threads", "time"} <= set(machine())


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_lock_removes_what_dead_processes_left_half_written(tmp_path):
    left, written = tmp_path / ".data.pt.99999999.tmp", tmp_path / f".data.pt.{os.getpid()}.tmp"
    for path in (left, written):
        path.write_text("half")
    with Run(tmp_path).locked():
        assert (left.exists(), written.exists()) == (False, True)


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("tpu7", "meta"):
        with pytest.raises(UserError, match=name):
            choose_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no such CUDA device"):
            choose_device("cuda")


def test_digests_tell_inputs_apart():
    assert digest("ab", "c") != digest("a", "bc")
    assert training_digest(Settings(), "x") == training_digest(Settings(), "x")
    assert (
        training_digest(Settings(), "x") != training_digest(Settings(seed=2), "x") != training_digest(Settings(), "y")
    )
