"""Where time and memory go: torch.profiler's events as tables, and what bounds each part of the model."""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator

import pandas as pd
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from helpers.run import timings

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else notebooks show the profiler's own notes
PARTS = ("embed", "encode", "attend", "decode", "project", "loss", "backward", "optimiser")
# Operators that move no data: they only give a tensor another shape, or ask for memory.
VIEWS = {
    "as_strided", "view", "_unsafe_view", "_reshape_alias", "detach", "empty", "empty_strided", "resize_", "alias",
    "resolve_conj", "resolve_neg",
}  # fmt: skip
# Of the others those move data that call no further ones, and these, which call such as only prepare.
MOVERS = {"mm", "addmm", "bmm", "baddbmm", "index_select", "cat", "_cudnn_rnn", "_cudnn_rnn_backward"}
# On a GPU the main thread waits: for all kernels of a step, and for the thread from which autograd calls operators.
WAITS = {"wait", "cudaDeviceSynchronize", "backward"}


def profiled(work: Callable[[], object], device: torch.device, steps: int = 5, detail: bool = True) -> profile:
    """Run `work` with a schedule of one step waiting, two warming up and `steps` recorded.
    `detail` adds shapes, FLOPs and memory, and makes every operator a little slower."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    plan = schedule(wait=1, warmup=2, active=steps, repeat=1)
    extras = {"profile_memory": detail, "record_shapes": detail, "with_flops": detail}
    with profile(activities=activities, schedule=plan, acc_events=True, **extras) as prof:
        for _ in range(3 + steps):
            with record_function("step"):
                work()
                if gpu:  # a step's kernels may end after the CPU's part of it
                    with record_function("wait"):
                        torch.cuda.synchronize(device)
            prof.step()
    return prof


@contextlib.contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """Within the block, the operators of a Seq2Seq's modules stand under names of PARTS."""
    attention, opened = model.decoder.attention, []
    modules = [
        ("embed", model.embedding), ("encode", model.encoder), ("decode", model.decoder),
        ("attend", attention), ("attend", attention.keys), ("project", model.output),
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
    gpu = ProfilerActivity.CUDA in prof.activities
    rows = [
        {
            "operator": event.key.removeprefix("aten::"), "calls": event.count / steps,
            "self ms": event.self_cpu_time_total / 1e3 / steps, "total ms": event.cpu_time_total / 1e3 / steps,
            "self MB": (event.self_device_memory_usage if gpu else event.self_cpu_memory_usage) / 1e6 / steps,
            "GFLOP": (event.flops or 0) / 1e9 / steps, "GPU ms": event.self_device_time_total / 1e3 / steps,
        }
        for event in prof.key_averages()
        if event.device_type == DeviceType.CPU and not event.key.startswith(("ProfilerStep", "step"))
        and event.key not in {*PARTS, *WAITS}
    ]  # fmt: skip
    table = pd.DataFrame(rows).sort_values("self ms", ascending=False, ignore_index=True)
    table.insert(3, "share", table["self ms"] / table["self ms"].sum())
    return table if gpu else table.drop(columns="GPU ms")


def part_table(prof: profile, steps: int = 5) -> pd.DataFrame:
    """Per part of the model and step: operator calls, milliseconds (of them in Python, between operators), GFLOP and
    megabytes moved. On a GPU, time in which the CPU only waits for it counts for nothing.
    An operator counts for the innermost part around it. GFLOP are the profiler's own count (matrix products and the
    like). Megabytes are what operators read and write if nothing stays in a cache: the size of their inputs, taken as 4
    bytes a number, and what they allocate. Of a table that it looks rows up in, an operator reads these rows alone."""
    gpu = ProfilerActivity.CUDA in prof.activities
    events = [event for event in prof.events() if event.device_type == DeviceType.CPU]
    main = {event.thread for event in events if event.name.startswith("ProfilerStep")}
    rows = []
    for event in events:
        if event.name.startswith("ProfilerStep") or (gpu and event.name in WAITS):
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
    table = table.reindex([part for part in (*PARTS, "other") if part in table.index])
    return table if gpu else table.drop(columns="GPU ms")


def _bytes(event) -> int:
    """What an operator itself reads and writes."""
    name, shapes = event.name.removeprefix("aten::"), event.input_shapes
    inner = [child for child in event.cpu_children if not child.name.startswith("cu")]  # cudaLaunchKernel is none
    if name in VIEWS or (inner and name not in MOVERS):
        return 0
    result = max(event.device_memory_usage if event.use_device else event.cpu_memory_usage, 0)
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
    size, times, numbers = (8192, 8, 2**29) if device.type == "cuda" else (1024, 1, 2**25)  # what fills the device
    a, big = torch.randn(size, size, device=device).to(dtype), torch.ones(numbers, device=device)
    target, small = torch.empty_like(big), torch.ones(1, device=device)
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        called = torch.jit.script(_smallest)

    def several(work: Callable[[], object]) -> float:
        return min(timings(lambda: [work() for _ in range(times)], device)) / times

    return {
        "GFLOP/s": 2 * size**3 / several(lambda: a @ a) / 1e9,
        "GB/s": 2 * big.nbytes / several(lambda: target.copy_(big)) / 1e9,
        "µs a call": min(timings(lambda: called(small), device)) / 1000 * 1e6,
    }


def _smallest(small: torch.Tensor):
    for _ in range(1000):
        small.add_(1)


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
