"""The environment of all that `make` starts: the project's own, made, mended, and closed to the user's other work.

The standard library is all there is before it is made.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - so old a Python still reads this file, and says so
    version = "{}.{}".format(*sys.version_info)
    sys.exit(f"error: this needs Python 3.11 or newer; {sys.executable} is {version}. Name another: make PYTHON=...")

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(os.environ.get("CHATBOT_RUNS") or ROOT / "runs").absolute()
VARIABLES = [
    "CORPUS", "RUN", "PROFILE", "DEVICE", "PARAMS", "FRESH", "PYTHON", "VENV", "BUDGET", "OUT", "TRIALS", "SWEEP",
    "SPACE", "STORAGE", "WANDB", "LABFLAGS", "CALLED_FROM", "THIS",
]  # fmt: skip
# What a user has set up for other work and would change what is done here. Where packages come from is for pip to know.
SOURCES = "INDEX_URL|EXTRA_INDEX_URL|NO_INDEX|FIND_LINKS|.*CERT|TRUSTED_HOST|PROXY|.*CACHE_DIR|CONFIG_FILE|.*TIMEOUT"
FOREIGN = re.compile(rf"PYTHON|MPLBACKEND|MATPLOTLIBRC|IPYTHON|JUPYTER_P|MAKE|MFLAGS|PIP_(?!({SOURCES})$)")
# The C library (glibc) keeps freed memory for the next tensors, in place of giving it back to the system, which hands
# it out again page by page: thousands of page faults in every training step.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483647"}


def refuse(sentence: str) -> None:
    """One sentence, and the end with status 1."""
    sys.exit(f"error: {sentence}")


def given(name: str, default: str = "") -> str:
    """A variable's value."""
    value = os.environ.get(name) or default
    return value if value.isprintable() else refuse(f"{name}={value!a} holds a character that is no text.")


def digest(*parts: str | bytes) -> str:
    """One digest of all the parts."""
    hashes = [hashlib.sha256(part.encode() if isinstance(part, str) else part).hexdigest() for part in parts]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def contents(*paths: Path) -> str:
    """A digest of files, and of folders' files with their names."""
    files = {file: root for root in paths for file in ([root] if root.is_file() else sorted(root.rglob("*")))}
    return digest(*(part for file, root in files.items() if file.is_file() and "__pycache__" not in file.parts
                    for part in (str(file.relative_to(root)), file.read_bytes())))  # fmt: skip


def read_json(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def write_json(path: Path, value: dict) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def locked(path: Path, busy: str = ""):
    """One process at a time; another one waits, or is told that it is `busy`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            refuse(busy)
        yield


def interpreter() -> str:
    """The Python of all that follows: the project's own environment's, made or mended here, or with VENV= this one."""
    if not (name := os.environ.get("VENV", ".venv")):
        return sys.executable
    venv, version = ROOT / name, "{}.{}".format(*sys.version_info)
    python, file = venv / "bin" / "python", venv / ".installed"
    base = getattr(sys, "_base_executable", sys.executable)  # not the one that may be replaced here
    with locked(RUNS / ".install.lock"):
        record = read_json(file)
        if not given("PYTHON"):
            version = record.get("python", version)
        if venv.exists() and not (python.exists() and (venv / "lib" / f"python{version}").is_dir()):
            if not record and name != ".venv":
                refuse(f"VENV={name} is no environment of Python {version}, and make did not make it. Name another.")
            shutil.rmtree(venv)  # of another version, or half made
            record, version = {}, "{}.{}".format(*sys.version_info)
        lists = contents(*(ROOT / name for name in ("requirements.in", "constraints.txt", "requirements.txt")))
        wanted = {"venv": str(venv), "python": version, "packages": lists}
        if record == wanted:
            return str(python)
        env = surroundings(base)
        if not record and subprocess.run([base, "-m", "venv", venv], env=env, check=False).returncode:
            refuse(f"{base} -m venv {venv} failed; on Debian: apt install python3-venv.")
        if record.get("packages") != lists:
            print(f"installing into {name} (once) …", flush=True)
            pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", "requirements.txt"]
            if subprocess.run(pip, env=env, cwd=ROOT, check=False).returncode:
                refuse("the packages could not be installed; pip's own message stands above. The next make goes on.")
        if (before := record.get("venv", str(venv))) != str(venv):  # moved or copied: its commands name the old place
            for script in (venv / "bin").iterdir():
                if not script.is_symlink() and before.encode() in (text := script.read_bytes()):
                    script.write_bytes(text.replace(before.encode(), str(venv).encode()))
        site = venv / "lib" / f"python{version}" / "site-packages"
        (site / "chatbot_notebooks.pth").write_text(os.path.relpath(ROOT, site))  # for whoever works without make
        write_json(file, wanted)
    return str(python)


def surroundings(python: str) -> dict[str, str]:
    """The environment of every process started here: this interpreter as the kernel, nothing of the user's own."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES and not FOREIGN.match(name)}
    home = RUNS / ".home" / digest(python)[:8]
    kernel = {"argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    files = {
        "kernels/python3/kernel.json": json.dumps(kernel | {"display_name": "Python 3 (ipykernel)"}),
        "ipython/profile_default/ipython_kernel_config.py": "c.IPKernelApp.log_level = 50\n",  # no notes on transport
        "matplotlibrc": "",
    }
    for name, text in files.items():
        if not (path := home / name).is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    user = [] if os.environ.get("VENV", ".venv") else filter(None, [os.environ.get("PYTHONPATH")])
    return {"OMP_WAIT_POLICY": "PASSIVE"} | MEMORY | env | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *user]), "PYTHONUTF8": "1", "PIP_USER": "0",
        "JUPYTER_PATH": str(home), "IPYTHONDIR": str(home / "ipython"), "MATPLOTLIBRC": str(home / "matplotlibrc"),
        # PyTorch's profiler warns of memory older than the profile, at times, on stderr: notebook 06 would show it.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip


def call(*command: str | Path, **variables: str) -> None:
    """Run a command of the environment in the root; its status, if not 0, is the end's too."""
    python = interpreter()
    process = subprocess.Popen([python, *command], cwd=ROOT, env=surroundings(python) | variables)
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt as stop:  # which the command hears by itself, and answers
            if stop.args:  # a signal to this process alone
                process.terminate()
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)
