"""What `make` does: runs the notebooks that are stale, and calls the other commands.

python tools/series.py TARGET    # its variables (CORPUS, RUN, PROFILE, …) come by the environment, as make passes them

A notebook runs again when something that it is made from holds other text than last time: its cells, the helpers,
corpus, profile, parameters, or a notebook that it needs. A file's time says nothing. Each run keeps its settings and
what it has finished in runs/NAME/series.json.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import (
    ROOT,
    RUNS,
    call,
    contents,
    digest,
    given,
    interpreter,
    locked,
    read_json,
    refuse,
    surroundings,
    write_json,
)

TOOLS = ROOT / "tools"
# Every notebook: those that make what it reads, and what it leaves for others.
NOTEBOOKS = {
    "01_data_preparation": ([], "data.pt"),
    "02_model": (["01_data_preparation"], ""),
    "03_training": (["01_data_preparation"], "checkpoint.pt"),
    "04_decoding_and_chat": (["03_training"], ""),
    "05_hyperparameter_sweep": (["01_data_preparation"], ""),
    "06_profiling": (["03_training"], ""),
    "07_torchscript_and_latency": (["03_training"], "scripted.pt"),
    "08_from_here_to_transformers": (["03_training"], ""),
    "solutions": (["03_training"], ""),
}
NUMBERED = [name for name in NOTEBOOKS if name[0] == "0"]
PROFILES = ["auto", *(path.stem for path in (ROOT / "notebooks" / "profiles").glob("*.yaml"))]
BUSY = "another make is at work on runs/{}; wait for its end."
CORPORA = ["sample", "cornell"]


def located(name: str, known: list[str]) -> str:
    """A known name, or a path, which counts from where make was called, from its folder (-C), or from the root."""
    if (value := given(name)) in ("", *known):
        return value
    for folder in (given("CALLED_FROM", "."), ".", ROOT):
        if (path := Path(folder, value)).exists():
            return os.path.abspath(path)
    return refuse(f"{name}={value}: there is no such file or folder; the names known are {', '.join(sorted(known))}.")


class Series:
    """A run's notebooks: its settings, which it keeps, and which of them are stale."""

    def __init__(self, measuring: bool = False) -> None:
        try:
            words = shlex.split(given("PARAMS"))
        except ValueError as error:
            refuse(f"PARAMS={given('PARAMS')}: {error}.")
        if words[::3] != ["-p"] * (len(words) // 3) or len(words) % 3:
            refuse(f'PARAMS={given("PARAMS")}: expected "-p name value", as often as you like.')
        wanted = {"corpus": located("CORPUS", CORPORA), "profile": located("PROFILE", PROFILES),
                  "device": given("DEVICE"), "params": shlex.join(words)}  # fmt: skip
        stem = re.sub(r"(\.(zip|jsonl|tsv|csv|txt))?(\.gz)?$", "", Path(wanted["corpus"] or "sample").name)
        self.name = given("RUN", stem)
        if self.name[0] in ".-" or "/" in self.name:
            refuse(f"RUN={self.name} must be one plain word, the name of a folder in runs/.")
        self.folder, self.file = RUNS / self.name, RUNS / self.name / "series.json"
        state, checkpoint = read_json(self.file), self.folder / "checkpoint.pt"
        own, self.done = state.get("settings", {}), state.get("done", {})
        if given("FRESH") and not measuring:
            own, self.done, number = {}, {}, 1
            while (kept := checkpoint.with_suffix(f".{number}.pt")).exists():
                number += 1
            if checkpoint.exists():
                checkpoint.rename(kept)
        elif not own and checkpoint.exists() and not measuring:
            refuse(f"runs/{self.name} was not trained by make. Choose another RUN, or start over with FRESH=1.")
        for key, value in wanted.items():
            if value and own and value != own[key] and not (measuring and key in ("device", "params")):
                made = f"runs/{self.name} has {key.upper()}={own[key] or '(none)'}, and this call says {value}"
                rest = "choose another RUN, or start over with FRESH=1 (the checkpoint is kept under another name)."
                refuse(f"{made}. Leave {key.upper()} out, {rest}")
        corpus = wanted["corpus"] or "sample"
        usual = {"corpus": corpus, "profile": "auto", "device": "auto", "params": ""}
        chosen = {key: value for key, value in wanted.items() if value}
        self.own = own or usual | chosen
        self.settings = usual | own | chosen if measuring else self.own

    def save(self) -> None:
        write_json(self.file, {"settings": self.own, "done": self.done})

    def notebook(self, name: str) -> Path:
        return self.folder / "notebooks" / f"{name}.ipynb"

    def command(self, name: str) -> list[str | Path]:
        """What runs one notebook."""
        named = ["-p", "run", self.name, *(f for k, v in self.settings.items() if k != "params" for f in ("-p", k, v))]
        source = ROOT / "notebooks" / f"{name}.ipynb"
        return [TOOLS / "run_notebook.py", source, self.notebook(name), *named, *shlex.split(self.settings["params"])]

    def digests(self) -> dict[str, str]:
        """What each notebook would be made from now."""
        if self.settings["corpus"] not in CORPORA and not Path(self.settings["corpus"]).exists():
            refuse(f"the corpus of runs/{self.name}, {self.settings['corpus']}, is not there any more.")
        profile, profiles = self.settings["profile"], ROOT / "notebooks" / "profiles"
        paths = [self.settings["corpus"], profiles if profile == "auto" else profiles / (profile + ".yaml")]
        paths[0] = ROOT / "corpora" / "sample" if paths[0] == "sample" else Path(paths[0])  # cornell is held by its sum
        paths[1] = paths[1] if paths[1].exists() else Path(profile)
        yardsticks, found = contents(ROOT / "benchmarks"), {}
        beside = [path for kind in ("*.yaml", "*.py") for path in (ROOT / "notebooks").glob(kind)]
        common = digest(contents(ROOT / "helpers", *beside), contents(*paths))
        for name, (needs, _) in NOTEBOOKS.items():
            text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
            with contextlib.suppress(ValueError, LookupError, TypeError):  # what is no notebook is for papermill to say
                text = json.dumps([(cell["cell_type"], cell["source"], cell["metadata"].get("tags"))
                                   for cell in json.loads(text)["cells"]])  # fmt: skip
            parts = [text, json.dumps(self.settings), common, *(found[need] for need in needs)]
            found[name] = digest(*parts, yardsticks if "from benchmarks" in text or "exercises" in text else "")
        return found

    def update(self, names: list[str] = NUMBERED, at_once: int = 2) -> None:
        """Run those notebooks that are stale; on the embedded corpus so many at once, unless make was told by -j."""
        now = self.digests()
        with locked(self.folder / ".series.lock", BUSY.format(self.name)):
            self.save()
            stale = [name for name in names if self.done.get(name) != now[name] or not self.notebook(name).is_file()
                     or not (self.folder / NOTEBOOKS[name][1]).exists()]  # fmt: skip
            # Of the embedded corpus's small model one thread is as fast as two.
            small = self.settings["corpus"] == "sample" and self.settings["profile"] in ("auto", "sample")
            most = jobs(at_once if small else 1)
            self.run(stale, now, {"OMP_NUM_THREADS": "1"} if small or most > 1 else {}, most)

    def measure(self, name: str) -> None:
        """Run one notebook with its whole tables, on the run as it is and with all threads."""
        with locked(self.folder / ".series.lock", BUSY.format(self.name)):
            self.run([name], {}, {}, 1, "-p", "full", "true")

    def run(self, waiting: list[str], now: dict[str, str], variables: dict[str, str], most: int, *more: str) -> None:
        """Run notebooks in order, `most` of them at once, and note what each was made from.
        The first that fails ends it with status 1, once those beside it are done; a KeyboardInterrupt ends all."""
        python, running, failed = interpreter(), {}, False
        try:
            while running or (waiting and not failed):
                for name in [] if failed else list(waiting):
                    if len(running) < most and not {*NOTEBOOKS[name][0]} & {*waiting, *running}:
                        print(f"running {name} …", flush=True)
                        waiting.remove(name)
                        if self.done.pop(name, None):  # whatever comes of it, what was there is written over
                            self.save()
                        running[name] = subprocess.Popen(
                            [python, *self.command(name), *more], env=variables | surroundings(python),
                            start_new_session=True,
                        )  # fmt: skip
                time.sleep(0.05)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    if running.pop(name).returncode:
                        failed = True
                    elif name in now:
                        self.done[name] = now[name]
                        self.save()
        except BaseException:
            for process in running.values():
                process.send_signal(signal.SIGINT)
            for process in running.values():
                process.wait()
            raise
        if failed:
            sys.exit(1)


def jobs(usual: int = 1) -> int:
    """How many notebooks may run at once: what make -j allows, else `usual`; at most one per core and 2 GB."""
    flag = re.search(r"(?:^| )-j ?(\d*)", os.environ.get("MAKEFLAGS", "").partition(" -- ")[0])
    known = Path("/proc/meminfo")  # on Linux
    memory = re.search(r"MemAvailable: *(\d+)", known.read_text()) if known.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = min(cores, int(memory[1]) // 2_000_000 if memory else cores)
    return max(min(int(flag[1] or most) if flag else usual, most), 1)


def run_all() -> None:
    """notebooks 01 to 08; executed copies and all results in runs/NAME; -j4 runs up to four at once, -j1 one"""
    series = Series()
    series.update()
    print(f"Done: runs/{series.name} holds the executed notebooks, the checkpoint, figures and tables.")


def test() -> None:
    """lint, unit tests, run-all, committed notebooks against their outputs"""
    for target in (lint, unit, run_all, check):
        target()


def lint() -> None:
    """ruff's rules and format"""
    call("-m", "ruff", "check", ".")
    call("-m", "ruff", "format", "--check", "--quiet", ".")


def unit() -> None:
    """the unit tests"""
    call("-m", "pytest", "-n", "2", "--dist", "loadfile")


def check() -> None:
    """the committed notebooks on a copy of the run, its bot in Python, in Chromium and in C++, a reader's visit"""
    series = Series()
    series.update()
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(series.folder, Path(copy, "sample"))
        nbval = ["--nbval", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg", "--nbval-cell-timeout", "900"]
        two = ["-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
        longest_first = [f"notebooks/{name}.ipynb" for name in reversed(NOTEBOOKS)]
        call("-m", "pytest", *two, *nbval, *longest_first, CHATBOT_RUNS=copy, OMP_NUM_THREADS="1")
        checks = [f"tests/check_{what}.py" for what in ("run", "browser", "page", "cpp", "gpu")]
        call("-m", "pytest", *checks, CHATBOT_RUNS=copy)


def soak() -> None:
    """the long series: kills and resumes, mutated files and lines, notebooks mistreated, six languages"""
    tests = [f"tests/test_{what}.py" for what in ("faults", "hostile", "notebooks", "own")]
    call("-m", "pytest", "-s", *tests, CHATBOT_SOAK="1")


def sweep() -> None:
    """the sweep of notebooks/SPACE.yaml: W&B with a login, Optuna without; CORPUS=… TRIALS=n"""
    trials = ["--trials", given("TRIALS")] if given("TRIALS") else []
    of_sweep("sweep", f"notebooks/{given('SPACE', 'sweep')}.yaml", *data_of_sweep(), *trials)


def sweep_worker() -> None:
    """joins a running sweep: SWEEP=id, as 'make sweep' prints it"""
    of_sweep("sweep-worker", sweep_id(), *data_of_sweep())


def sweep_best() -> None:
    """a sweep's best settings as a profile, runs/sweep/best.yaml: SWEEP=id"""
    of_sweep("best", sweep_id())


def sweep_id() -> str:
    return given("SWEEP") or refuse("SWEEP=id is missing; 'make sweep' prints it.")


def data_of_sweep() -> list[str]:
    data = ["--corpus", located("CORPUS", CORPORA) or "sample", "--profile", located("PROFILE", PROFILES) or "sweep"]
    tracking = ["--wandb", given("WANDB")] if given("WANDB") else []
    return [*data, *tracking, "--device", given("DEVICE", "auto")]


def of_sweep(*words: str) -> None:
    """A command on sweeps; they have a run of their own unless another is named."""
    storage = {"CHATBOT_STORAGE": given("STORAGE")} if given("STORAGE") else {}  # not where `ps` would show it
    call("-m", "tools.sweeps", *words, "--run", RUNS / given("RUN", "sweep"), **storage)


def profile() -> None:
    """notebook 06 alone on an existing checkpoint, its tables into results/: RUN=name DEVICE=cuda"""
    Series(measuring=True).measure("06_profiling")


def latency() -> None:
    """notebook 07 alone with its whole table, into results/: RUN=name DEVICE=cuda"""
    Series(measuring=True).measure("07_torchscript_and_latency")


def compare() -> None:
    """the classic recipe and ours trained on CORPUS (half an hour and more), to results/"""
    corpus = located("CORPUS", CORPORA) or "sample"
    call("-m", "benchmarks.compare", "--corpus", corpus, "--device", given("DEVICE", "auto"))


def speedrun() -> None:
    """seconds against nats per response, the classic tutorial's program and ours, on CORPUS; to results/"""
    corpus = located("CORPUS", []) or refuse("CORPUS=path is missing: Cornell's two files, in a folder or a zip.")
    call("-m", "benchmarks.speedrun", "--corpus", corpus, "--device", given("DEVICE", "auto"))


def mistakes() -> None:
    """seven classic mistakes and some more, priced: copying, the embedded world, and movies in CORPUS; to results/"""
    corpus = ["--corpus", located("CORPUS", [])] if given("CORPUS") else []
    call("-m", "benchmarks.mistakes", *corpus, "--device", given("DEVICE", "auto"))


def bench() -> None:
    """this project beside the classic tutorial's way: results/bench-MACHINE.json"""
    call("-m", "benchmarks.bench", "--device", given("DEVICE", "auto"), "--json", "results/bench-DEVICE.json")


def gpu() -> None:
    """every CUDA measurement in one call of minutes, in stages: results/*-cuda.json; BUDGET=seconds OUT=folder"""
    out, device = given("OUT", "runs/gpu"), given("DEVICE", "cuda").replace("auto", "cuda")
    corpus = located("CORPUS", CORPORA) or "sample"
    options = ["--device", device, "--corpus", corpus, "--budget", given("BUDGET", "530"), "--out", out]
    try:
        call("-m", "benchmarks.gpu", *options)
    finally:  # what was measured is kept, finished or not
        for measured in (ROOT / out).glob("*-cuda.json"):
            shutil.copy2(measured, ROOT / "results")


def images() -> None:
    """the pictures in images/, docs/bot.html and the tables of README and docs/, from results/ and the run"""
    series = Series()
    series.update()
    call("-m", "tools.make_images", "--run", series.folder)
    call("-m", "helpers", "page", "--run", series.folder)
    shutil.copy(series.folder / "bot.html", ROOT / "docs")
    call("-m", "pytest", "tests/check_browser.py", CHATBOT_SCREENSHOT=str(ROOT / "images" / "chat.png"))
    call("-m", "tools.tables")
    call("-m", "tools.mistake_tables")


def wheelhouse() -> None:
    """all packages as files, for a machine without an index (docs/offline.md says how)"""
    call("-m", "pip", "download", "-qq", "--disable-pip-version-check", "-d", "wheelhouse", "-r", "requirements.txt")


def lab() -> None:
    """JupyterLab at notebook 01; LABFLAGS="--no-browser --allow-root …" are handed on"""
    user = {name: os.environ[name] for name in ("IPYTHONDIR",) if name in os.environ}
    # As the name of a file it would make that file's folder the root.
    start = "--LabApp.default_url=/lab/tree/notebooks/01_data_preparation.ipynb"
    call("-m", "jupyterlab", f"--ServerApp.root_dir={ROOT}", start, *shlex.split(given("LABFLAGS")), **user)


def html() -> None:
    """executed notebooks and solutions as pages in runs/NAME/html, formulas readable offline"""
    series = Series()
    series.update(list(NOTEBOOKS))
    call(TOOLS / "make_pages.py", series.folder / "html", *map(series.notebook, NOTEBOOKS))


def outputs() -> None:
    """the committed notebooks' outputs from a default run"""
    series = Series()
    series.update(list(NOTEBOOKS), at_once=1)  # beside nothing else, since they hold times
    committed = [shutil.copy(series.notebook(name), ROOT / "notebooks") for name in NOTEBOOKS]
    keys = "metadata.papermill metadata.language_info cell.metadata.papermill cell.metadata.execution"
    call("-m", "nbstripout", "--keep-output", "--keep-count", "--keep-id", "--extra-keys", keys, *committed)


def show_help() -> None:
    """this list"""
    for name, target in TARGETS.items():
        print(f"  make {name:<13} {target.__doc__}")
    print("""
  CORPUS=sample|cornell|PATH  RUN=name  PROFILE=auto|sample|own|quick|cornell|full|classic|FILE  DEVICE=auto|cpu|cuda
  PARAMS="-p name value" reaches the notebooks; FRESH=1 starts a run over and keeps its checkpoint under another name;
  PYTHON=python3.12 makes the environment with that; PYTHON=python3 VENV= uses that interpreter as it is.""")


TARGETS = {"help": show_help, "run-all": run_all, "test": test, "lint": lint, "unit": unit, "check": check,
           "html": html, "lab": lab, "sweep": sweep, "sweep-worker": sweep_worker, "sweep-best": sweep_best,
           "profile": profile, "latency": latency, "compare": compare, "bench": bench, "speedrun": speedrun,
           "mistakes": mistakes, "gpu": gpu, "images": images, "outputs": outputs, "soak": soak,
           "wheelhouse": wheelhouse}  # fmt: skip


def main(target: str) -> None:
    signal.signal(signal.SIGTERM, stop)
    try:
        TARGETS[target]()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        refuse(str(error))


def stop(*_) -> None:
    raise KeyboardInterrupt("terminated")


if __name__ == "__main__":
    main(sys.argv[1])
