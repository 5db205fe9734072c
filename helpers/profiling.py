"""Where time and memory go: torch.profiler's events as tables, and what bounds each part of the model."""

import contextlib
import gzip
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from helpers.run import timings

PARTS = ("embed", "encode", "attend", "decode", "project", "loss", "backward", "optimiser")
# Operators that move no data: they only describe a tensor anew, or ask for memory.
VIEWS = {
    "as_strided", "view", "_unsafe_view", "_reshape_alias", "detach", "empty", "empty_strided", "resize_", "alias",
    "resolve_conj", "resolve_neg",
}  # fmt: skip
# Of the others those move data that call no further ones, and these, which call such as only prepare.
MOVERS = {"mm", "addmm", "bmm", "baddbmm", "index_select", "cat"}


def profiled(work: Callable[[], object], device: torch.device, steps: int = 5, detail: bool = True) -> profile:
    """Run `work` with a schedule of one step waiting, two warming up and `steps` recorded.
    `detail` adds shapes, FLOPs and memory, and makes every operator a little slower."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    plan = schedule(wait=1, warmup=2, active=steps, repeat=1)
    extras = {"profile_memory": detail, "record_shapes": detail, "with_flops": detail}
    with _quiet_stderr(), profile(activities=activities, schedule=plan, acc_events=True, **extras) as prof:
        for _ in range(3 + steps):
            with record_function("step"):
                work()
            prof.step()
    return prof


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep the profiler's own C++ notes ("profiler_start", …) out of notebooks."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """Within the block, the operators of a Seq2Seq's modules stand under names of PARTS."""
    attention, opened = model.decoder.attention, []
    modules = [
        ("embed", model.embedding), ("encode", model.encoder), ("decode", model.decoder),
        ("attend", attention), ("attend", attention.for_keys), ("project", model.output),
    ]  # fmt: skip
    with contextlib.ExitStack() as hooks:
        for name, module in modules:

            def enter(*_, name: str = name) -> None:
                opened.append(record_function(name))
                opened[-1].__enter__()

            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(lambda *_: opened.pop().__exit__(None, None, None)))
        yield


def operator_table(prof: profile, steps: int = 5) -> pd.DataFrame:
    """Per operator and step: calls, self and total milliseconds on the CPU (and the GPU), megabytes allocated."""
    rows = [
        {
            "operator": event.key.removeprefix("aten::"), "calls": event.count / steps,
            "self ms": event.self_cpu_time_total / 1e3 / steps, "total ms": event.cpu_time_total / 1e3 / steps,
            "self MB": event.self_cpu_memory_usage / 1e6 / steps, "GFLOP": (event.flops or 0) / 1e9 / steps,
            "GPU ms": event.self_device_time_total / 1e3 / steps,
        }
        for event in prof.key_averages()
        if not event.key.startswith(("ProfilerStep", "step")) and event.key not in PARTS
    ]  # fmt: skip
    table = pd.DataFrame(rows).sort_values("self ms", ascending=False, ignore_index=True)
    table.insert(3, "share", table["self ms"] / table["self ms"].sum())
    return table if ProfilerActivity.CUDA in prof.activities else table.drop(columns="GPU ms")


def part_table(prof: profile, steps: int = 5) -> pd.DataFrame:
    """Per part of the model and step: operator calls, milliseconds (of them in Python, between operators), GFLOP and
    megabytes moved.
    An operator counts for the innermost part around it. GFLOP are the profiler's own count (matrix products and the
    like). Megabytes are what operators read and write if nothing stays in a cache: the size of their inputs, taken as 4
    bytes a number, and what they allocate. Of a table that it looks rows up in, an operator reads these rows alone."""
    events = [event for event in prof.events() if event.device_type == DeviceType.CPU]
    main = {event.thread for event in events if event.name.startswith("ProfilerStep")}
    rows = []
    for event in events:
        if event.name.startswith("ProfilerStep"):
            continue
        label = event.name in (*PARTS, "step")
        part, above = event.name if event.name in PARTS else None, event.cpu_parent
        while above is not None and part is None:
            part, above = (above.name if above.name in PARTS else None), above.cpu_parent
        if part is None:  # on a GPU, autograd calls the backward operators from a thread of its own
            part = "other" if event.thread in main else "backward"
        moved = 0 if label else _bytes(event)
        taken = event.self_cpu_time_total / 1e3
        rows.append({
            "part": part, "calls": event.name.startswith("aten::"), "ms": taken, "Python ms": taken if label else 0,
            "GPU ms": event.self_device_time_total / 1e3, "GFLOP": (event.flops or 0) / 1e9, "MB": moved / 1e6,
        })  # fmt: skip
    table = pd.DataFrame(rows).groupby("part").sum() / steps
    if ProfilerActivity.CUDA not in prof.activities:
        table = table.drop(columns="GPU ms")
    return table.reindex([part for part in (*PARTS, "other") if part in table.index])


def _bytes(event) -> int:
    """What an operator itself reads and writes."""
    name, shapes = event.name.removeprefix("aten::"), event.input_shapes
    if name in VIEWS or (event.cpu_children and name not in MOVERS):
        return 0
    result = max(event.cpu_memory_usage, 0)
    if name == "index_select" and shapes:
        return 2 * result + 4 * _numbers(shapes[1:])
    return 4 * _numbers(shapes) + result


def _numbers(shapes) -> int:
    """How many numbers tensors of these shapes hold; lists of tensors are lists of shapes."""
    if shapes and all(isinstance(size, int) for size in shapes):
        return math.prod(shapes)
    return sum(_numbers(shape) for shape in shapes or [] if isinstance(shape, (list, tuple)))


def machine_peaks(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """What this machine reaches at best: GFLOP/s of a large matrix product, GB/s of a large copy (read and written),
    and the microseconds of the smallest operator, called without Python: the price of calling one at all."""
    a, big = torch.ones(1024, 1024, device=device, dtype=dtype), torch.ones(32 * 2**20, device=device)
    target, small = torch.empty_like(big), torch.ones(1, device=device)
    return {
        "GFLOP/s": 2 * 1024**3 / min(timings(lambda: a @ a, device)) / 1e9,
        "GB/s": 2 * big.nbytes / min(timings(lambda: target.copy_(big), device)) / 1e9,
        "µs a call": min(timings(lambda: torch._foreach_add_([small] * 1000, 1), device)) / 1000 * 1e6,
    }


def bounds(quick: pd.DataFrame, detailed: pd.DataFrame, peaks: dict[str, float]) -> pd.DataFrame:
    """What limits each part: what needs most of its time, its FLOPs, its bytes or its calls.
    `quick` is the part table of a profile without detail, whose times are close to the real ones. compute and memory
    are the times needed at the machine's peaks, as shares of the time taken (above 1, bytes came from a cache);
    overhead is the time of the calls at the price of the smallest, and of Python between them.
    The three are estimates and overlap; where all are below 0.2, nothing is called the bound."""
    time = "GPU ms" if "GPU ms" in quick else "ms"
    table = pd.DataFrame({"ms": quick[time], "calls": detailed["calls"]})
    table["GFLOP/s"], table["GB/s"] = detailed["GFLOP"] / quick[time] * 1e3, detailed["MB"] / quick[time]
    table["compute"], table["memory"] = table["GFLOP/s"] / peaks["GFLOP/s"], table["GB/s"] / peaks["GB/s"]
    table["overhead"] = (table["calls"] * peaks["µs a call"] / 1e3 + quick["Python ms"]) / table["ms"]
    shares = table[["compute", "memory", "overhead"]]
    table["bound by"] = shares.idxmax(axis=1).where(shares.max(axis=1) >= 0.2, "none of them")
    return table


def export(prof: profile, path: Path) -> list[dict]:
    """Write the trace that https://ui.perfetto.dev and chrome://tracing show (`.json.gz`), and return its events."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(path))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def timeline(trace: list[dict]) -> pd.DataFrame:
    """When each part ran in the last recorded step, and on a GPU each kernel: lane, name, start and ms."""
    steps = [event for event in trace if str(event.get("name")).startswith("ProfilerStep")]
    last = max((event for event in steps if event["cat"] == "user_annotation"), key=lambda event: event["ts"])
    rows = []
    for event in trace:
        kernel = event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        part = event.get("cat") == "user_annotation" and event["name"] in PARTS
        if (kernel or part) and last["ts"] <= event["ts"] < last["ts"] + last["dur"]:
            lane = "GPU" if kernel else "CPU"
            start = (event["ts"] - last["ts"]) / 1e3
            rows.append({"lane": lane, "name": event["name"], "start": start, "ms": event["dur"] / 1e3})
    return pd.DataFrame(rows)


def idle_share(rows: pd.DataFrame) -> float:
    """The share of the time between the first start and the last end in which none of these rows of a timeline ran:
    on a GPU's lane the gaps between kernels."""
    rows = rows.sort_values("start")
    ends = (rows["start"] + rows["ms"]).cummax()
    gaps = (rows["start"] - ends.shift()).clip(lower=0).sum()
    return float(gaps / (ends.max() - rows["start"].min()))


def memory_curve(trace: list[dict]) -> pd.DataFrame:
    """Megabytes of tensors alive by time (ms), at every allocation and release of the recorded steps."""
    events = [event for event in trace if event.get("name") == "[memory]"]
    rows = [{"ms": event["ts"] / 1e3, "MB": event["args"]["Total Allocated"] / 1e6} for event in events]
    table = pd.DataFrame(rows).sort_values("ms", ignore_index=True)
    return table.assign(ms=table["ms"] - table["ms"].iloc[0])
