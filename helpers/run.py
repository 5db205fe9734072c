"""A run's folder and files, written whole or not at all; the machine, devices and clocks; a notebook's first cell."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import inspect
import io
import json
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock, Timeout

from helpers.settings import Settings, UserError, refusing

ROOT = Path(__file__).resolve().parent.parent
# What a trained checkpoint depends on besides its settings and data: these sources.
TRAINING_CODE = ("text", "batches", "model", "training")


class Run:
    """The folder of one run, `runs/NAME` or any path. Files are named here and nowhere else."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.data = self.folder / "data.pt"
        self.checkpoint = self.folder / "checkpoint.pt"
        self.metrics = self.folder / "metrics.jsonl"
        self.manifest = self.folder / "manifest.json"
        self.figures = self.folder / "figures"
        self.latency = self.folder / "latency.csv"
        self.scripted = self.folder / "scripted.pt"
        self.sweep = self.folder / "sweep"

    @classmethod
    def named(cls, name: str) -> Run:
        """The run `runs/NAME`; the variable CHATBOT_RUNS puts `runs` elsewhere."""
        if not name or name != Path(name).name or name.startswith("."):
            raise UserError(f"A run's name must be one plain word, for example 'sample', not {name!r}.")
        return cls(Path(os.environ.get("CHATBOT_RUNS") or ROOT / "runs") / name)

    def facts(self) -> dict:
        """What the manifest holds. Raises UserError if it cannot be read."""
        what = f"{shown(self.manifest)} cannot be read"
        with refusing(what, "Delete it; it is written anew.", OSError, ValueError, TypeError, RecursionError):
            return dict(json.loads(self.manifest.read_text(encoding="utf-8"))) if self.manifest.is_file() else {}

    def record(self, **facts) -> None:
        """Add facts to the manifest, next to the versions and the machine's description."""
        write_json(self.manifest, self.facts() | machine() | facts)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into this folder; what a killed one left half-written is removed.

        The lock of a process that is gone is free. Raises UserError that names the process which holds it.
        """
        path = self.folder / ".lock"
        with _writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, is_singleton=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                holder = path.read_text(encoding="utf-8", errors="replace") or "another process"
                raise UserError(
                    f"{shown(self.folder)} is in use by {holder}. Wait for it to end, or choose another run."
                ) from None
        try:
            with _writing(path):
                path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
                for own in (self.data, self.checkpoint, self.metrics, self.manifest):
                    for half_written in self.folder.glob(f".{own.name}.*.tmp"):
                        if not _running(half_written.suffixes[-2][1:]):  # data.pt is written without the lock too
                            half_written.unlink(missing_ok=True)
            yield
        finally:
            lock.release()


def shown(path: str | Path) -> str:
    """A path as a reader should see it: counted from the project's folder where it lies inside."""
    path = Path(path).absolute()
    runs = os.environ.get("CHATBOT_RUNS")
    if runs and path.is_relative_to(Path(runs).absolute()):
        return str("runs" / path.relative_to(Path(runs).absolute()))
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def machine(device: torch.device | None = None) -> dict:
    """What a figure was obtained with: versions, processor and threads; of a device also its kind and name."""
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else facts["processor"]
        facts |= {"device": device.type, "name": name}
    return facts


def need(path: Path, maker: str) -> None:
    """Raises UserError that names what makes the file, if it is missing."""
    if not path.is_file():
        raise UserError(f"{shown(path)} is missing: {maker} makes it. Run that first.")


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu` or `cuda`. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"Device {name!r} is not known; use auto, cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"Device {name!r} is not supported; use auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"Device {name!r} was asked for, but PyTorch {torch.__version__} sees no such CUDA device here."
        )
    return device


def keep_memory() -> None:
    """Let this process keep freed memory for its next tensors, where the C library can be told so (glibc).

    By default glibc gives large blocks back to the system, which hands them out again page by page, zeroed: thousands
    of page faults in every training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below this come from the heap
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: free memory at the heap's end that is not given back


def timings(work: Callable[[], object], device: torch.device, repeats: int = 15) -> list[float]:
    """The seconds of each call after one to warm up, what a GPU still has to do for it included."""
    return [seconds(work, device) for _ in range(repeats + 1)][1:]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call, what a GPU still has to do for it included."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without the search for circular garbage, which would walk again and again through millions of new strings."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place, whole and on disk, only when the block has ended well.

    Raises UserError if it cannot be written (disk full, read-only folder); the old file then stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{shown(path)} cannot be written: {error.strerror or error}. What was there before is kept; "
            "make room or choose another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file in one piece."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: dict) -> None:
    """Write plain data in one piece."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def append_text(path: Path, text: str) -> None:
    """Add to a text file and wait until it is on disk. Raises UserError if it cannot be written."""
    with _writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, state: dict) -> None:
    """Write tensors and plain values in one piece: either the new file is there, whole, or the old one is."""
    buffer = io.BytesIO()  # writing straight to a full disk, torch.save hides the reason in an error of its own
    torch.save(state, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_tensors(path: Path, remedy: str) -> dict:
    """What `write_tensors` wrote, on the CPU. Nothing but tensors and plain values is unpickled: no code can run.

    Raises UserError that ends in the remedy if the file is damaged, or holds anything else or more than its size.
    """
    with refusing(f"{shown(path)} cannot be loaded", remedy, Exception):  # torch.load raises many kinds
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, which PyTorch's own files are not")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    return state


def digest(*parts: bytes | str) -> str:
    """A short SHA-256 of the parts, to tell whether two inputs are the same."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() if isinstance(part, str) else part)
        whole.update(b"\0")
    return whole.hexdigest()[:16]


def code_of(*modules: str) -> list[bytes]:
    """The sources of some of this package's modules: what was made with other ones is made anew."""
    return [(Path(__file__).parent / f"{name}.py").read_bytes() for name in modules]


def training_digest(settings: Settings, data_digest: str) -> str:
    """Tells whether a checkpoint was trained from these settings, this data and this code."""
    return digest(json.dumps(settings.to_dict(), sort_keys=True), data_digest, *code_of(*TRAINING_CODE))


def start_notebook() -> None:
    """For a notebook's first cell: print the versions, and let a UserError or Ctrl-C end without a traceback."""
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    from IPython import get_ipython

    def sentence(shell, kind, error, traceback, tb_offset=None) -> None:
        shell._showtraceback(kind, error, [f"{kind.__name__}: {error}"])

    get_ipython().set_custom_exc((UserError, KeyboardInterrupt), sentence)


def show(thing) -> None:
    """Print the source of a class or function, so that a notebook explains the very code that it runs."""
    sys.stdout.write(inspect.getsource(thing))


def _running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)  # asks, and sends nothing
    except PermissionError:  # it is another user's
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
