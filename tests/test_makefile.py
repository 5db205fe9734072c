"""What make runs again and what it leaves alone; notebooks are copied instead of executed, so this takes no time."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from helpers.run import ROOT

STUB = f"""#!/bin/sh
case "$1" in
*run_notebook.py)
    case "$2" in *"$FAIL"*) echo "error: $2 failed" >&2; exit 1;; esac
    mkdir -p "$(dirname "$3")" && cp "$2" "$3";;
*) exec {sys.executable} "$@";;
esac
"""


@pytest.fixture
def make(tmp_path):
    """A function that calls make in a copy of the project and returns which notebooks it ran (two letters)."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("helpers", "notebooks", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def call(*arguments: str, goal: str = "run-all", fail: str = "no such notebook", status: int = 0) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            ["make", goal, "VENV=", f"PYTHON={stub}", *arguments],
            cwd=tmp_path, env=environment | {"FAIL": fail}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status or (status and done.returncode), done.stderr
        return [line.split()[1][:2] for line in done.stdout.splitlines() if line.startswith("running ")]

    call.folder = tmp_path
    return call


def test_gpu_measures_with_what_the_machine_has_and_keeps_what_was_measured(make):
    """Without an environment of its own: packages named in PYTHONPATH stay, and a stage that fails costs no other."""
    (make.folder / "results").mkdir()
    stub = make.folder / "measure"
    stub.write_text("""#!/bin/sh
echo "$PYTHONPATH $@" > told
mkdir -p "${10}" && echo "{}" > "${10}/bench-cuda.json"
exit 1
""")
    stub.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "gpu", "VENV=", f"PYTHON={stub}", "BUDGET=30"],
        cwd=make.folder, env=environment | {"PYTHONPATH": "/some where:/else"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode
    expected = "-m benchmarks.gpu --device cuda --corpus sample --budget 30 --out runs/gpu"
    assert (make.folder / "told").read_text().strip() == f"{make.folder}/:/some where:/else {expected}"
    assert (make.folder / "results" / "bench-cuda.json").is_file()


ALL = ["01", "02", "03", "04", "05", "06", "07"]


def test_a_second_run_runs_nothing_again(make):
    assert make() == ALL
    assert make() == []


def test_a_touched_notebook_is_run_again_with_those_after_it(make):
    make()
    os.utime(make.folder / "notebooks" / "04_decoding_and_chat.ipynb")
    assert make() == ALL[3:]


def test_other_settings_never_find_an_old_run_current(make):
    make()
    assert make("PARAMS=-p overrides updates=10") == ALL
    assert make("PARAMS=-p overrides updates=10") == []
    assert make("PROFILE=classic") == ALL
    assert make("RUN=other") == ALL
    assert make("RUN=other") == []


def test_a_run_and_a_profile_are_named_by_the_corpus(make):
    assert make(f"CORPUS={make.folder}/some/corpus.zip") == ALL
    assert (make.folder / "runs" / "corpus" / "notebooks" / "07_torchscript_and_latency.ipynb").is_file()
    assert "profile=cornell" in (make.folder / "runs" / "corpus" / ".settings").read_text()


def test_a_failing_notebook_ends_the_run_and_is_run_again(make):
    assert make(fail="03_", status=2) == ALL[:3]
    assert make() == ALL[2:]


def test_outputs_are_kept_without_times_and_paths(make):
    for path in make.folder.glob("notebooks/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["papermill"] = {"output_path": str(path)}
        nbformat.write(notebook, path)
    assert make(goal="outputs") == [*ALL, "so"]
    for path in make.folder.glob("notebooks/*.ipynb"):
        assert str(make.folder) not in path.read_text(encoding="utf-8")
    assert make(goal="outputs") == []
