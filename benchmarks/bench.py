"""This project against the classic tutorial's way, side by side in one run: preparing, training, answering.

    python -m benchmarks.bench --device cpu --json results/bench-DEVICE.json    # what `make bench` calls

The ways take turns, so that a machine that is busy for a while slows both. Where memory or the C library's settings
count, in preparing and training, each side works in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import multiprocessing
import multiprocessing.pool
import os
import random
import re
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import textbook, world
from benchmarks.results import result_path
from helpers import training
from helpers.batches import Batch, BucketedSampler, Pairs, prepare
from helpers.corpus import read_corpus
from helpers.decoding import greedy
from helpers.evaluation import evaluate
from helpers.model import Seq2Seq, new_model
from helpers.profiling import machine_peaks
from helpers.run import choose_device, machine, products, seconds, write_json
from helpers.settings import Settings, UserError, command_line, load_profile
from helpers.text import PAD, Vocabulary

LINES = (30_000, 304_713, 3_000_000)  # the middle one is the whole Cornell corpus's number
WORDS = 7_800  # of the vocabulary that training and decoding are timed with
LOSS = 1.5  # nats per token, the validation loss that both ways are to reach
ROUNDS, UPDATES = 5, 16  # the same batches in every round
# What `make` sets for every process of ours: glibc keeps freed memory for the next tensors, in place of giving it back
# to the system, which hands it out again page by page.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
# Our way in bf16 with one of its gains left out, to see what each is worth.
WITHOUT = ("bf16, step by step", "bf16, random batches")


def bench(device: torch.device) -> dict:
    """Measure everything, print the table, and return the figures."""
    started = time.perf_counter()
    found = {"machine": machine(device), "peaks": peaks(device)}
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "scale": lambda: scale(Path(folder)),
            "preparation": lambda: preparation(Path(folder) / str(LINES[1])),
            "training": lambda: updates(device),
            "replies": lambda: replies(device),
            "time to a loss": lambda: time_to_a_loss(Path(folder), device),
        }
        for part, work in parts.items():
            begun = time.perf_counter()
            found[part] = work()
            print(f"{part}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    found["seconds"] = round(time.perf_counter() - started)
    print(compared(found).to_string(float_format="{:,.2f}".format, na_rep=""))
    for name, value in found["peaks"].items():
        print(f"measured peak, {name}: {value:,.0f}")
    return found


def compared(found: dict) -> pd.DataFrame:
    """A row a measurement: both ways' medians, the medians' ratio, the least and greatest ratio of any round, and the
    share of the machine's matrix peak that ours reached."""
    answered, reached = found["replies"], found.get("time to a loss")
    textbook, shares, pairs = found["training"]["textbook"]["tokens"], {}, {}
    if prepared := found.get("preparation"):
        pairs = {"corpus lines/s": (prepared["textbook"], prepared["ours"])}
    for way, rates in found["training"].items():
        if way != "textbook":
            name, peak = f"training, {way}: target tokens/s", found["peaks"][f"{way[:4]} GFLOP/s"]
            pairs[name], shares[name] = (textbook, rates["tokens"]), np.median(rates["flops"]) / 1e9 / peak
    pairs |= {f"replies/s, {size}": (answered["textbook"], answered[size]) for size in ("batch 1", "batch 64")}
    if reached:
        hourly = [[3600 / reached[way]["seconds"]] for way in ("textbook", "ours")]
        pairs[f"whole trainings per hour to loss {LOSS}"] = tuple(hourly)
    rows = []
    for name, (theirs, ours) in pairs.items():
        ratios, medians = np.divide(ours, theirs), (np.median(theirs), np.median(ours))
        rows.append({
            "measured": name, "textbook": medians[0], "ours": medians[1], "ratio": medians[1] / medians[0],
            "low": ratios.min(), "high": ratios.max(), "share of peak": shares.get(name),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("measured")


def peaks(device: torch.device) -> dict[str, float]:
    """The machine's limits: the best of several large matrix products in both precisions, and of large copies."""
    found = {}
    for precision in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"):
        with products(precision):
            peak = machine_peaks(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        found[f"{precision} GFLOP/s"] = peak["GFLOP/s"]
    return found | {"copy GB/s": peak["GB/s"]}


def scale(folder: Path) -> list[dict]:
    """Seconds and peak memory of preparing generated corpora of 30 thousand, 300 thousand and 3 million lines."""
    found, small = [], read_corpus("sample")
    for wanted in LINES:
        exchanges = round(wanted * len(small.exchanges) / small.lines)
        source = world.write_corpus(folder / str(wanted), exchanges=exchanges)
        taken, memory = _alone(_prepare, "ours", source)
        found.append({"lines": _lines(source), "seconds": taken, "MB": memory})
    return found


def preparation(source: Path) -> dict[str, list[float]]:
    """Lines per second of both ways of preparing one corpus, taking turns."""
    found = {way: [] for way in ("textbook", "ours")}
    for _ in range(3):
        for way, rates in found.items():
            rates.append(_lines(source) / _alone(_prepare, way, source)[0])
    return found


def _lines(source: Path) -> int:
    with open(source / "movie_lines.txt", "rb") as file:
        return sum(1 for _ in file)


def updates(device: torch.device) -> dict:
    """Target tokens and floating-point operations (of matrix products) a second, round by round, of all ways."""
    found = {name: {"tokens": [], "flops": []} for name in ("textbook", "fp32", "bf16", *WITHOUT)}
    with process("textbook") as theirs, process("ours") as ours:
        for _ in range(ROUNDS):
            for name, values in found.items():
                pool = theirs if name == "textbook" else ours
                tokens, flops = pool.apply(_train, (name, device))
                values["tokens"].append(tokens)
                values["flops"].append(flops)
    return found


def replies(device: torch.device) -> dict[str, list[float]]:
    """Replies per second from equal weights: the tutorial's search, one query at a time, and ours at two sizes."""
    settings = load_profile("classic")
    pairs, _, vocabulary = made_up_dialogue()
    model = new_model(settings, len(vocabulary)).to(device).eval()
    batch = pairs.to(device).batch(torch.arange(64))
    one = [(batch.query[i : i + 1, : int(n)], n.view(1)) for i, n in enumerate(batch.query_lengths)]
    ways: dict[str, Callable] = {
        "textbook": lambda: textbook.textbook_greedy(model, batch.query, batch.query_lengths, 10),
        "batch 1": lambda: [greedy(model, query, length, 10) for query, length in one],
        "batch 64": lambda: greedy(model, batch.query, batch.query_lengths, 10),
    }
    found = {name: [] for name in ways}
    for turn in range(4):
        for name, way in ways.items():
            taken = seconds(way, device)
            if turn:
                found[name].append(64 / taken)
    return found


def time_to_a_loss(folder: Path, device: torch.device) -> dict:
    """Seconds of a whole process, imports and preparation included, until the validation loss is `LOSS`.

    Both train the classic size with the classic settings on the embedded corpus, once each, and check every 25 updates.
    Raises UserError if either does not come to that loss.
    """
    source = world.write_corpus(folder / "sample")
    found = {}
    for way in ("ours", "textbook"):
        start = time.perf_counter()
        (loss, updates), _ = _alone(_reach, way, source, device)
        found[way] = {"seconds": time.perf_counter() - start, "loss": loss, "updates": updates}
    return found


def made_up_dialogue(examples: int = 6400) -> tuple[Pairs, list[textbook.Pair], Vocabulary]:
    """Exchanges to time training with, as ids and as text, and their vocabulary of 7,800 words.

    Lengths of 2 to 9 words are as likely as one another, and words follow Zipf's law: near what the tutorial's filter
    leaves of the movie dialogue.
    """
    randomness = random.Random(1)
    words = [f"w{number}" for number in range(WORDS)]
    shares = [1 / rank for rank in range(1, WORDS + 1)]
    texts = [randomness.choices(words, shares, k=randomness.randint(2, 9)) for _ in range(2 * examples)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    vocabulary = Vocabulary(words)
    return Pairs.from_words(pairs, vocabulary), [[" ".join(q), " ".join(r)] for q, r in pairs], vocabulary


def stepwise_loss(model: Seq2Seq, batch: Batch, teacher_forcing: bool = True) -> tuple[Tensor, Tensor]:
    """The same as `batch_loss`, from one decoding step after another."""
    memory, state = model.encode(batch.query, batch.query_lengths)
    losses = []
    for words, targets in zip(batch.inputs.unbind(1), batch.targets.unbind(1), strict=True):
        logits, state = model.step(words, state, memory)
        losses.append(functional.cross_entropy(logits.float(), targets, ignore_index=PAD, reduction="sum"))
    return torch.stack(losses).sum(), (batch.targets != PAD).sum()


class Worker:
    """What a process of `updates` keeps between rounds: models, optimisers and batches.

    A way is `textbook`, or a precision and what else there is to say: `bf16, graphs, batch 512`.
    """

    def __init__(self, device: torch.device, examples: int = 6400) -> None:
        seed()
        pairs, self.texts, self.vocabulary = made_up_dialogue(examples)
        self.device = device
        self.pairs = {where: pairs.to(where) for where in {device, torch.device("cpu")}}
        self.updates: dict[str, Callable[[], int]] = {}
        self.flops: dict[str, float] = {}  # of a target token

    def train(self, way: str) -> tuple[float, float]:
        """Some updates: target tokens and floating-point operations per second."""
        if way not in self.updates:
            kind = re.sub(r"^(tf32|bf16)", "fp32", re.sub(r", (graphs|batch \d+)", "", way))
            if kind not in self.flops:  # counted on the CPU, where the GRUs' products can be seen
                with FlopCounterMode(display=False) as counter:
                    tokens = self.update_of(kind, torch.device("cpu"))()
                self.flops[way] = self.flops[kind] = counter.get_total_flops() / tokens
            self.flops[way], self.updates[way] = self.flops[kind], self.update_of(way, self.device)
            for _ in range(UPDATES * (3 if "graphs" in way else 1)):  # to warm up: a graph is recorded the second time
                self.updates[way]()
        tokens = []
        taken = seconds(lambda: tokens.extend(self.updates[way]() for _ in range(UPDATES)), self.device)
        return sum(tokens) / taken, sum(tokens) * self.flops[way] / taken

    def update_of(self, way: str, device: torch.device) -> Callable[[], int]:
        """A new model's update, which returns its target tokens: on random batches of 64 texts by the tutorial, by us
        on `UPDATES` batches of similar length in turn."""
        if way == "textbook":
            trainer = textbook.StepwiseTrainer(self.vocabulary.ids, device)
            return lambda: trainer.train([random.choice(self.texts) for _ in range(64)])[1]
        settings, pairs = load_profile("classic").change(cuda_graphs="graphs" in way), self.pairs[device]
        size = int(way.rpartition("batch ")[2]) if "batch " in way else 64
        trainer = training.Trainer(new_model(settings, len(self.vocabulary)).to(device).train(), settings, way[:4])
        batches = list(itertools.islice(BucketedSampler(pairs, size, 1).from_update(0), UPDATES))
        if "random" in way:
            batches = [torch.randint(len(pairs), (size,)) for _ in range(UPDATES)]
        order = itertools.cycle(batches)
        loss = stepwise_loss if "step by step" in way else training.batch_loss

        def update() -> int:
            with unittest.mock.patch("helpers.training.batch_loss", loss):
                return trainer.launch(pairs, next(order), 0).facts["tokens"]

        return update


_worker: Worker | None = None


def _train(way: str, device: torch.device) -> tuple[float, float]:
    global _worker
    _worker = _worker or Worker(device)
    return _worker.train(way)


def _prepare(way: str, source: Path) -> float:
    settings = Settings(min_count=3)
    start = time.perf_counter()
    if way == "textbook":
        textbook.read_pairs(source, settings.max_query_words, settings.min_count)
    else:
        prepare(read_corpus(source), settings)
    return time.perf_counter() - start


def _reach(way: str, source: Path, device: torch.device) -> tuple[float, int]:
    seed()
    settings = load_profile("classic").change(max_query_words=20, max_response_words=20, min_count=1)
    prepared = prepare(read_corpus(source), settings)
    words, train, validation = prepared.vocabulary, prepared.splits["train"], prepared.splits["validation"].first(512)
    if way == "ours":
        train, validation = train.to(device), validation.to(device)
        model = new_model(settings, len(words)).to(device)
        trainer = training.Trainer(model, settings, training.choose_precision(model, settings, train))
        order = BucketedSampler(train, 64, 1).from_update(0)

        def step(update: int) -> None:
            trainer.step(train, next(order), update)

        def validated() -> float:
            return evaluate(model, validation).per_token

    else:
        texts, held_out = _texts(train, words), _texts(validation, words)
        trainer = textbook.StepwiseTrainer(words.ids, device)

        def step(update: int) -> None:
            trainer.train([random.choice(texts) for _ in range(64)])

        def validated() -> float:
            return trainer.evaluate([held_out[i : i + 64] for i in range(0, len(held_out), 64)])

    for update in range(1, 2001):
        step(update)
        if update % 25 == 0 and (loss := validated()) <= LOSS:
            return loss, update
    raise UserError(f"The {way} way has not come to a loss of {LOSS} in {update} updates: {loss:.2f}. Report this.")


def seed(number: int = 1) -> None:
    """The tutorial's weights and batches come from the global random numbers."""
    random.seed(number)
    torch.manual_seed(number)


def _texts(pairs: Pairs, vocabulary: Vocabulary) -> list[textbook.Pair]:
    rows = zip(pairs.queries.tolist(), pairs.responses.tolist(), strict=True)
    return [[" ".join(vocabulary.decode(query)), " ".join(vocabulary.decode(response))] for query, response in rows]


@contextlib.contextmanager
def process(way: str) -> Iterator[multiprocessing.pool.Pool]:
    """A fresh process, for our own way with the C library's settings that `make` gives it, for the tutorial without."""
    outside = {name: os.environ.pop(name, None) for name in MEMORY}
    os.environ.update({} if way == "textbook" else MEMORY)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for name, value in outside.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        yield pool
        pool.close()
        pool.join()  # so that it ends by itself and lets go of its locks; leaving the block alone would kill it


def _alone(function: Callable, way: str, *arguments) -> tuple:
    """What a function returns in a fresh process, and that process's peak memory in MB."""
    with process(way) as pool:
        return pool.apply(_with_memory, (function, (way, *arguments)))


def _with_memory(function: Callable, arguments: tuple) -> tuple:
    result = function(*arguments)
    try:  # getrusage would give the parent's peak where that was higher
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return result, int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    except OSError:  # not on Linux
        return result, math.nan


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here; DEVICE in it is replaced")
    options = parser.parse_args()
    device = choose_device(options.device)
    found = bench(device)
    if options.json:
        write_json(Path(str(options.json).replace("DEVICE", result_path("", found["machine"]).stem[1:])), found)


if __name__ == "__main__":
    sys.exit(main())
