"""What make promises: what runs again and what does not, whose settings count, and whose environment.

A copy of the project, in a folder with blanks and umlauts, in which notebooks are copied instead of executed.
"""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from helpers.run import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import environment
import series

STUB = """
import json, os, pathlib, shutil, sys
source, target = map(pathlib.Path, sys.argv[1:3])
with open(os.environ["TOLD"], "a") as told:
    told.write(json.dumps([source.name[:2], sys.executable, sys.argv[3:]]) + "\\n")
if os.environ["FAIL"] in source.name:
    sys.exit(f"{source.name} failed")
target.parent.mkdir(parents=True, exist_ok=True)
shutil.copy(source, target)
for product in ("data.pt", "checkpoint.pt", "scripted.pt"):
    (target.parents[1] / product).touch()
"""
ALL = ["01", "02", "03", "04", "05", "06", "07", "08"]


def clean(**more: str) -> dict[str, str]:
    """The environment without what a make that runs the tests has set."""
    names = {*environment.VARIABLES, "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CHATBOT_RUNS"}
    return {name: value for name, value in os.environ.items() if name not in names} | more


@pytest.fixture
def project(tmp_path):
    """The project's copy."""
    folder = tmp_path / "mein schönes  Projekt"
    for name in ("helpers", "notebooks", "tools", "benchmarks", "corpora"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [ROOT / "Makefile", *ROOT.glob("*.txt"), *ROOT.glob("*.in")]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def make(project, tmp_path):
    """A function that calls make there and returns which notebooks ran (two letters), by default one at a time."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    (project / "tools" / "run_notebook.py").write_text(STUB)
    told = tmp_path / "told"

    def call(*arguments: str, goal="run-all", fail="none", status=0, cwd: Path = project, jobs=("-j1",), **env):
        told.write_text("")
        done = subprocess.run(
            ["make", goal, "VENV=", f"PYTHON={sys.executable}", *jobs, *arguments], capture_output=True, text=True,
            cwd=cwd, env=clean(FAIL=fail, TOLD=str(told), **env), check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        call.said, call.calls = done.stderr, [json.loads(line) for line in told.read_text().splitlines()]
        return [number for number, *_ in call.calls]

    call.folder, call.runs = project, project / "runs"
    return call


def settings(make, run: str) -> dict:
    return json.loads((make.runs / run / "series.json").read_text())["settings"]


def refused(make, *arguments: str, goal: str = "run-all") -> str:
    """The one sentence with which make refuses."""
    assert make(*arguments, goal=goal, status=2) == []
    sentence, *rest = [line for line in make.said.splitlines() if not line.startswith("make: ")]
    assert sentence.startswith("error: "), make.said
    assert rest == []
    return sentence


def test_a_second_run_runs_nothing_again_and_takes_no_time(make):
    assert make() == ALL
    started = time.perf_counter()
    assert make() == []
    assert time.perf_counter() - started < 2


def test_the_time_of_a_file_and_the_outputs_of_a_notebook_make_nothing_stale(make):
    make()
    for path in make.folder.glob("*/*.*"):
        os.utime(path)
    path = make.folder / "notebooks" / "03_training.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(notebook, path)
    assert make() == []


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("notebooks/03_training.ipynb", ["03", "04", "06", "07", "08"]),
        ("notebooks/04_decoding_and_chat.ipynb", ["04"]),
        ("helpers/text.py", ALL),
        ("notebooks/profiles/sample.yaml", ALL),
        ("corpora/sample/movie_lines.txt", ALL),
        ("benchmarks/textbook.py", ALL),  # which the exercises import
    ],
)
def test_what_has_other_contents_is_run_again_with_all_that_needs_it(make, changed, again):
    make()
    path = make.folder / changed
    cell = '"cells": [{"cell_type": "raw", "source": [], "metadata": {}},'
    text = path.read_text()
    path.write_text(text.replace('"cells": [', cell, 1) if path.suffix == ".ipynb" else text + "\n")
    assert make() == again
    assert make() == []


def test_a_corpus_and_a_profile_changed_in_place_are_seen(make, tmp_path):
    corpus, profile = tmp_path / "talk.tsv", tmp_path / "own.yaml"
    corpus.write_text("a\tb\n")
    profile.write_text("updates: 1\n")
    assert make(f"CORPUS={corpus}", f"PROFILE={profile}") == ALL
    assert make("RUN=talk") == []
    for file in (corpus, profile):
        file.write_text(file.read_text() + "\n")
        assert make("RUN=talk") == ALL
    corpus.unlink()
    assert "is not there any more" in refused(make, "RUN=talk")


def test_what_a_run_has_lost_is_made_again(make):
    make()
    (make.runs / "sample" / "checkpoint.pt").unlink()
    assert make() == ["03"]
    shutil.rmtree(make.runs / "sample" / "notebooks")
    assert make() == ALL


def test_a_run_remembers_its_settings_and_refuses_others(make, tmp_path):
    (tmp_path / "talk.tsv").write_text("a\tb\n")
    mine = [f"CORPUS={tmp_path}/talk.tsv", "PARAMS=-p overrides 'updates=10 seed=2'", "DEVICE=cpu"]
    assert make("RUN=mine", *mine) == ALL
    assert make("RUN=mine") == make("RUN=mine", *mine) == []
    # Pages need the solutions too: these run with the settings of the run, not with today's.
    (make.folder / "tools" / "make_pages.py").write_text("")
    assert make("RUN=mine", goal="html") == ["so"]
    _, _, words = make.calls[0]
    assert words == ["-p", "run", "mine", "-p", "corpus", f"{tmp_path}/talk.tsv", "-p", "profile", "auto",
                     "-p", "device", "cpu", "-p", "overrides", "updates=10 seed=2"]  # fmt: skip
    for other in ("CORPUS=sample", "PROFILE=classic", "DEVICE=cuda", "PARAMS=-p overrides updates=10"):
        name, _, value = other.partition("=")
        for goal in ("run-all", "html", "images", "check", "outputs"):
            sentence = refused(make, "RUN=mine", other, goal=goal)
            assert f"{name}={settings(make, 'mine')[name.lower()]}," in sentence
            assert value in sentence
            assert "FRESH=1" in sentence


def test_fresh_starts_over_and_keeps_the_checkpoint(make):
    make()
    (make.runs / "sample" / "checkpoint.pt").write_text("hours of work")
    assert make("PROFILE=classic", "FRESH=1") == ALL
    assert (make.runs / "sample" / "checkpoint.1.pt").read_text() == "hours of work"
    assert settings(make, "sample")["profile"] == "classic"
    assert make("FRESH=1") == ALL
    assert (make.runs / "sample" / "checkpoint.2.pt").is_file()
    assert settings(make, "sample")["profile"] == "auto"


def test_a_training_of_the_command_line_is_not_overwritten(make):
    (make.runs / "mine").mkdir(parents=True)
    (make.runs / "mine" / "checkpoint.pt").touch()
    assert "was not trained by make" in refused(make, "RUN=mine", goal="html")
    assert make("RUN=mine", "DEVICE=cpu", goal="latency") == ["07"]  # which measures it as it is


def test_measuring_takes_the_run_s_settings_and_a_device_of_its_own(make):
    make("PROFILE=classic", "DEVICE=cpu")
    assert make("DEVICE=cuda", goal="profile") == ["06"]
    _, _, words = make.calls[0]
    assert words[-9:] == ["-p", "profile", "classic", "-p", "device", "cuda", "-p", "full", "true"]
    assert "PROFILE=classic" in refused(make, "PROFILE=cornell", goal="profile")
    assert make() == ["06"]  # the copy of a run is that of its own settings again


@pytest.mark.parametrize("name", ["cornell movie-dialogs corpus", "my sample", "it's #1 (50%)", "größe.v1"])
def test_a_corpus_of_any_name_makes_a_run_of_that_name(make, tmp_path, name):
    (tmp_path / name).mkdir()
    assert make(f"CORPUS={tmp_path / name}/") == ALL
    assert {"name": name, "profile": "auto"} == {
        "name": next(path.name for path in make.runs.iterdir() if (path / "series.json").exists()),
        "profile": settings(make, name)["profile"],
    }
    assert (make.runs / name / "notebooks" / "07_torchscript_and_latency.ipynb").is_file()
    assert sorted(path.name for path in make.folder.iterdir() if path.is_dir()) == [
        "benchmarks", "corpora", "helpers", "notebooks", "runs", "tools",
    ]  # fmt: skip
    assert make(f"RUN={name}") == []


def test_a_dollar_in_a_value_stays_a_dollar(make, tmp_path):
    (tmp_path / "a$b.tsv").write_text("a\tb\n")
    assert make(f"CORPUS={tmp_path}/a$b.tsv") == ALL
    assert settings(make, "a$b")["corpus"] == f"{tmp_path}/a$b.tsv"


@pytest.mark.parametrize("ending", [".zip", ".tsv", ".jsonl", ".csv.gz"])
def test_a_file_s_ending_is_not_part_of_its_run_s_name(make, tmp_path, ending):
    (tmp_path / f"talk{ending}").touch()
    make(f"CORPUS={tmp_path}/talk{ending}")
    assert (make.runs / "talk").is_dir()


def test_paths_count_from_where_make_was_called(make, tmp_path):
    (tmp_path / "rel.tsv").write_text("a\tb\n")
    for flags in (["-s"], []):
        make("-C", str(make.folder), *flags, "CORPUS=rel.tsv", cwd=tmp_path, PWD=str(tmp_path))
        assert settings(make, "rel")["corpus"] == str(tmp_path / "rel.tsv")
    (make.runs / "sweep").mkdir()
    (make.runs / "sweep" / "best.yaml").write_text("updates: 1\n")  # as `make sweep-best` names it
    make("RUN=best", "PROFILE=runs/sweep/best.yaml")
    assert settings(make, "best")["profile"] == str(make.runs / "sweep" / "best.yaml")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["CORPUS=nonesuch.zip"], "CORPUS=nonesuch.zip: there is no such file"),
        (["PROFILE=nonesuch"], "the names known are auto, classic, cornell"),
        (["RUN=-x"], "RUN=-x must be one plain word"),
        (["RUN=../x"], "RUN=../x must be one plain word"),
        (["PARAMS=seed 1"], "expected"),
        (["PARAMS=-p seed '1"], "PARAMS"),
        ([b"CORPUS=caf\xe9.tsv"], "no text"),
        (["goal=sweep-best", "SWEEP="], "SWEEP=id"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(make, arguments, word):
    goal = "sweep-best" if arguments[0] == "goal=sweep-best" else "run-all"
    assert word in refused(make, *arguments, goal=goal)


def test_a_failing_notebook_ends_the_run_and_is_run_again(make):
    assert make(fail="03_", status=2) == ALL[:3]
    assert make() == ALL[2:]


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ("", 2),
        ("-j1", 1),
        ("-j4 --jobserver-auth=3,4", 4),
        ("s -j2 -- CORPUS=a\\ -j9", 2),
        ("w", 2),
        (" --jobserver-fds=3,4 -j", 6),
    ],
)
def test_j_counts_as_far_as_cores_and_memory_go(flags, most, monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", flags)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(Path, "read_text", lambda _: "MemAvailable: 99000000 kB")
    assert series.jobs(usual=2) == most
    monkeypatch.setattr(Path, "read_text", lambda _: "MemAvailable: 5000000 kB")
    assert series.jobs(usual=2) == min(most, 2)
    monkeypatch.setattr(Path, "exists", lambda _: False)  # nor does every system tell its memory
    assert series.jobs(usual=2) == most


@pytest.mark.parametrize("flags", [(), ("-j4",)])
def test_notebooks_side_by_side_wait_for_what_they_need(flags, make, tmp_path):
    stub = make.folder / "tools" / "run_notebook.py"
    times = f"open({str(tmp_path / 'times')!r}, 'a').write(f'{{source.name[:2]}} {{{{}}}}\\n'.format(time.time()))"
    stub.write_text(f"import time\n{STUB}\ntime.sleep(0.3)\n{times}\n".replace("\nif os", f"\n{times}\nif os"))
    assert sorted(make(jobs=flags)) == ALL
    begun, ended = {}, {}
    for line in (tmp_path / "times").read_text().splitlines():
        name, when = line.split()
        (ended if name in begun else begun)[name] = float(when)
    for name, (needs, _) in series.NOTEBOOKS.items():
        assert name == "solutions" or all(ended[need[:2]] <= begun[name[:2]] for need in needs)
    if len(os.sched_getaffinity(0)) > 1:
        assert begun["03"] < ended["02"]  # both need nothing but 01


def test_outputs_are_kept_without_times_and_paths(make):
    for path in make.folder.glob("notebooks/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["papermill"] = {"output_path": str(path)}
        nbformat.write(notebook, path)
    assert make(goal="outputs") == [*ALL, "so"]
    for path in make.folder.glob("notebooks/*.ipynb"):
        assert str(make.folder) not in path.read_text(encoding="utf-8")
    assert make(goal="outputs") == []


def test_gpu_measures_with_what_the_machine_has_and_keeps_what_was_measured(make, tmp_path):
    """Without an environment of its own: packages named in PYTHONPATH stay, and a stage that fails costs no other."""
    (make.folder / "results").mkdir()
    (make.folder / "benchmarks" / "gpu.py").write_text("""
import json, os, pathlib, sys
pathlib.Path("told").write_text(json.dumps([sys.executable, os.environ["PYTHONPATH"], sys.argv[1:]]))
out = pathlib.Path(sys.argv[-1]); out.mkdir(parents=True); (out / "bench-cuda.json").write_text("{}")
sys.exit(1)
""")
    make("BUDGET=30", goal="gpu", status=2, PYTHONPATH="/some where:/else")
    python, path, options = json.loads((make.folder / "told").read_text())
    assert python == sys.executable
    assert path == f"{make.folder}:/some where:/else"
    assert options == ["--device", "cuda", "--corpus", "sample", "--budget", "30", "--out", "runs/gpu"]
    assert (make.folder / "results" / "bench-cuda.json").is_file()


def test_lint_reads_nothing_that_a_run_has_left_in_a_checkout_without_git(make):
    shutil.copy(ROOT / "pyproject.toml", make.folder)
    for folder in ("runs/sample", "data"):
        (make.folder / folder).mkdir(parents=True)
        (make.folder / folder / "left.py").write_text("import os, sys")
    shutil.copy(ROOT / "tools" / "run_notebook.py", make.folder / "tools")
    make(goal="lint")


def test_lab_serves_the_root_and_opens_notebook_01(make):
    (make.folder / "jupyterlab").mkdir()
    (make.folder / "jupyterlab" / "__init__.py").touch()
    (make.folder / "jupyterlab" / "__main__.py").write_text(
        "import sys; open('told', 'w').write('|'.join(sys.argv[1:]))"
    )
    make("LABFLAGS=--allow-root --ServerApp.password='a b'", goal="lab")
    root, start, *flags = (make.folder / "told").read_text().split("|")
    assert root == f"--ServerApp.root_dir={make.folder}"
    assert (make.folder / start.partition("/lab/tree/")[2]).is_file()
    assert flags == ["--allow-root", "--ServerApp.password=a b"]


# The environment


def test_an_old_python_is_named_in_one_sentence():
    program = (
        "import fcntl, hashlib, json, runpy, shlex, shutil, subprocess, sys, tempfile; sys.version_info = (3, 9, 2)"
    )
    program += "; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", program, str(ROOT / "tools" / "environment.py"), "help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "needs Python 3.11 or newer" in done.stderr
    for name in ("series.py", "environment.py"):  # both can be read by it, so that it comes to say so
        ast.parse((ROOT / "tools" / name).read_text(), feature_version=(3, 8))


def test_nothing_of_the_user_s_own_python_reaches_a_notebook(project, tmp_path):
    """Another `helpers`, another kernel of the name python3, another backend: a run is what it is without them."""
    foreign = tmp_path / "foreign"
    (foreign / "kernels" / "python3").mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"], "display_name": "mine", "language": "python"}
    (foreign / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel))
    (foreign / "helpers.py").write_text("raise SystemExit('not these')")
    (foreign / "matplotlibrc").write_text("text.usetex: True\n")
    code = """
import os, sys, helpers.text, matplotlib.pyplot as plt
assert __debug__ and not plt.rcParams["text.usetex"]
[sys.executable, helpers.text.__file__, plt.get_backend(), os.environ["OMP_WAIT_POLICY"]]
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(notebook, project / "notebooks" / "06_profiling.ipynb")
    mine = {"PYTHONPATH": str(foreign), "JUPYTER_PATH": str(foreign), "MATPLOTLIBRC": str(foreign),
            "MPLBACKEND": "agg", "PYTHONOPTIMIZE": "1", "IPYTHONDIR": str(foreign)}  # fmt: skip
    command = [sys.executable, "-E", project / "tools" / "series.py", "profile"]
    done = subprocess.run(command, env=clean(**mine, VENV=""), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(project / "runs" / "sample" / "notebooks" / "06_profiling.ipynb", as_version=4)
    python, file, backend, policy = ast.literal_eval(executed.cells[-1].outputs[-1].data["text/plain"])
    assert (python, file) == (sys.executable, str(project / "helpers" / "text.py"))
    assert "inline" in backend
    assert policy == "PASSIVE"


def test_pip_hears_of_sources_and_of_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "RUNS", tmp_path)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name in ("USER", "TARGET", "PREFIX", "NO_DEPS", "INDEX_URL", "FIND_LINKS", "NO_INDEX", "CACHE_DIR"):
        monkeypatch.setenv(f"PIP_{name}", "1")
    kept = {name for name in environment.surroundings("python") if name.startswith("PIP_")}
    assert kept == {"PIP_USER", "PIP_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CACHE_DIR"}
    assert environment.surroundings("python")["PIP_USER"] == "0"


def test_an_environment_is_made_mended_moved_and_made_anew(project, tmp_path):
    """With no package to install, since that takes minutes."""
    for name in ("requirements.in", "requirements.txt", "constraints.txt"):
        (project / name).write_text("")
    (project / "tools" / "make_pages.py").write_text("")

    def python(folder: Path, **env: str) -> str:
        program = "import environment; print(environment.interpreter())"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                              cwd=folder / "tools", env=clean(**env))  # fmt: skip
        return (done.stdout + done.stderr).splitlines()[-1]

    def imported(folder: Path) -> str:
        command = [folder / ".venv" / "bin" / "python", "-c", "import helpers; print(helpers.__file__)"]
        env = {name: value for name, value in clean().items() if name != "PYTHONPATH"}
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env=env).stdout.strip()

    venv = project / ".venv"
    (venv / "bin").mkdir(parents=True)  # half of one, which an older Python has left
    (venv / "lib" / "python3.9" / "site-packages").mkdir(parents=True)
    assert python(project) == str(venv / "bin" / "python")
    assert not (venv / "lib" / "python3.9").exists()
    assert imported(project) == str(project / "helpers" / "__init__.py")
    copy = tmp_path / "copy"
    shutil.copytree(project, copy, symlinks=True)
    assert python(copy) == str(copy / ".venv" / "bin" / "python")
    assert imported(copy) == str(copy / "helpers" / "__init__.py")
    assert not [path for path in (copy / ".venv" / "bin").iterdir() if str(project).encode() in path.read_bytes()]
    (copy / ".venv" / "bin" / "python").unlink()  # as after an upgrade of the system's Python
    assert python(copy) == str(copy / ".venv" / "bin" / "python")
    assert imported(copy)
    own = tmp_path / "somebody's"
    (own / "bin").mkdir(parents=True)
    assert "make did not make it" in python(copy, VENV=str(own))
    assert own.is_dir()


# One notebook


@pytest.fixture
def sleeping(project):
    """A series whose notebook 06 waits in its third cell."""
    cells = [nbformat.v4.new_markdown_cell("wait"), nbformat.v4.new_code_cell("import os, time"),
             nbformat.v4.new_code_cell("open('pid', 'w').write(str(os.getpid())); time.sleep(60)")]  # fmt: skip
    nbformat.write(nbformat.v4.new_notebook(cells=cells), project / "notebooks" / "06_profiling.ipynb")
    return project


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_one_sentence_and_no_kernel_goes_on(sleeping, number):
    command = [sys.executable, sleeping / "tools" / "series.py", "profile"]
    process = subprocess.Popen(command, env=clean(VENV=""), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid, deadline = sleeping / "notebooks" / "pid", time.time() + 60
    while not (pid.is_file() and pid.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines() == ["06_profiling.ipynb stopped in cell 3; the next run begins it again"]
    time.sleep(0.2)
    kernel = Path("/proc", pid.read_text(), "stat")
    assert not kernel.exists() or kernel.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_full_disk_is_one_sentence_with_notebook_and_cell(sleeping):
    """A limit on the size of files fails as a full disk does, in the midst of writing."""
    notebook = nbformat.read(sleeping / "notebooks" / "06_profiling.ipynb", as_version=4)
    notebook.cells[2].source = "print('x' * 300_000)"
    nbformat.write(notebook, sleeping / "notebooks" / "06_profiling.ipynb")
    command = f"ulimit -f 200; exec '{sys.executable}' '{sleeping}/tools/series.py' profile"
    done = subprocess.run(["bash", "-c", command], env=clean(VENV=""), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "06_profiling.ipynb failed: cell 3" in done.stderr
    assert "too large" in done.stderr
