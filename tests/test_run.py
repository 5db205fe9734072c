import contextlib
import inspect
import json
import signal
import subprocess
import sys

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from benchmarks.results import result_path
from helpers.plots import show
from helpers.run import (
    ROOT,
    Run,
    atomic_write,
    choose_device,
    digest,
    display_path,
    machine,
    require,
)
from helpers.settings import UserError


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp", ".hidden"])
def test_a_runs_name_cannot_leave_the_runs_folder(name):
    with pytest.raises(UserError, match="plain word"):
        Run.named(name)


def test_runs_lie_in_the_project_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("CHATBOT_RUNS", raising=False)
    assert Run.named("sample").folder == ROOT / "runs" / "sample"
    assert display_path(Run.named("sample").data) == "runs/sample/data.pt"
    monkeypatch.setenv("CHATBOT_RUNS", str(tmp_path))
    assert Run.named("sample").folder == tmp_path / "sample"
    assert display_path(Run.named("sample").data) == "runs/sample/data.pt"


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


WRITER = """
import os, pathlib, sys
from helpers.run import atomic_write
path = pathlib.Path(sys.argv[1])
"""


def writer(path, program):
    """Another process that writes the file."""
    return subprocess.Popen([sys.executable, "-c", WRITER + program, str(path)], cwd=ROOT)


def test_what_a_killed_process_left_half_written_is_gone_with_the_next_run(tmp_path):
    run = Run(tmp_path)
    run.data.write_bytes(b"old")
    program = "with atomic_write(path) as file: file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    assert writer(run.data, program).wait() == -signal.SIGKILL
    assert run.data.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2  # the half is there
    with run.locked(), atomic_write(run.data) as file:
        file.write(b"new")
    assert run.data.read_bytes() == b"new"
    assert {path.name for path in tmp_path.iterdir()} == {"data.pt", ".lock"}


def test_of_two_processes_that_write_one_file_at_once_each_ends_well_and_the_file_is_always_whole(tmp_path):
    path = tmp_path / "data.pt"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"of the ")
        other = writer(path, "with atomic_write(path) as file: file.write(b'of the other')")
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may also wait for its turn
            other.wait(20)
        file.write(b"one")
        file.flush()
        assert path.read_bytes() in (b"old", b"of the other")
    assert other.wait(20) == 0
    assert path.read_bytes() in (b"of the one", b"of the other")
    assert list(tmp_path.iterdir()) == [path]


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
    assert digest("ab", "c") == digest("ab", "c")


def test_a_file_that_is_missing_is_named_with_what_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"data\.pt is missing: notebook 01 makes it"):
        require(tmp_path / "data.pt", "notebook 01")
    (tmp_path / "data.pt").touch()
    require(tmp_path / "data.pt", "notebook 01")


def test_a_notebook_is_shown_the_very_code_that_runs(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    show(atomic_write, Run)
    for thing, markdown in zip((atomic_write, Run), shown, strict=True):
        assert markdown.data == f"```python\n{inspect.getsource(thing).rstrip()}\n```"


def test_an_error_shows_a_notebook_its_sentence_and_not_the_way_to_it(capsys):
    shell = InteractiveShell.instance()
    shell.run_cell("from helpers.settings import load_profile; load_profile('nonesuch')")
    told = capsys.readouterr().out.strip()
    assert told.startswith("UserError: There is no profile 'nonesuch'")
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("device", "name", "file"),
    [
        ("cpu", "AMD EPYC 9B14", "bench-cpu-amd.json"),
        ("cpu", "Intel(R) Xeon(R) Processor", "bench-cpu-intel.json"),
        ("cpu", "", "bench-cpu-other.json"),
        ("cuda", "NVIDIA H100 80GB HBM3", "bench-cuda.json"),
    ],
)
def test_figures_are_kept_by_the_machine_that_gave_them(device, name, file):
    assert result_path("bench", {"device": device, "name": name}) == ROOT / "results" / file
