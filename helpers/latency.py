"""How long a reply takes: parity first, then interleaved rounds, medians and 95th percentiles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers import stepwise
from helpers.batches import BucketedSampler, Pairs, Prepared
from helpers.checkpoint import load_model
from helpers.decoding import GreedySearch
from helpers.deploy import BlockSearch, captured, compiled, exported, quantised, script
from helpers.model import Seq2Seq
from helpers.run import Run, machine, seconds, shown, write_text
from helpers.settings import Settings, UserError
from helpers.text import EOS, PAD, SOS, UNK
from helpers.training import Objective, evaluate, new_model, new_optimizer, take_step

Search = Callable[[Tensor, Tensor, int], Tensor]
TIE = 1e-4  # two logits closer than this may change places between two ways of computing them
PERPLEXITY_OFF, EQUAL_REPLIES = 0.01, 0.9  # what a lossy variant may change at most, and must leave equal at least
TURN, CALLS = 5, 15  # calls of one search in a row, and the fewest that are timed in all
BLOCK = 5  # decoding steps in one CUDA graph
# The size of the classic tutorial, which most readers' own figures are about.
CLASSIC = Settings(embedding_size=500, hidden_size=500, layers=2, attention="dot", tie_weights=False, clip=0.0)
CLASSIC_WORDS, CLASSIC_REPLY, CLASSIC_UPDATES = 7_800, 10, 150


class Variant(NamedTuple):
    """A way of answering: `build()` gives its search and, where it is lossy, the model to take the perplexity of."""

    build: Callable[[], tuple[Search, nn.Module | None]]
    lossy: bool = False
    missing: str = ""  # why it cannot be had here


def variants(model: Seq2Seq, longest_query: int, compilation: bool) -> dict[str, Variant]:
    """All ways that the table knows: the textbook's and eager, the yardsticks, then those that must not fail parity."""
    cuda = model.embedding.weight.is_cuda
    compiler = "" if compilation else "compilation was not asked for"
    graphs = "" if cuda else "not measured: it takes a CUDA device"
    blocks = partial(BlockSearch, longest_query=longest_query)

    def int8() -> tuple[Search, nn.Module]:
        scripted = script(quantised(model))
        return scripted, scripted

    def bf16() -> tuple[Search, nn.Module]:
        half = copy.deepcopy(model).to(torch.bfloat16)
        return blocks(half, captured, count=BLOCK), half

    return {
        "textbook": Variant(lambda: (partial(stepwise.greedy, model), None)),
        "eager": Variant(lambda: (GreedySearch(model).eval(), None)),
        "TorchScript": Variant(lambda: (script(model), None)),
        "TorchScript int8": Variant(int8, True, "its int8 kernels are for CPUs" if cuda else ""),
        "torch.compile": Variant(lambda: (blocks(model, compiled), None), False, compiler),
        "AOTInductor": Variant(lambda: (blocks(model, exported), None), False, compiler),
        "CUDA graphs": Variant(lambda: (blocks(model, captured, count=BLOCK), None), False, graphs),
        "CUDA graphs bf16": Variant(bf16, True, graphs),
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
def parity(model: Seq2Seq, pairs: Pairs, expected: Tensor, given: Tensor) -> dict[str, int]:
    """How many of two searches' `answers` are identical, tied or different.

    `tied` are those that first differ where the two words' logits lie within 1e-4 of each other.
    """
    counts = {"identical": int((expected == given).all(1).sum()), "tied": 0, "different": 0}
    for row in (expected != given).any(1).nonzero().flatten().tolist():
        first = int((expected[row] != given[row]).nonzero()[0])
        batch = pairs.batch(torch.tensor([row]))
        inputs = functional.pad(expected[row, :first], (1, 0), value=SOS).unsqueeze(0)
        logits = model(batch.query, batch.query_lengths, inputs)[0, -1]
        near = abs(float(logits[expected[row, first]] - logits[given[row, first]])) < TIE
        counts["tied" if near else "different"] += 1
    return counts


@torch.no_grad()
def measure(searches: dict[str, Search], pairs: Pairs, size: int, max_words: int, replies: int) -> dict[str, list]:
    """Seconds that each search takes for a batch of `size` replies, of at least `replies` replies.

    The searches take turns of a few calls, so that a slower moment of the machine hits all alike. The first turn does
    not count, and neither does the first call of any: whoever answers in one way has that way's weights in the
    processor's cache, not those of the way before. The device is synchronised before each look at the clock.
    """
    device, taken = pairs.queries.device, {name: [] for name in searches}
    for start in range(-TURN, max(-(-replies // size), CALLS), TURN):
        some = [torch.arange(number * size, (number + 1) * size) % len(pairs) for number in range(start, start + TURN)]
        batches = [pairs.batch(indices) for indices in some]
        for name, search in searches.items():
            calls = [partial(search, batch.query, batch.query_lengths, max_words) for batch in batches]
            calls[0]()
            values = [seconds(call, device) for call in calls]
            taken[name] += values if start >= 0 else []
    return taken


def table(
    name: str,
    model: Seq2Seq,
    test: Pairs,
    max_words: int,
    sizes: list[int],
    queries: int,
    replies: int,
    compilation: bool,
) -> tuple[list[dict], dict[str, str]]:
    """The rows of one model, a variant and batch size each, and why the variants that are left out are.

    A variant is compared with eager on the first `queries` of `test` at each size; only one that passes is timed.
    Exact ones must not differ but by ties. Lossy ones must keep the perplexity over all of `test` within 1% and give
    90% of the replies unchanged. Milliseconds are per reply: a call's time divided by the batch size.
    """
    some, left_out, rows, searches, expected = test.first(queries), {}, [], {}, {}
    true_perplexity = evaluate(model, test).perplexity
    if compilation:
        torch.compiler.reset()  # of what the model before left behind
    for variant, (build, lossy, missing) in variants(model, int(test.query_lengths.max()), compilation).items():
        if missing:
            left_out[variant] = missing
            continue
        try:
            search, scorer = build()
            ids = {size: answers(search, some, max_words, size) for size in sizes}
            now = evaluate(scorer, test).perplexity if lossy else true_perplexity
        except Exception as error:  # compilers and old or new releases fail in all sorts of ways
            if variant in ("textbook", "eager", "TorchScript"):
                raise
            reason = (str(error).strip() or "no message").splitlines()[0]
            left_out[variant] = f"{type(error).__name__}: {reason[:150]}"
            continue
        expected = ids if variant == "eager" else expected
        searches[variant] = search
        rows += [
            {"model": name, "variant": variant, "batch": size, "ids": ids[size], "lossy": lossy, "perplexity": now}
            for size in sizes
        ]
    for row in rows:
        counts = parity(model, some, expected[row["batch"]], row.pop("ids"))
        kept = (
            counts["identical"] / len(some) >= EQUAL_REPLIES
            and abs(row["perplexity"] / true_perplexity - 1) < PERPLEXITY_OFF
        )
        row |= counts | {"compared": len(some), "parity": kept if row.pop("lossy") else counts["different"] == 0}
    for variant in {row["variant"] for row in rows if not row["parity"]}:
        del searches[variant]  # at one size is enough: it is not timed at the others either
    for size in sizes:
        taken = measure(searches, test, size, max_words, replies)
        p50 = {variant: float(np.median(values)) for variant, values in taken.items()}
        for row in rows:
            if row["batch"] == size and row["variant"] in taken:
                values = taken[row["variant"]]
                median = p50[row["variant"]]
                row |= {
                    "p50 ms": 1e3 * median / size, "p95 ms": 1e3 * float(np.percentile(values, 95)) / size,
                    "replies/s": size / median, "vs eager": p50["eager"] / median,
                    "vs textbook": p50.get("textbook", np.nan) / median, "timed": size * len(values),
                }  # fmt: skip
    return rows, left_out


def report(run: Run, device: torch.device, sizes: list[int], queries: int, replies: int, full: bool) -> dict:
    """The table of a run's model, kept in its latency.csv; `full` adds what compiles and the classic size.

    Returns plain data: rows, what is left out and why, and the machine. Raises UserError if the run's checkpoint has
    another vocabulary than its data.
    """
    model, vocabulary, settings = load_model(run.checkpoint, device)
    data = Prepared.load(run.data)
    if vocabulary.words != data.vocabulary.words:
        raise UserError(
            f"{shown(run.checkpoint)} was trained with another vocabulary than {shown(run.data)}: train again."
        )
    size = f"{settings.hidden_size} hidden, {settings.layers} layer(s), {len(vocabulary):,} words"
    models = [(f"run's: {size}", model, data.splits["test"].to(device), settings.max_response_words + 1)]
    if full:
        models.append(
            (f"classic: 500 hidden, 2 layers, {CLASSIC_WORDS:,} words", *classic(data, device), CLASSIC_REPLY)
        )
    rows, left_out = [], {}
    for name, model, test, max_words in models:
        more, missing = table(name, model, test, max_words, sizes, queries, replies, compilation=full)
        rows, left_out = rows + more, left_out | missing
    write_text(run.latency, pd.DataFrame(rows).to_csv(index=False))
    return {"machine": machine(device), "left out": left_out, "rows": rows}


def classic(data: Prepared, device: torch.device) -> tuple[Seq2Seq, Pairs]:
    """A model of the classic tutorial's size that answers in exactly ten words, and test exchanges to compare it on.

    It is trained for a moment on the run's own exchanges, with each response's words repeated to ten and no EOS:
    random weights have near ties everywhere, which says nothing about what a variant loses.
    """

    def ten_words(pairs: Pairs) -> Pairs:
        places = torch.arange(CLASSIC_REPLY) % (pairs.response_lengths - 1).unsqueeze(1)
        ids = [pairs.queries, pairs.responses.gather(1, places)]
        queries, responses = (part.masked_fill(part >= CLASSIC_WORDS, UNK) for part in ids)
        lengths = torch.full_like(pairs.response_lengths, CLASSIC_REPLY)
        return Pairs(queries, pairs.query_lengths, responses, lengths).to(device)

    train = ten_words(data.splits["train"])
    model = new_model(CLASSIC, CLASSIC_WORDS).to(device)
    objective, optimizer = Objective(model), new_optimizer(model, CLASSIC)
    batches = BucketedSampler(train, CLASSIC.batch_size, CLASSIC.seed).from_update(0)
    with torch.random.fork_rng():
        for update in range(CLASSIC_UPDATES):
            take_step(objective, optimizer, train, next(batches), CLASSIC, update, "fp32")
    return model.eval().requires_grad_(False), ten_words(data.splits["test"])


def as_table(rows: list[dict]) -> pd.DataFrame:
    """The rows for reading: parity as identical/compared, a variant that failed it without times.

    The perplexity stands with eager and with those that change it. `wait ms` is the median of a whole call, which is
    what whoever asks waits for.
    """
    table = pd.DataFrame(rows)
    own = table["variant"].eq("eager") | table["perplexity"].ne(
        table["model"].map(table[table["variant"] == "eager"].groupby("model")["perplexity"].first())
    )
    table["perplexity"] = table["perplexity"].where(own)
    table["parity"] = [
        ("" if row["parity"] else "FAILED: ")
        + "{identical}/{compared}".format(**row)
        + "".join(f", {row[kind]} {kind}" for kind in ("tied", "different") if row[kind])
        for row in rows
    ]
    table.insert(table.columns.get_loc("p95 ms") + 1, "wait ms", table["p50 ms"] * table["batch"])
    return table.drop(columns=["identical", "tied", "different", "compared", "timed"], errors="ignore")
