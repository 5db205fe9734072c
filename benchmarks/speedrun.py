"""Seconds of a cold start against nats per response: from the classic tutorial's program to ours, one change at a time.

    python -m benchmarks.speedrun --corpus PATH    # what `make speedrun CORPUS=…` calls; results/speedrun-DEVICE.json

Every program reads the same files, Cornell's two without the conversations of held-out movies, and is held to the same
short exchanges of the test's movies, all of whose words each of them knows. The clock starts with the process: imports,
preparation, training and our own validations count; the tutorial's program, which has none, is measured off the clock.
The recipes take turns, one process at a time; one that has found nothing better for a while is stopped. What is in the
file already is not run again.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import textbook
from benchmarks.bench import process, seed
from benchmarks.results import result_path
from helpers.batches import BucketedSampler, Pairs, prepare, split
from helpers.corpus import CONVERSATIONS, LINES, SEPARATOR, read_corpus
from helpers.model import Seq2Seq
from helpers.run import Run, choose_device, display_path, machine, write_json
from helpers.settings import DATA_SETTINGS, Settings, UserError, command_line, load_profile
from helpers.training import fit, new_optimizer

SHORT = 9  # words at most, on both sides: what the tutorial's program reads
SEEDS = 3
LIMIT, PATIENCE = 500, 100  # seconds that a program may take, and without anything better
CORNELL = (LINES, CONVERSATIONS)
TEXTBOOK, FREQUENCIES = "the textbook's program", "+ begin with the words' frequencies"
QUICK = "+ dropout, some queries silent: profile quick"
# Ours, each with what it changes in the one before it, from the profile `classic` to `quick` and `cornell`. The
# frequencies are a change of code, which the recipes before it go without.
RECIPES: dict[str, dict] = {
    "whole sequences, masked, one optimiser": {"precision": "fp32"},
    "+ one layer, smaller, tied weights; long and rare lines, openers": {
        "embedding_size": 256, "hidden_size": 384, "layers": 1, "attention": "general", "tie_weights": True,
        "max_query_words": 20, "max_response_words": 30, "long_queries": "cut", "rare_words": "unknown",
        "openers": True,
    },
    "+ a higher rate that falls, clip 0.25": {
        "learning_rate": 6e-3, "decoder_learning_ratio": 1.0, "schedule": "cosine", "warmup_updates": 20,
        "clip": 0.25, "updates": 800, "validate_every": 100,
    },
    FREQUENCIES: {},
    "+ bf16 where it is faster": {"precision": "auto"},
    QUICK: {"dropout": 0.2, "query_dropout": 0.1},
    "+ larger, more updates, more dropout: profile cornell": {
        "embedding_size": 384, "hidden_size": 512, "updates": 2400, "dropout": 0.4, "validate_every": 200,
    },
}  # fmt: skip


def other_betas(model: Seq2Seq, settings: Settings) -> torch.optim.Optimizer:
    """Our optimiser with a β₂ of 0.98: what is a gradient's usual size is told by fewer updates."""
    optimizer = new_optimizer(model, settings)
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.98)
    return optimizer


class WithMuon(torch.optim.AdamW):
    """Muon for the matrices of encoder, attention and decoder, with steps as long as Adam's (arXiv:2502.16982), and
    AdamW for embeddings, output and biases."""

    def __init__(self, model: Seq2Seq, settings: Settings) -> None:
        inside = [one for name, one in model.named_parameters() if not name.startswith(("embedding.", "output."))]
        matrices = [one for one in inside if one.dim() == 2]
        others = [one for one in model.parameters() if not any(one is matrix for matrix in matrices)]
        super().__init__([{"params": others, "ratio": 1.0}], weight_decay=settings.weight_decay, fused=True)
        self.muon = torch.optim.Muon(matrices, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure=None):
        for matrix in self.muon.param_groups[0]["params"]:
            matrix.grad /= self.grad_scale  # clipped, as the fused optimiser does by itself
        super().step(closure)
        self.muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.muon.step()


class GrowingBatches(BucketedSampler):
    """Batches of half the size, then of the whole, then of one and a half, each for a third of the profile's updates:
    as many examples in as many updates."""

    def __init__(self, pairs: Pairs, batch_size: int, seed: int) -> None:
        super().__init__(pairs, batch_size, seed)
        self.parts = [BucketedSampler(pairs, batch_size * halves // 2, seed + halves) for halves in (1, 2, 3)]

    def from_update(self, update: int) -> Iterator[torch.Tensor]:
        for part in self.parts:
            yield from itertools.islice(part.from_update(0), load_profile("quick").updates // 3 + 1)


# What else was tried, each as one change of QUICK: of settings, or of a part of helpers/training.py.
OTHERS: dict[str, dict] = {
    "an average of the weights, 0.99": {"average": 0.99},
    "AdamW, weight decay 0.01": {"optimizer": "adamw", "weight_decay": 0.01},
    "β₂ 0.98": {},
    "Muon for the matrices": {},
    "batches that grow": {},
}
CODE = {
    "β₂ 0.98": ("new_optimizer", other_betas), "Muon for the matrices": ("new_optimizer", WithMuon),
    "batches that grow": ("BucketedSampler", GrowingBatches),
}  # fmt: skip
PROGRAMS = [TEXTBOOK, *RECIPES, *OTHERS]
Point = tuple[float, int, float]  # seconds since the start, update, nats per response
Texts = list[tuple[str, str]]


def settings_of(recipe: str, number: int) -> Settings:
    """The settings of one of RECIPES, with all changes up to it, or of OTHERS, for a seed. Nothing is held out of
    what it reads."""
    changes: dict = {"validate_every": 50}
    for name, more in RECIPES.items():
        changes |= more
        if name == (QUICK if recipe in OTHERS else recipe):
            break
    changes |= OTHERS.get(recipe, {})
    return load_profile("classic").change(**changes | {"held_out_share": 0, "seed": number})


def part_in_two(source: Path, folder: Path) -> Texts:
    """Write Cornell's two files without the conversations of held-out movies into a folder; returns the test's
    exchanges. Raises UserError for a corpus in other files, which the tutorial's program cannot read."""
    corpus, settings = read_corpus(source), load_profile("cornell")
    parts, unit = split(corpus.exchanges, settings.held_out_share, settings.seed)
    part_of = {exchange.movie: part for exchange, part in zip(corpus.exchanges, parts, strict=True)}
    texts = {}
    with contextlib.ExitStack() as stack:
        root = zipfile.Path(stack.enter_context(zipfile.ZipFile(source))) if zipfile.is_zipfile(source) else source
        inside = list(root.iterdir()) if root.is_dir() else []
        folders = [root, *(path for path in inside if path.is_dir() and path.name != "__MACOSX")]
        for path in [folder / name for folder in folders for name in CORNELL]:
            if path.is_file():
                texts[path.name] = path.read_bytes().decode("iso-8859-1")
    if unit != "movie" or set(texts) != set(CORNELL):
        raise UserError(f"{source} is not {' and '.join(CORNELL)} of several movies, which the classic tutorial reads.")
    for name, text in texts.items():
        lines = text.split("\n")
        if name == CONVERSATIONS:
            lines = [line for line in lines if line and part_of.get(line.split(SEPARATOR)[2], "train") == "train"]
        (folder / name).write_text("\n".join([*filter(None, lines), ""]), encoding="iso-8859-1")
    return [(one.query, one.response) for one in corpus.exchanges if part_of[one.movie] == "test"]


def known_to_all(exchanges: Texts, folder: Path) -> Texts:
    """The short ones among the exchanges, all of whose words are known to every program."""
    _, ids = textbook.read_pairs(folder, SHORT, load_profile("classic").min_count)
    corpus, settings = read_corpus(folder), [settings_of(recipe, 1) for recipe in RECIPES]
    different = {tuple(getattr(one, name) for name in DATA_SETTINGS): one for one in settings}
    readings = [(lambda text: textbook.normalised(text).split(" "), ids)]
    for vocabulary in [prepare(corpus, one).vocabulary for one in different.values()]:
        readings.append((vocabulary.tokenise, vocabulary))

    def known(text: str) -> bool:
        return all(
            0 < len(words := read(text)) <= SHORT and all(word in vocabulary for word in words)
            for read, vocabulary in readings
        )

    return [pair for pair in exchanges if all(map(known, pair))]


def exhausted(points: list[Point], seconds: float) -> bool:
    """Whether a program has had its time, or has found nothing better for a while."""
    best = min(points, key=lambda point: point[2])[0] if points else seconds
    return seconds > LIMIT or seconds - best > PATIENCE


def by_textbook(folder: Path, held_out: Texts, number: int, device: torch.device, started: float) -> list[Point]:
    """The curve of the tutorial's program; `started` is a moment of time.time."""
    seed(number)
    pairs, ids = textbook.read_pairs(folder, SHORT, load_profile("classic").min_count)
    texts = [[textbook.normalised(text) for text in pair] for pair in held_out]
    tokens = sum(len(response.split(" ")) + 1 for _, response in texts)
    batches = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    trainer, points, update = textbook.StepwiseTrainer(ids, device), [], 0
    while not points or not exhausted(points, points[-1][0]):
        for _ in range(25):
            trainer.train([random.choice(pairs) for _ in range(64)])
        update, paused = update + 25, time.time()
        points.append((paused - started, update, trainer.evaluate(batches) * tokens / len(texts)))
        started += time.time() - paused
    return points


def by_recipe(folder: Path, held_out: Texts, recipe: str, number: int, device: torch.device, started: float) -> list:
    """The curve of one of our recipes: its validations are on the held-out exchanges."""
    settings = settings_of(recipe, number)
    data = prepare(read_corpus(folder), settings)
    words = [tuple(map(data.vocabulary.tokenise, pair)) for pair in held_out]
    validation = Pairs.from_words(words, data.vocabulary)
    data, points = dataclasses.replace(data, splits=data.splits | {"validation": validation}), []
    per_response = int(validation.response_lengths.sum()) / len(validation)

    def take_note(row: dict) -> None:
        if "validation_loss" in row:
            points.append((time.time() - started, row["update"], row["validation_loss"] * per_response))
        if exhausted(points, time.time() - started):
            raise TimeoutError

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(TimeoutError))
        if recipe in itertools.takewhile(lambda name: name != FREQUENCIES, RECIPES):
            stack.enter_context(patch("helpers.training.begin_with_frequencies"))
        if recipe in CODE:
            name, instead = CODE[recipe]
            stack.enter_context(patch(f"helpers.training.{name}", instead))
        run = Run(stack.enter_context(tempfile.TemporaryDirectory()))
        fit(run, data, settings, device, take_note, progress_bar=False)
    return points


def curve(recipe: str, number: int, folder: Path, held_out: Texts, device: torch.device) -> list[Point]:
    """The curve of one recipe for one seed, in a process of its own."""
    started = time.time()
    with process("textbook" if recipe == TEXTBOOK else "ours") as alone:
        if recipe == TEXTBOOK:
            return alone.apply(by_textbook, (folder, held_out, number, device, started))
        return alone.apply(by_recipe, (folder, held_out, recipe, number, device, started))


def measure(source: Path, file: Path, device: torch.device, recipes: list[str], seeds: int) -> dict:
    """Run what the file lacks, write it after each run, and return what it then holds.
    Raises UserError for a file of another corpus or of other recipes of the same names."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"runs": []}
    with tempfile.TemporaryDirectory() as folder:
        held_out = known_to_all(part_in_two(source, Path(folder)), Path(folder))
        if not held_out:
            raise UserError(f"{source} holds no short exchange of held-out movies whose words are all known.")
        facts = {"corpus": read_corpus(source).digest, "exchanges": len(held_out), "recipes": RECIPES, "others": OTHERS}
        facts |= {"limit": LIMIT, "patience": PATIENCE}
        if found["runs"] and any(found.get(name) != value for name, value in facts.items()):
            raise UserError(f"{display_path(file)} is of another corpus or of other recipes: move it away first.")
        found |= facts | {"machine": machine(device)}
        there = [(run["recipe"], run["seed"]) for run in found["runs"]]
        for number in range(1, seeds + 1):
            for recipe in recipes:
                if (recipe, number) not in there:
                    points = curve(recipe, number, Path(folder), held_out, device)
                    rounded = [[round(after, 2), update, round(nats, 4)] for after, update, nats in points]
                    found["runs"].append({"recipe": recipe, "seed": number, "curve": rounded})
                    write_json(file, found)
                    best = min(nats for *_, nats in points)
                    print(f"{recipe}, seed {number}: {best:.2f} nats within {points[-1][0]:.0f} s", flush=True)
    return found


def seconds_to(points: list[Point], nats: float) -> float:
    """When a curve first comes to so many nats per response; infinity if it never does."""
    return next((after for after, _, value in points if value <= nats), math.inf)


def curves_of(found: dict) -> dict[str, list[list[Point]]]:
    """A record's curves, a list of the seeds' by program."""
    curves = {name: [run["curve"] for run in found["runs"] if run["recipe"] == name] for name in PROGRAMS}
    return {name: some for name, some in curves.items() if some}


def best_of(curves: list[list[Point]]) -> float:
    """The lowest nats of the seed in the middle; of two in the middle the higher, to which most seeds come."""
    return statistics.median_high(min(nats for *_, nats in curve) for curve in curves)


def time_to(curves: list[list[Point]], nats: float) -> float:
    """The median over the seeds of when they come to so many nats; infinity if most never do."""
    return statistics.median(seconds_to(curve, nats) for curve in curves)


@command_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, type=Path, help="Cornell's two files, in a folder or a zip")
    parser.add_argument("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 1 on")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS, help="some of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of the file in results/")
    options = parser.parse_args(arguments)
    file = options.json or result_path("speedrun", machine(options.device))
    measure(options.corpus, file, options.device, options.only, options.seeds)


if __name__ == "__main__":
    sys.exit(main())
