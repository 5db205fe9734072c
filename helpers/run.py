"""A run's folder and files, written whole or not at all; the machine, its devices and clocks."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import platform
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from helpers.settings import UserError, user_errors

ROOT = Path(__file__).resolve().parent.parent


class Run:
    """The folder of one run, `runs/NAME` or any path. Its files are named here, those of a sweep in `sweep`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.data = self.folder / "data.pt"
        self.checkpoint = self.folder / "checkpoint.pt"
        self.metrics = self.folder / "metrics.jsonl"
        self.manifest = self.folder / "manifest.json"
        self.figures = self.folder / "figures"
        self.latency = self.folder / "latency.csv"
        self.scripted, self.page = self.folder / "scripted.pt", self.folder / "bot.html"  # the bot outside this project
        self.sweep = self.folder / "sweep"

    @classmethod
    def named(cls, name: str) -> "Run":
        """The run `runs/NAME`; the variable CHATBOT_RUNS puts `runs` elsewhere."""
        if not name or name != Path(name).name or name.startswith("."):
            raise UserError(f"A run's name must be one plain word, for example 'sample', not {name!r}.")
        return cls(Path(os.environ.get("CHATBOT_RUNS") or ROOT / "runs") / name)

    def facts(self) -> dict:
        """What the manifest holds. Raises UserError if it cannot be read."""
        what = f"{display_path(self.manifest)} cannot be read"
        with user_errors(what, "Delete it; it will be written again.", OSError, ValueError, TypeError, RecursionError):
            return dict(json.loads(self.manifest.read_text(encoding="utf-8"))) if self.manifest.is_file() else {}

    def record(self, **facts) -> None:
        """Add facts to the manifest, next to the versions and the machine's description."""
        write_json(self.manifest, self.facts() | machine() | facts)

    def record_machine(self, device: torch.device, update: int) -> None:
        """Note what the updates from this one on are made with; say so if that was something else before."""
        facts = machine() | {"device": str(device)}
        here = {name: facts[name] for name in ("threads", "processor", "torch", "device")}
        before = [entry for entry in self.facts().get("trained_with", []) if entry["from_update"] < update]
        last = before[-1] if before else here
        changed = [f"{name} {here[name]} instead of {last[name]}" for name in here if here[name] != last[name]]
        if changed:
            print(f"resumed with {', '.join(changed)}: the result may differ in its last digits", file=sys.stderr)
        self.record(trained_with=[*before, {"from_update": update, **here}])

    def read_metrics(self) -> list[dict]:
        """The rows of `metrics.jsonl`: one per update (loss, …) and one per validation (validation_loss)."""
        require(self.metrics, "notebook 03_training")
        rows = []
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):  # a killed run's torn last line
            for row in map(json.loads, self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()):
                rows += [row] if isinstance(row["update"], int) else []
        return rows

    def cut_metrics(self, update: int) -> None:
        """Leave only the rows up to this update; 0 leaves none."""
        rows = [row for row in self.read_metrics() if row["update"] <= update] if self.metrics.exists() else []
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def append_metrics(self, rows: list[dict]) -> None:
        """Add rows and wait until they are on disk; the list is emptied. Raises UserError if they cannot be written."""
        with _writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        rows.clear()

    def keep_checkpoint(self) -> Path:
        """Give the checkpoint a free name beside its own (checkpoint.1.pt, checkpoint.2.pt, …), and return that."""
        names = (self.checkpoint.with_suffix(f".{number}.pt") for number in itertools.count(1))
        return self.checkpoint.rename(next(name for name in names if not name.exists()))

    @contextlib.contextmanager
    def locked(self, wanted: bool = True) -> Iterator[None]:
        """Keep other processes from training into this folder, if `wanted`.
        The lock of a dead process is free. Raises UserError that names the process which holds it."""
        path = self.folder / ".lock"
        with contextlib.ExitStack() as stack:
            if wanted:
                with _writing(path):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    try:
                        stack.enter_context(FileLock(path, blocking=False, is_singleton=True))
                    except Timeout:
                        what = f"{display_path(self.folder)} is in use by {path.read_text(errors='replace')}"
                        raise UserError(f"{what}. Wait for it to end, or choose another run.") from None
                    for leftover in self.folder.glob(".*.tmp"):  # of killed processes: only this one writes here now
                        leftover.unlink(missing_ok=True)
                    path.write_text(f"process {os.getpid()} on {platform.node()}")
            yield


def display_path(path: str | Path) -> str:
    """A path as a reader should see it: counted from the project's folder where it lies inside."""
    path, runs = Path(path).absolute(), Path(os.environ.get("CHATBOT_RUNS") or ROOT / "runs").absolute()
    if path.is_relative_to(runs):
        return str("runs" / path.relative_to(runs))
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def require(path: Path, maker: str) -> None:
    """Raises UserError that names what makes the file, if it is missing."""
    if not path.is_file():
        raise UserError(f"{display_path(path)} is missing: {maker} makes it. Run that first.")


def machine(device: torch.device | None = None) -> dict:
    """What a figure was obtained with: versions, processor and threads; of a device also its kind and name."""
    table = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    named = re.search(r"^model name\s*: (.*)$", table, re.MULTILINE)
    facts = {
        "python": platform.python_version(), "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": named[1] if named else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    if device is not None:
        cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if device.type == "cuda" else {}
        name = torch.cuda.get_device_name(device) if cuda else facts["processor"]
        facts |= {"device": device.type, "name": name, **cuda}
    return facts


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu` or `cuda`. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[1-9]?\d)?", name):
        raise UserError(f"Device {name!r} is not known: use auto, cpu or cuda.")
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise UserError(f"Device {name!r}: PyTorch sees no such CUDA device here, {count} in all.")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else equal work may end in other last digits
        torch.cuda.set_device(device.index or 0)
        torch.backends.cudnn.allow_tf32 = False  # which PyTorch has on for GRUs and off for products
        torch.backends.cudnn.CUDNN_TENSOR_DTYPES.add(torch.bfloat16)  # so that GRUs' weights lie in one piece there too
    return device


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Matrix products and GRUs of fp32 numbers on a GPU: in TF32 (10 bits of mantissa) if so named, else in full."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call, what a GPU still has to do for it included."""
    wait = torch.get_device_module(device).synchronize  # a CPU's does nothing
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def timings(work: Callable[[], object], device: torch.device, repeats: int = 15) -> list[float]:
    """The seconds of each call after one to warm up."""
    return [seconds(work, device) for _ in range(repeats + 1)][1:]


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[io.BufferedWriter]:
    """A file that takes its place, whole and on disk, only when the block has ended well. Raises UserError if it
    cannot be written; the old file then stays. What a killed process leaves goes when the folder is next locked."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{display_path(path)} cannot be written: {error.strerror or error}."
        raise UserError(f"{what} What was there before is kept; make room or choose another folder.") from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file in one piece."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: dict) -> None:
    """Write plain data in one piece."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_tensors(path: Path, version: int, state: dict) -> None:
    """Write tensors and plain values in one piece: either the new file is there, whole, or the old one is."""
    buffer = io.BytesIO()  # writing straight to a full disk, torch.save hides the reason in an error of its own
    torch.save(state | {"format": version}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_tensors(path: Path, version: int, maker: str) -> dict:
    """What `write_tensors` wrote, on the CPU. Only tensors and plain values are unpickled: no code can run. Raises
    UserError that names what makes the file if it is missing, damaged, of another format or larger than it looks."""
    require(path, maker)
    remedy = f"Use another one, or move it away and let {maker} make it again."
    with user_errors(f"{display_path(path)} cannot be loaded", remedy, Exception):  # torch.load raises many kinds
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, which PyTorch's own files are not")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.pop("format", None) != version:
            raise ValueError(f"it is not a file of this project in format {version}")
    return state


def digest(*parts: str) -> str:
    """A short SHA-256 of the parts, to tell whether two inputs are the same."""
    return hashlib.sha256("".join(f"{part}\0" for part in parts).encode()).hexdigest()[:16]
