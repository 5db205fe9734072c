"""Where time and memory go: torch.profiler's counts as tables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule


def profiled(work: Callable[[], object], device: torch.device, steps: int = 5) -> profile:
    """Run `work` with a schedule of one step waiting, two warming up and `steps` recorded."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    plan = schedule(wait=1, warmup=2, active=steps, repeat=1)
    with (
        _quiet_stderr(),
        profile(activities=activities, schedule=plan, profile_memory=True, record_shapes=True, acc_events=True) as prof,
    ):
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


def operator_table(prof: profile, steps: int = 5) -> pd.DataFrame:
    """Per operator and step: calls, self and total milliseconds on the CPU (and the GPU), megabytes allocated."""
    rows = []
    for event in prof.key_averages():
        if event.key.startswith(("ProfilerStep", "step")):
            continue
        row = {
            "operator": event.key.removeprefix("aten::"),
            "calls": event.count / steps,
            "self ms": event.self_cpu_time_total / 1e3 / steps,
            "total ms": event.cpu_time_total / 1e3 / steps,
            "self MB": event.self_cpu_memory_usage / 1e6 / steps,
        }
        if ProfilerActivity.CUDA in prof.activities:
            row["GPU ms"] = event.self_device_time_total / 1e3 / steps
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("self ms", ascending=False, ignore_index=True)
    table.insert(3, "share", table["self ms"] / table["self ms"].sum())
    return table
