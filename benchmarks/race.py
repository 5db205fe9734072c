"""The GRU and the Transformer side by side: of equal size, tuned by the same small sweep, three seeds.

    python -m benchmarks.race --corpus PATH    # results/transformer-DEVICE.json; PATH is for the task `excerpt`

Three tasks: copying (and lines longer than any that was trained on), the embedded world, and an excerpt of movies. For
each, both models are sized to one number of parameters, and both run the same sweep of layers, learning rates and
dropout, a third as long as the races; each one's best by validation loss then runs with three seeds. Both train with
`fit`, and only the time of updates counts, not that of validations. What is in the file already is not run again.
"""

import argparse
import bisect
import dataclasses
import itertools
import json
import math
import random
import sys
import tempfile
import unittest.mock
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks import world
from benchmarks.replies import exact_matches, replies_of
from benchmarks.results import result_path
from benchmarks.transformer import HEADS, new_transformer
from helpers.batches import Pairs, Prepared, prepare
from helpers.corpus import read_corpus
from helpers.decoding import GreedySearch, greedy
from helpers.deploy import script
from helpers.evaluation import evaluate
from helpers.latency import measure
from helpers.model import Seq2Seq, new_model, parameter_count
from helpers.run import Run, choose_device, display_path, machine, write_json
from helpers.settings import Settings, UserError, command_line, load_profile
from helpers.text import Vocabulary
from helpers.training import fit

MODELS: dict[str, Callable[[Settings, int], Seq2Seq]] = {"GRU": new_model, "Transformer": new_transformer}
LAYERS, RATES, DROPOUTS, SEEDS = (1, 2), (1e-3, 2.5e-3, 6e-3), (0.0, 0.2), 3
CHOSEN = ("layers", "learning_rate", "dropout")  # by the sweep
COPIED = range(2, 11)  # words of a line that training copies
LONGEST = 16  # words of a line that the trained models are asked to copy
COPY_WORDS = [f"{letter}{number}" for letter in "abcde" for number in range(4)]
SIZES = (1, 64)  # replies at once
COPY = load_profile("sample").change(
    embedding_size=64, hidden_size=64, dropout=0.0, updates=3000, max_query_words=LONGEST, max_response_words=LONGEST
)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt, by models of how many parameters, and further figures of a trained model."""

    data: Prepared
    parameters: int
    figures: Callable[[Seq2Seq, Prepared], dict]

    @property
    def settings(self) -> Settings:
        """Those that all runs share; shapes and learning rate are each run's own."""
        every = max(self.data.settings.updates // 20, 1)
        return self.data.settings.change(warmup_updates=min(100, every), validate_every=every, schedule="cosine")


def copied(length: int, count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Lines of so many random words, each with itself for an answer."""
    randomness = random.Random(f"{length} {seed}")
    lines = [randomness.choices(COPY_WORDS, k=length) for _ in range(count)]
    return [(line, line) for line in lines]


def copying(settings: Settings = COPY, count: int = 1000) -> Task:
    """To copy lines of 2 to 10 words; its figures are the shares copied exactly of lines of 2 to 16."""
    vocabulary = Vocabulary(COPY_WORDS)
    lines = {
        name: [pair for length in COPIED for pair in copied(length, number, seed)]
        for seed, (name, number) in enumerate({"train": count, "validation": count // 10, "test": count // 10}.items())
    }
    splits = {name: Pairs.from_words(pairs, vocabulary) for name, pairs in lines.items()}
    data = Prepared(settings, vocabulary, splits, {}, {}, Counter(), {}, [], f"copy {count}")

    def by_length(model: Seq2Seq, data: Prepared) -> dict:
        device, shares = model.embedding.weight.device, {}
        for length in range(COPIED[0], LONGEST + 1):
            pairs = copied(length, 100, 3)
            asked = Pairs.from_words(pairs, vocabulary).to(device)
            replies = replies_of(model, asked, vocabulary, LONGEST + 1, greedy)
            shares[length] = exact_matches(replies, [line for line, _ in pairs])
        return {"exact by length": shares}

    return Task(data, parameter_count(new_model(settings, len(vocabulary))), by_length)


def talking(source: str | Path, settings: Settings) -> Task:
    """To answer as a corpus does, with as many parameters as these settings' GRU has."""
    data = prepare(read_corpus(source), settings)

    def on_test(model: Seq2Seq, data: Prepared) -> dict:
        test, references = data.splits["test"].to(model.embedding.weight.device), data.texts["test"]
        replies = replies_of(model, test, data.vocabulary, settings.max_response_words + 1, greedy)
        exact = exact_matches(replies, [response.split() for _, response in references])
        behind = world.known(data.vocabulary.tokenise) if data.corpus["name"] == "sample" else {}
        costs = [-math.log(behind[pair][1].chance) for pair in references if behind]
        least = sum(costs) / len(costs) if costs else None  # of movies nobody knows it
        kinds, facts = world.World().grammar["facts"], dict[str, list[bool]]()
        # Of each kind of question, whether every answer was the corpus's.
        for pair, reply in zip(references, replies, strict=True) if behind else ():
            if (kind := behind[pair][0].meaning) in kinds:
                facts.setdefault(kind, []).append(reply == pair[1].split())
        shares = {kind: sum(right) / len(right) for kind, right in sorted(facts.items())}
        return {"test": evaluate(model, test).per_response, "exact": exact, "least": least, "facts": shares}

    return Task(data, parameter_count(new_model(settings, len(data.vocabulary))), on_test)


def sized(name: str, settings: Settings, words: int, parameters: int) -> Settings:
    """These settings with sizes that give one of MODELS so many parameters: as they are if they do, else of one width,
    with four times as much inside a Transformer's networks, and `hidden_size` made to fit."""

    def count(width: int, inner: int) -> int:
        with torch.device("meta"):
            return parameter_count(MODELS[name](settings.change(embedding_size=width, hidden_size=inner), words))

    if count(settings.embedding_size, settings.hidden_size) == parameters:
        return settings
    step, wider = 2 * HEADS, 4 if name == "Transformer" else 1
    steps = bisect.bisect_right(range(1, 129), parameters, key=lambda n: count(step * n, wider * step * n))
    width = step * max(steps, 1)  # the widest that is not too large
    inner = bisect.bisect_left(range(1, 4097), parameters, key=lambda inner: count(width, inner)) + 1
    return settings.change(embedding_size=width, hidden_size=inner)


def trained(name: str, task: Task, settings: Settings, device: torch.device) -> tuple[Seq2Seq, dict]:
    """A model after `fit`, and what is noted of it: size, curve, and the speed of its updates."""
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch("helpers.training.new_model", MODELS[name]):
        data = dataclasses.replace(task.data, settings=settings)
        model = fit(Run(Path(folder)), data, settings, device, rows.append, progress_bar=False)
    validation, seconds, points = task.data.splits["validation"], 0.0, []
    per_response = int(validation.response_lengths.sum()) / len(validation)
    for row in rows:
        seconds += row.get("seconds", 0.0)
        if "validation_loss" in row:
            points.append([round(seconds, 2), row["update"], round(row["validation_loss"] * per_response, 4)])
    updates = [row for row in rows if "tokens" in row][10:]  # the first set things up
    speed = sum(row["tokens"] for row in updates) / max(sum(row["seconds"] for row in updates), 1e-9)
    facts = {"parameters": parameter_count(model), "curve": points, "tokens/s": round(speed)}
    return model, facts | {"best": min(nats for *_, nats in points)}


def race(name: str, task: Task, found: dict, save: Callable[[], None], device: torch.device) -> dict[str, Seq2Seq]:
    """Run what the file lacks of one task. Returns the models of the first seed that were trained in this call."""
    runs, models = found["runs"], dict[str, Seq2Seq]()

    def once(model: str, settings: Settings, trial: bool) -> dict:
        changed = {key: getattr(settings, key) for key in (*CHOSEN, "updates", "seed")}
        facts = {"task": name, "model": model, "trial": trial, **changed}
        for run in runs:
            if facts.items() <= run.items():
                return run
        one = sized(model, settings, len(task.data.vocabulary), task.parameters)
        network, noted = trained(model, task, one, device)
        run = facts | {"embedding_size": one.embedding_size, "hidden_size": one.hidden_size} | noted
        if not trial:
            run |= task.figures(network, task.data)
            if settings.seed == 1:
                models[model] = network
        runs.append(run)
        save()
        what = "trial" if trial else f"seed {settings.seed}"
        shape = f"{settings.layers} layer(s), rate {settings.learning_rate:g}, dropout {settings.dropout:g}"
        print(f"{name}, {model}, {what}: {shape}: {run['best']:.3f} nats, {run['curve'][-1][0]:.0f} s", flush=True)
        return run

    for model in MODELS:
        third = task.settings.change(updates=max(task.settings.updates // 3, 1))
        grid = itertools.product(LAYERS, RATES, DROPOUTS)
        trials = [once(model, third.change(**dict(zip(CHOSEN, choice, strict=True))), True) for choice in grid]
        best = min(trials, key=lambda run: run["best"])
        chosen = {key: best[key] for key in CHOSEN}
        for seed in range(1, SEEDS + 1):
            once(model, task.settings.change(seed=seed, **chosen), False)
    return models


def waiting(models: dict[str, Seq2Seq], data: Prepared, device: torch.device, replies: int = 200) -> list[dict]:
    """Milliseconds per reply of both models, eager and scripted, taking turns."""
    test, max_words = data.splits["test"].to(device), data.settings.max_response_words + 1
    searches = {}
    for name, model in models.items():
        searches |= {(name, "eager"): GreedySearch(model).eval(), (name, "TorchScript"): script(model)}
    rows = []
    for size in SIZES:
        for (name, way), seconds in measure(searches, test, size, max_words, replies).items():
            values = np.array(seconds) * 1e3 / size
            found = {"p50 ms": float(np.median(values)), "p95 ms": float(np.percentile(values, 95))}
            rows.append({"model": name, "variant": way, "batch": size} | found)
    return rows


def summary(found: dict) -> pd.DataFrame:
    """A row per task and model: what was chosen, the lowest validation loss, in nats per response, of a whole race and
    of as many seconds as the fastest one took, each the mean of the seeds with its spread, and training's speed."""
    rows = []
    for name in dict.fromkeys(run["task"] for run in found["runs"] if not run["trial"]):
        races = [run for run in found["runs"] if run["task"] == name and not run["trial"]]
        limit = min(run["curve"][-1][0] for run in races)
        for model in MODELS:
            own = [run for run in races if run["model"] == model]
            if not own:
                continue
            best = [run["best"] for run in own]
            soon = [min((n for s, _, n in run["curve"] if s <= limit), default=math.nan) for run in own]
            rows.append({
                "task": name, "model": model, **{key.replace("_", " "): own[0][key] for key in CHOSEN},
                "parameters": own[0]["parameters"], "seeds": len(own), "nats": np.mean(best), "±": np.ptp(best) / 2,
                "nats, equal seconds": np.mean(soon), "seconds": np.mean([run["curve"][-1][0] for run in own]),
                "exact": np.mean([run.get("exact", math.nan) for run in own]),
                "tokens/s": np.median([run["tokens/s"] for run in own]),
            })  # fmt: skip
    return pd.DataFrame(rows)


@command_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="movies, for the task excerpt, which is left out without")
    parser.add_argument("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=("copy", "world", "excerpt"), help="some of the tasks")
    parser.add_argument("--updates", type=int, help="of a race, in place of each task's own: for a quick look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of the file in results/")
    options = parser.parse_args(arguments)
    if options.updates and not options.json:
        raise UserError("A quick look is no result: with --updates, name another file by --json.")
    tasks: dict[str, Callable[[], Task]] = {
        "copy": copying, "world": lambda: talking("sample", load_profile("sample")),
    }  # fmt: skip
    if options.corpus:
        tasks["excerpt"] = lambda: talking(options.corpus, load_profile("quick"))
    file = options.json or result_path("transformer", machine(options.device))
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"tasks": {}, "runs": [], "latency": []}
    for name in options.only or tasks:
        if name not in tasks:
            raise UserError("The task excerpt needs movies: name them with --corpus PATH.")
        task = tasks[name]()
        if options.updates:
            task = dataclasses.replace(task, data=task.data.anew(task.data.settings.change(updates=options.updates)))
        facts = {"digest": task.data.digest, "parameters": task.parameters, "settings": task.settings.to_dict()}
        if found["tasks"].setdefault(name, facts) != facts:
            raise UserError(f"{display_path(file)} holds {name} of other data or settings: move it away first.")
        found["machine"] = machine(options.device)
        models = race(name, task, found, lambda: write_json(file, found), options.device)
        if name == "world" and not found["latency"]:
            for model in MODELS:
                if model not in models:  # trained in an earlier call
                    first = next(run for run in found["runs"] if (run["task"], run["model"], run["trial"], run["seed"])
                                 == (name, model, False, 1))  # fmt: skip
                    shape = {key: first[key] for key in ("embedding_size", "hidden_size", *CHOSEN)}
                    models[model] = trained(model, task, task.settings.change(**shape), options.device)[0]
            found["latency"] = waiting(models, task.data, options.device)
            write_json(file, found)
    print(summary(found).to_string(index=False, float_format="{:,.3f}".format))


if __name__ == "__main__":
    sys.exit(main())
