"""How long a reply takes: parity first, then interleaved rounds, medians and 95th percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.batches import Pairs

Search = Callable[[Tensor, Tensor, int], Tensor]
TIE = 1e-4  # two logits closer than this may change places between two ways of computing them


@torch.no_grad()
def parity(model, reference: Search, variant: Search, pairs: Pairs, max_words: int) -> dict[str, int]:
    """Compare the ids of both searches over all queries: how many are identical, tied or different.

    `tied` counts replies that first differ where the two best logits of `model` lie within 1e-4.
    """
    counts = {"identical": 0, "tied": 0, "different": 0}
    for batch in pairs.in_order(64):
        a = reference(batch.query, batch.query_lengths, max_words)
        b = variant(batch.query, batch.query_lengths, max_words)
        for row in range(len(a)):
            counts[_compare(model, batch.query[row : row + 1], batch.query_lengths[row : row + 1], a[row], b[row])] += 1
    return counts


def _compare(model, query: Tensor, lengths: Tensor, a: Tensor, b: Tensor) -> str:
    length = max(len(a), len(b))
    a = torch.nn.functional.pad(a, (0, length - len(a)))
    b = torch.nn.functional.pad(b, (0, length - len(b)))
    where = (a != b).nonzero()
    if len(where) == 0:
        return "identical"
    first = int(where[0])
    inputs = torch.cat([a.new_tensor([1]), a[:first]]).unsqueeze(0)
    logits = model(query, lengths, inputs)[0, -1]
    return "tied" if abs(float(logits[a[first]] - logits[b[first]])) < TIE else "different"


@torch.no_grad()
def measure(
    variants: dict[str, Search], pairs: Pairs, batch_sizes: list[int], max_words: int, replies: int = 100
) -> pd.DataFrame:
    """Time every variant at every batch size on the same queries, in rounds that take all variants in turn.

    At least `replies` replies are timed for each row, after two rounds that are not. A row holds p50 and p95 in
    milliseconds for one call (one batch of replies), replies per second, and the ratio of the first variant's p50 to
    the row's.
    """
    device = pairs.queries.device
    rows = []
    for size in batch_sizes:
        rounds = max(-(-replies // size), 10) + 2
        batches = [pairs.batch(torch.arange(i * size, (i + 1) * size) % len(pairs)) for i in range(rounds)]
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number, batch in enumerate(batches):
            for name, search in variants.items():
                _synchronise(device)
                start = time.perf_counter()
                search(batch.query, batch.query_lengths, max_words)
                _synchronise(device)
                if number >= 2:
                    seconds[name].append(time.perf_counter() - start)
        first = float(np.median(next(iter(seconds.values()))))
        for name, values in seconds.items():
            median = float(np.median(values))
            rows.append({
                "device": device.type, "variant": name, "batch": size,
                "p50 ms": 1e3 * median, "p95 ms": 1e3 * float(np.percentile(values, 95)),
                "replies/s": size / median, "speed-up": first / median, "timed": size * len(values),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
