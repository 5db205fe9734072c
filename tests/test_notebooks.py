"""What readers do to notebooks: the wrong order, twice, without the input, with a restart or Ctrl-C in between."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from helpers.__main__ import main
from helpers.run import ROOT, Run
from helpers.training import Checkpoint, fit
from tests.conftest import CPU, SOAK, TINY
from tests.test_faults import equal, timeless
from tests.test_project import NOTEBOOKS

soak = pytest.mark.skipif(not SOAK, reason="takes minutes: make soak")
# The parts of a run that other notebooks read, and who makes them.
OWNERS = {"data.pt": "01", "checkpoint.pt": "03", "metrics.jsonl": "03", "scripted.pt": "07"}
SHORT = "updates=600 validate_every=200 hidden_size=64 embedding_size=64"
PARAMETERS = {
    "01": {"overrides": SHORT},
    "05": {"trials": 6, "updates": 20},
    "07": {"replies_timed": 10},
    "08": {"school_updates": 60, "corpus_updates": 60},
}
# Each notebook's cells in one plain IPython, up to the first error.
PLAIN = """
import sys, nbformat
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for path in sys.argv[1:]:
    shell.reset()
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            result = shell.run_cell(cell.source)
            if not result.success:
                print("FIRST ERROR", path[-30:], type(result.error_in_exec).__name__, result.error_in_exec)
                break
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    """Runs in a folder of their own; a kernel without the user's IPython and without notes on its transport."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / ".ipython" / "profile_default").mkdir(parents=True)
    (folder / ".ipython" / "profile_default" / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 50\n")
    monkeypatch.setenv("IPYTHONDIR", str(folder / ".ipython"))
    monkeypatch.setenv("CHATBOT_RUNS", str(folder))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("WANDB_SILENT", "true")


class Notebook:
    """A notebook in a kernel, whose cells run in any order and as often as one likes."""

    def __init__(self, cells) -> None:
        self.cells = [cell for cell in cells if cell.cell_type == "code"]
        self.client = NotebookClient(
            nbformat.v4.new_notebook(cells=self.cells), timeout=600, kernel_name="python3",
            resources={"metadata": {"path": str(ROOT / "notebooks")}},
        )  # fmt: skip

    @classmethod
    def numbered(cls, number: str):
        """One of the series, with the parameters that make it short."""
        path = next(path for path in NOTEBOOKS if path.name.startswith(number))
        cells = nbformat.read(path, as_version=4).cells
        tagged = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
        tagged.source += "".join(f"\n{name} = {value!r}" for name, value in PARAMETERS.get(number, {}).items())
        return cls(cells)

    @contextlib.contextmanager
    def kernel(self):
        with self.client.setup_kernel():
            yield self

    def run(self, cells=None) -> list[str]:
        """The errors of the cells (numbers, all by default), each of which runs whatever the one before did."""
        errors = []
        for number in range(len(self.cells)) if cells is None else cells:
            try:
                self.client.execute_cell(self.cells[number], number)
            except CellExecutionError as error:
                errors.append(f"{error.ename}: {error.evalue}")
        return errors

    def text(self, number: int) -> str:
        return "".join(output.get("text", "") for output in self.cells[number].outputs)


def contents(run: Run) -> dict[str, str]:
    return {name: hashlib.sha256((run.folder / name).read_bytes()).hexdigest() for name in OWNERS
            if (run.folder / name).exists()}  # fmt: skip


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if before[name] != after.get(name)}


def test_every_notebook_without_its_input_says_which_one_makes_it():
    command = [sys.executable, "-c", PLAIN, *map(str, NOTEBOOKS[1:])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "notebooks", check=True)
    said = re.findall("FIRST ERROR (.*)", done.stdout)
    assert len(said) == 7
    assert all("UserError" in line and "01_data_preparation makes it" in line for line in said), said


def test_ctrl_c_in_a_notebook_keeps_what_was_trained_and_the_cell_goes_on_from_there(prepared, tmp_path):
    settings = TINY.change(updates=80, validate_every=8)
    straight, run = Run(tmp_path / "straight"), Run(tmp_path / "run")
    prepared.save(run.data)
    start = f"""
import torch; torch.set_num_threads(1)
from helpers.batches import Prepared
from helpers.run import Run
from helpers.settings import Settings
from helpers.training import fit
run = Run({str(run.folder)!r})
data, settings = Prepared.load(run.data), Settings().change(**{settings.to_dict()!r})
import os; print("kernel", os.getpid())
"""
    train = "fit(run, data, settings, torch.device('cpu'), progress_bar=False);"
    notebook = Notebook([nbformat.v4.new_code_cell(start), nbformat.v4.new_code_cell(train)])

    def press(process: int) -> None:
        while not run.checkpoint.exists():
            time.sleep(0.005)
        time.sleep(0.05)
        os.kill(process, signal.SIGINT)

    with notebook.kernel():
        assert notebook.run([0]) == []
        process = int(re.search(r"kernel (\d+)", notebook.text(0))[1])
        threading.Thread(target=press, args=[process], daemon=True).start()
        errors = notebook.run([1])
        update = Checkpoint.load(run.checkpoint).progress["update"]
        assert len(errors) == 1
        kept = rf"{re.escape(str(run.checkpoint))} of update {update} is kept\. Resume to go on from there\."
        stopped = re.fullmatch(rf"Interrupted: stopped in update (\d+)\. {kept}", errors[0])
        assert stopped, errors
        assert 8 <= update < int(stopped[1]) <= 80
        shown = [output for output in notebook.cells[1].outputs if output.output_type == "error"]
        sentence = errors[0].removeprefix("Interrupted: ")
        assert [output.traceback for output in shown] == [[f"KeyboardInterrupt: {sentence}"]]  # and not the way to it
        assert notebook.run([1]) == []
    fit(straight, prepared, settings, CPU, progress_bar=False)
    assert equal(Checkpoint.load(run.checkpoint), Checkpoint.load(straight.checkpoint))
    assert timeless(run) == timeless(straight)


def test_a_wandb_key_stays_out_of_a_notebook_and_of_its_run(prepared, monkeypatch):
    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setitem(PARAMETERS, "03", {"overrides": "updates=4 validate_every=2"})
    run = Run.named("sample")
    prepared.save(run.data)
    notebook = Notebook.numbered("03")
    fits = next(number for number, cell in enumerate(notebook.cells) if "model = training.fit(" in cell.source)
    with notebook.kernel():
        assert notebook.run(range(fits + 1)) == []
    assert run.checkpoint.is_file()
    assert list(run.folder.rglob("*.wandb"))  # it was logged, offline
    assert key not in json.dumps(notebook.client.nb)
    for path in run.folder.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


@soak
def test_notebooks_twice_restarted_and_backwards_spoil_nothing():
    run, times = Run.named("sample"), []
    for path in NOTEBOOKS:
        number, started = path.name[:2], time.perf_counter()
        theirs = {name for name, owner in OWNERS.items() if owner != number}
        before = contents(run)
        notebook = Notebook.numbered(number)
        with notebook.kernel():  # backwards: names are missing, which Python says; nothing else goes wrong
            for error in notebook.run(reversed(range(2, len(notebook.cells)))):
                assert re.match(r"(NameError|UserError): ", error), error
            assert not changed(before, contents(run)) & theirs
        with notebook.kernel():  # a restart half-way
            assert notebook.run(range(len(notebook.cells) // 2)) == []
        with notebook.kernel():
            assert notebook.run() == []
            after = contents(run)
            assert notebook.run() == []  # Run All again
        assert not changed(before, after) & theirs
        assert not changed(before, contents(run)) & theirs
        if number != "07":  # a scripted file holds its own date
            assert after == contents(run)
        times.append(f"{number}: {time.perf_counter() - started:.0f} s")
    print(f"\nnotebooks backwards, half, whole and again: {', '.join(times)}")


@soak
def test_one_seed_gives_the_same_tensors_in_a_notebook_under_papermill_and_from_the_command_line(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "tools"))
    from run_notebook import run as papermill

    states = {}
    for way in ("papermill", "notebook", "command line"):
        monkeypatch.setenv("CHATBOT_RUNS", str(tmp_path / way))
        if way == "papermill":
            assert papermill(NOTEBOOKS[0], tmp_path / "01.ipynb", PARAMETERS["01"], 600) is None
            assert papermill(NOTEBOOKS[2], tmp_path / "03.ipynb", {}, 600) is None
        elif way == "notebook":
            for number in ("01", "03"):
                with Notebook.numbered(number).kernel() as notebook:
                    assert notebook.run() == []
        else:
            command = ["train", "--corpus", "sample", "--profile", "sample", "--set", *SHORT.split()]
            assert main([*command, "--run", str(Run.named("sample").folder)]) == 0
        states[way] = Checkpoint.load(Run.named("sample").checkpoint)
    assert equal(states["papermill"], states["notebook"])
    assert equal(states["papermill"], states["command line"])
    print(f"\n{', '.join(states)}: the same checkpoint, bit for bit")
