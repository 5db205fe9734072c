"""How long a reply takes: parity first, then interleaved rounds, medians and 95th percentiles."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers.batches import Pairs, Prepared
from helpers.decoding import GreedySearch
from helpers.deploy import BlockSearch, captured, compiled, exported, quantised, script
from helpers.evaluation import evaluate
from helpers.model import Seq2Seq
from helpers.run import Run, machine, products, seconds, write_text
from helpers.text import EOS, PAD, SOS
from helpers.training import load_model, require_own_data

Search = Callable[[Tensor, Tensor, int], Tensor]
TIE = 1e-4  # two logits closer than this may change places between two ways of computing them
PERPLEXITY_OFF, EQUAL_REPLIES = 0.01, 0.9  # what a lossy variant may change at most, and must leave equal at least
TURN, CALLS = 5, 15  # calls of one search in a row, and the fewest that are timed in all
BLOCK = 5  # decoding steps in one CUDA graph


class Subject(NamedTuple):
    """A model to be measured, what it is asked, how long its replies may be, and what else it is compared with."""

    name: str
    model: Seq2Seq
    test: Pairs
    max_words: int
    textbook: Callable[..., Tensor] | None = None  # (model, query, lengths, max_words), answers one query at a time


class Variant(NamedTuple):
    """A way of answering: `build()` gives its search and, where it is lossy, the model to take the perplexity of."""

    build: Callable[[], tuple[Search, nn.Module | None]]
    lossy: bool = False
    missing: str = ""  # why it cannot be had here


def variants(subject: Subject, compilation: bool) -> dict[str, Variant]:
    """All ways that the table knows: the textbook's and eager, the yardsticks, then those that must not fail parity."""
    model, textbook = subject.model, subject.textbook
    cuda = model.embedding.weight.is_cuda
    compiler = "" if compilation else "compilation was not asked for"
    graphs = "" if cuda else "not measured: it takes a CUDA device"
    blocks = partial(BlockSearch, longest_query=subject.test.queries.size(1))
    recorded = partial(blocks, count=BLOCK, build_encoder=captured)
    tf32 = products("tf32")(captured)

    def fused(steps, example):
        return captured(compiled(steps, example), example)

    kernels = "its int8 kernels are for CPUs" if cuda else ""
    return {
        "textbook": Variant(lambda: (partial(textbook, model), None), False, "" if textbook else "notebook 07 has it"),
        "eager": Variant(lambda: (GreedySearch(model).eval(), None)),
        "TorchScript": Variant(lambda: (script(model), None)),
        "TorchScript int8": Variant(lambda: (search := script(quantised(model)), search.model), True, kernels),
        "C++": Variant(tuple, missing="deploy/chat.cpp works on a CPU, in notebook 07"),
        "torch.compile": Variant(lambda: (blocks(model, compiled), None), False, compiler),
        "AOTInductor": Variant(lambda: (blocks(model, exported), None), False, compiler),
        "CUDA graphs": Variant(lambda: (recorded(model, captured), None), False, graphs),
        "CUDA graphs, compiled": Variant(lambda: (recorded(model, fused), None), False, graphs or compiler),
        "CUDA graphs TF32": Variant(lambda: (recorded(model, tf32, build_encoder=tf32), model), True, graphs),
        "CUDA graphs bf16": Variant(lambda: (recorded(low := deepcopy(model).bfloat16(), captured), low), True, graphs),
    }


@torch.no_grad()
def answers(search: Search, pairs: Pairs, max_words: int, size: int = 64) -> Tensor:
    """Ids (examples, max_words) that a search gives in batches of `size`; what follows a reply's EOS is PAD."""
    rows = []
    for indices in torch.arange(len(pairs)).split(size):
        batch = pairs.batch(indices)
        ids = search(batch.query, batch.query_lengths, max_words)
        rows.append(functional.pad(ids, (0, max_words - ids.size(1)), value=PAD))
    ids = torch.cat(rows)
    is_end = (ids == EOS).int()
    return ids.masked_fill(is_end.cumsum(1) - is_end > 0, PAD)


@torch.no_grad()
def parity(model: Seq2Seq, pairs: Pairs, expected: Tensor, found: Tensor) -> dict[str, int]:
    """How many of two searches' `answers` are identical, tied or different.
    `tied` are those that first differ where the two words' logits lie within 1e-4 of each other."""
    counts = {"identical": int((expected == found).all(1).sum()), "tied": 0, "different": 0}
    for row in (expected != found).any(1).nonzero().flatten().tolist():
        first = int((expected[row] != found[row]).nonzero()[0])
        batch = pairs.batch(torch.tensor([row]))
        inputs = functional.pad(expected[row, :first], (1, 0), value=SOS).unsqueeze(0)
        logits = model(batch.query, batch.query_lengths, inputs)[0, -1]
        near = abs(float(logits[expected[row, first]] - logits[found[row, first]])) < TIE
        counts["tied" if near else "different"] += 1
    return counts


@torch.no_grad()
def measure(searches: dict[str, Search], pairs: Pairs, size: int, max_words: int, replies: int) -> dict[str, list]:
    """Seconds that each search takes for a batch of `size` replies, of at least `replies` replies.
    The searches take turns of a few calls, so that a slower moment of the machine hits all alike. The first turn does
    not count, and neither does the first call of any: whoever answers in one way has that way's weights in the
    processor's cache, not those of the way before. The device is synchronised before each look at the clock.
    The textbook answers queries one after the other: of each batch it gets one, and its seconds are a reply's."""
    device, taken = pairs.queries.device, {name: [] for name in searches}
    for start in range(-TURN, max(-(-replies // size), CALLS), TURN):
        batches = [pairs.batch(torch.arange(size * n, size * (n + 1)) % len(pairs)) for n in range(start, start + TURN)]
        for name, search in searches.items():
            rows = 1 if name == "textbook" else size
            calls = [partial(search, batch.query[:rows], batch.query_lengths[:rows], max_words) for batch in batches]
            calls[0]()
            values = [seconds(call, device) for call in calls]
            taken[name] += values if start >= 0 else []
    return taken


def table(subject: Subject, sizes: list[int], queries: int, replies: int, compilation: bool) -> tuple[list, dict]:
    """The rows of one model, a variant and batch size each, and why the variants that are left out are.
    A variant is compared with eager on the first `queries` of `test` at each size; only one that passes is timed. Exact
    ones must not differ but by ties. Lossy ones must keep the perplexity over all of `test` within 1% and give 90% of
    the replies unchanged. Milliseconds are per reply: a call's time divided by the batch size."""
    name, model, test, max_words, _ = subject
    subset, left_out, rows, searches, expected = test.first(queries), {}, [], {}, {}
    true_perplexity = evaluate(model, test).perplexity
    if compilation:
        torch.compiler.reset()  # of what the model before left behind
    for variant, (build, lossy, missing) in variants(subject, compilation).items():
        if missing:
            left_out[variant] = missing
            continue
        try:
            search, scorer = build()
            once = variant == "textbook"  # which knows no batches
            ids = {size: answers(search, subset, max_words, size) for size in sizes[: 1 if once else None]}
            ids = dict.fromkeys(sizes, ids[sizes[0]]) if once else ids
            perplexity = evaluate(scorer, test).perplexity if lossy else true_perplexity
        except Exception as error:  # compilers and old or new releases fail in all sorts of ways
            if variant in ("textbook", "eager", "TorchScript"):
                raise
            reason = (str(error).strip() or "no message").splitlines()[0]
            left_out[variant] = f"{type(error).__name__}: {reason[:150]}"
            continue
        searches[variant], expected = search, ids if variant == "eager" else expected
        rows += [
            {"model": name, "variant": variant, "batch": size, "ids": ids[size], "lossy": lossy,
             "perplexity": perplexity if lossy or variant == "eager" else None} for size in sizes
        ]  # fmt: skip
    for row in rows:
        counts = parity(model, subset, expected[row["batch"]], row.pop("ids"))
        agrees = counts["different"] == 0
        if row.pop("lossy"):
            near = abs(row["perplexity"] / true_perplexity - 1) < PERPLEXITY_OFF
            agrees = near and counts["identical"] / len(subset) >= EQUAL_REPLIES
        row |= counts | {"compared": len(subset), "parity": agrees}
    for variant in {row["variant"] for row in rows if not row["parity"]}:
        del searches[variant]  # at one size is enough: it is not timed at the others either
    for size in sizes:
        taken = measure(searches, test, size, max_words, replies)
        replied = {variant: 1 if variant == "textbook" else size for variant in taken}
        median = {variant: float(np.median(values)) / replied[variant] for variant, values in taken.items()}
        for row in [row for row in rows if row["batch"] == size and row["variant"] in taken]:
            own, values, count = median[row["variant"]], taken[row["variant"]], replied[row["variant"]]
            row |= {
                "p50 ms": 1e3 * own, "p95 ms": 1e3 * float(np.percentile(values, 95)) / count,
                "replies/s": 1 / own, "vs eager": median["eager"] / own,
                "vs textbook": median.get("textbook", np.nan) / own, "timed": count * len(values),
            }  # fmt: skip
    return rows, left_out


def report(
    run: Run, device: torch.device, sizes: list[int], queries: int, replies: int, full: bool, *others: Subject,
    textbook: Callable[..., Tensor] | None = None,
) -> dict:  # fmt: skip
    """The table of a run's model, and of others beside it, kept in its latency.csv; `full` adds what compiles.
    Returns plain data: rows, what is left out and why, and the machine.
    Raises UserError if the run's checkpoint was trained on other data."""
    model, vocabulary, settings, _ = load_model(run.checkpoint, device)
    data = Prepared.load(run.data)
    require_own_data(run, data)
    name = f"run's: {settings.hidden_size} hidden, {settings.layers} layer(s), {len(vocabulary):,} words"
    own = Subject(name, model, data.splits["test"].to(device), settings.max_response_words + 1, textbook)
    rows, left_out = [], {}
    for subject in (own, *others):
        more, missing = table(subject, sizes, queries, replies, full)
        rows, left_out = rows + more, left_out | missing
    write_text(run.latency, pd.DataFrame(rows).to_csv(index=False))
    return {"machine": machine(device), "left out": left_out, "rows": rows}


def as_table(rows: list[dict]) -> pd.DataFrame:
    """The rows for reading: parity as identical/compared, a variant that failed it without times.
    `wait ms` is the median of a whole call, which is what whoever asks waits for."""
    table = pd.DataFrame(rows).astype({"parity": object})
    for number, row in enumerate(rows):
        others = "".join(f", {row[kind]} {kind}" for kind in ("tied", "different") if row[kind])
        counts = "{identical}/{compared}".format(**row) + others
        table.loc[number, "parity"] = counts if row["parity"] else f"FAILED: {counts}"
    table.insert(table.columns.get_loc("p95 ms") + 1, "wait ms", table["p50 ms"] * table["batch"])
    return table.drop(columns=["identical", "tied", "different", "compared", "timed"], errors="ignore")
