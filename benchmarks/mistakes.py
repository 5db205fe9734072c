"""Seven classic mistakes of chatbot tutorials, and a few more, priced: each alone against the right way, three seeds.

    python -m benchmarks.mistakes --corpus PATH    # what `make mistakes CORPUS=…` calls; results/mistakes-DEVICE.json

A mistake is an edit of a few lines in the source of `helpers/` (EDITS), other settings or other data, and nothing else:
model, seed, order of batches and updates are those of the right way that it is compared with. Three tasks: copying, the
embedded world, whose least possible loss is known, and movies. Each run has a process and a thread of its own, and is
written when it ends; several such programs may work on one file at once. What is in the file is not run again.

All train at a constant rate and keep an average of the weights, in place of the recipes' falling rate. So the loss
after any number of updates is that of a finished training, and a curve tells how many updates a mistake costs.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import sys
import tempfile
import textwrap
import time
import types
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from scipy import stats
from torch import Tensor

from benchmarks import race, world
from benchmarks.bench import process
from benchmarks.compare import QUERIES
from benchmarks.replies import commonest_reply, exact_matches, replies_of
from benchmarks.results import result_path
from helpers import evaluation, training
from helpers.batches import BucketedSampler, Pairs, Prepared, prepare
from helpers.corpus import read_corpus
from helpers.decoding import GreedySearch, greedy
from helpers.evaluation import BATCH, batch_loss, evaluate
from helpers.model import Encoder, EncoderLayer, LuongAttention, Seq2Seq, parameter_count
from helpers.run import Run, choose_device, display_path, machine, write_json
from helpers.settings import Settings, UserError, command_line, load_profile
from helpers.text import EOS, PAD, UNK
from helpers.training import NotFiniteError, Trainer, fit

SEEDS, SCORES = 3, ("dot", "general", "concat")
# The right ways, which the wrong are held against.
RECIPE, RANDOM, HALF, LONG = "the recipe", "random batches", "each layer's own half", "more updates"
BRIDGED = "both halves, bridged"  # what our encoder does, and no mistake
ALONE = ", asked alone"  # what is added to a mistake's name where its model is asked so
BATCH_SIZE = 32
SMALLER = {"embedding_size": 128, "hidden_size": 192}  # half of the quick recipe's sizes


def steady(settings: Settings, updates: int) -> Settings:
    """A recipe for this purpose: few updates on small batches, a constant rate, averaged weights."""
    return settings.change(
        updates=updates, batch_size=BATCH_SIZE, schedule="constant", average=0.98, warmup_updates=20,
        validate_every=max(updates // 20, 1), precision="fp32",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Edit:
    """A function that `owner`, a class or a module, has under a name, and its lines that are written otherwise; blanks
    around a line do not count, and a line of None is left out."""

    owner: type | types.ModuleType
    name: str
    lines: dict[str, str | None]

    @property
    def sources(self) -> tuple[str, str]:
        """The function's source as it is, and with the edit. Raises UserError if helpers do not say what is edited."""
        right = textwrap.dedent(inspect.getsource(getattr(self.owner, self.name)))
        wrong = right.splitlines()
        for line, other in self.lines.items():
            places = [place for place, found in enumerate(wrong) if found.strip() == line]
            if len(places) != 1:
                raise UserError(f"{self.name} in helpers/ has {len(places)} lines {line!r}: mend this edit of it.")
            indent = wrong[places[0]][: -len(wrong[places[0]].lstrip())]
            wrong[places[0] : places[0] + 1] = textwrap.indent(other, indent).splitlines() if other else []
        return right, "\n".join(wrong) + "\n"

    def function(self) -> Callable:
        """What the edited source defines, in the place of the right one."""
        right, space = inspect.unwrap(getattr(self.owner, self.name)), {}
        exec(compile(self.sources[1], f"<{self.name}, edited>", "exec"), right.__globals__, space)
        return space[self.name]

    def diff(self) -> str:
        """The edit as a unified diff with a line around each change."""
        lines = difflib.unified_diff(*(source.splitlines() for source in self.sources), n=1, lineterm="")
        whole = f"{self.owner.__name__.rpartition('.')[2]}.{self.name}"
        return "\n".join([f"# {whole}", *(line for line in list(lines)[2:] if not line.startswith("@@"))])


# An encoder whose layers hand over their two last states (batch, 2, hidden) as they are, as PyTorch's h_n does.
UNBRIDGED = (
    Edit(EncoderLayer, "forward", {
        "return along, against, torch.tanh(self.bridge(torch.cat(ends, 2)[:, 0]))":
            "return along, against, torch.cat(ends, 1)",
    }),
    Edit(training, "new_model", {
        "return Seq2Seq(settings, words)":
            "model = Seq2Seq(settings, words)\nfor layer in model.encoder.layers:\n    del layer.bridge\nreturn model",
    }),
)  # fmt: skip
EDITS: dict[str, tuple[Edit, ...]] = {
    "no mask": (Edit(LuongAttention, "forward", {
        'scores = self.scores(hidden, memory.keys).masked_fill_(memory.padding.unsqueeze(1), float("-inf"))':
            "scores = self.scores(hidden, memory.keys)",
    }),),
    HALF: (*UNBRIDGED, Edit(Encoder, "forward", {
        "return outputs, torch.stack(hidden)": "return outputs, torch.stack([ends[:, 0] for ends in hidden])",
    })),
    "the wrong half": (*UNBRIDGED, Edit(Encoder, "forward", {
        "return outputs, torch.stack(hidden)": "return outputs, hidden[0].transpose(0, 1).contiguous()  # h_n[:2]",
    })),
    "the sum of each step's mean": (Edit(training, "batch_loss", {
        'return functional.cross_entropy(logits, targets, ignore_index=PAD, reduction="sum"), (targets != PAD).sum()':
            'losses = functional.cross_entropy(logits, targets, ignore_index=PAD, reduction="none")\n'
            "losses, mask = losses.view_as(batch.targets), batch.targets != PAD\n"
            "return (losses.sum(0) / mask.sum(0).clamp(min=1)).sum(), torch.ones_like(targets[0])",
    }),),
    "one embedding in two optimisers": (
        Edit(Trainer, "__init__", {
            "self.optimizer = new_optimizer(model, settings)":
                "self.optimizer = new_optimizer(model, settings)\n"
                "self.second = torch.optim.Adam(model.embedding.parameters(), fused=True)",
        }),
        Edit(Trainer, "learn", {
            "self.optimizer.step()":
                'self.optimizer.step()\nself.second.param_groups[0]["lr"] = self.optimizer.param_groups[1]["lr"]\n'
                "self.second.step()",
        }),
    ),
    "clip 0 taken literally": (Edit(Trainer, "learn", {
        "self.optimizer.grad_scale = (norm / settings.clip).clamp(min=1) if settings.clip else None":
            "self.optimizer.grad_scale = (norm / settings.clip).clamp(min=1)",
    }),),
    "no shuffling": (Edit(BucketedSampler, "epoch", {
        "shuffled = torch.randperm(len(self.keys), generator=generator)": "shuffled = torch.arange(len(self.keys))",
        "return [batches[i] for i in torch.randperm(len(batches), generator=generator)]": "return batches",
    }),),
    "past the end": (Edit(GreedySearch, "forward", {
        "if steps % every == 0 and bool((spoken == self.eos).any(1).all()):": None,
        "break": None,
        "ends = (spoken[:, :steps] == self.eos).int()": None,
        "return spoken[:, :steps].masked_fill(ends.cumsum(1) > ends, self.pad)": "return spoken",
    }),),
    "UNK and PAD spoken": (Edit(GreedySearch, "forward", {"logits.add_(self.never)": None}),),
    "SOS fed as zeros": (Edit(GreedySearch, "forward", {
        "words = torch.full_like(query[:, 0], self.sos)": "words = torch.zeros_like(query[:, 0])",
    }),),
    "dropout on": (Edit(evaluation, "evaluate", {"model.eval()": None}),),
}  # fmt: skip


@contextlib.contextmanager
def made(mistake: str) -> Iterator[None]:
    """The functions of helpers as they are with one of EDITS; all other names change nothing."""
    with contextlib.ExitStack() as stack:
        for edit in EDITS.get(mistake, ()):
            stack.enter_context(unittest.mock.patch.object(edit.owner, edit.name, edit.function()))
        yield


class Mixed(Pairs):
    """Exchanges whose batches take no notice of length: in training whatever the shuffle brings together."""

    @property
    def keys(self) -> Tensor:
        """All the same, so that sorting by them leaves the shuffle as it is."""
        return torch.zeros_like(self.response_lengths)

    def order(self) -> Tensor:
        """Indices in one random order, always the same."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Way:
    """How to train: one of EDITS or none, settings and data changed, and the right way that it is compared with."""

    against: str = ""  # nothing: a right one
    edit: str = ""
    changes: dict = dataclasses.field(default_factory=dict)
    data: Callable[[Prepared], Prepared] = lambda data: data


def mixed(data: Prepared) -> Prepared:
    """The same with random batches, in training and when it is asked."""
    return dataclasses.replace(data, splits={name: Mixed(**vars(pairs)) for name, pairs in data.splits.items()})


def by_exchange(data: Prepared) -> Prepared:
    """As if exchanges were dealt out one by one: of the movies held out for validation, three exchanges in four are
    trained on, in the place of as many others. The fourth is what validation asks in any case."""
    train, more = data.splits["train"], data.splits["left over"]
    keep = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[len(more) :]
    return dataclasses.replace(data, splits=data.splits | {"train": joined(rows(train, keep), more)})


def rows(pairs: Pairs, which: Tensor) -> Pairs:
    """Some of the exchanges, in this order, and of the same class."""
    return type(pairs)(*(getattr(pairs, field.name)[which] for field in dataclasses.fields(Pairs)))


def joined(first: Pairs, second: Pairs) -> Pairs:
    """The exchanges of both."""
    parts = []
    for field in dataclasses.fields(Pairs):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if one.dim() == 2:
            width = max(one.size(1), other.size(1))
            one, other = (torch.nn.functional.pad(part, (0, width - part.size(1)), value=PAD) for part in (one, other))
        parts.append(torch.cat([one, other]))
    return Pairs(*parts)


def ways(scores: Sequence[str], longer: int = 0) -> dict[str, Way]:
    """All ways to train by their names, each right one before the wrong; the first of the scores is the recipe's.
    `longer` are the updates for the split, if they are others than all the rest has."""
    found = {RECIPE: Way()}
    found |= {name: Way(RECIPE, name) for name in ("no mask", "one embedding in two optimisers")}
    found["clip 0 taken literally"] = Way(RECIPE, "clip 0 taken literally", {"clip": 0.0})
    found["no clip"] = Way(RECIPE, changes={"clip": 0.0})
    more = {"updates": longer} if longer else {}
    found |= {LONG: Way(changes=more)} if longer else {}
    found["split by exchange"] = Way(LONG if longer else RECIPE, "", more, by_exchange)
    found[HALF] = Way("", HALF, {"layers": 2})
    found |= {BRIDGED: Way(HALF, changes={"layers": 2})}
    found |= {"the wrong half": Way(HALF, "the wrong half", {"layers": 2})}
    for score in scores:
        other = {"attention": score}
        found[f"{RANDOM}, {score}"] = Way(changes=other, data=mixed)
        found[f"no mask, {RANDOM}, {score}"] = Way(f"{RANDOM}, {score}", "no mask", other, mixed)
    against, own = f"{RANDOM}, {scores[0]}", {"attention": scores[0]}
    return found | {name: Way(against, name, own, mixed) for name in ("the sum of each step's mean", "no shuffling")}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt, and the queries whose replies are counted: `kinds` says of each what it is, and `counted` which
    kinds make up the share of exact replies."""

    data: Prepared
    asked: Pairs
    references: list[list[str]]
    kinds: list[str]
    counted: list[str]
    scores: tuple[str, ...]  # of attention, the recipe's first
    least: float | None = None  # possible nats per token of the test, where it is known
    longer: int = 0  # updates for the split: what a model has seen of a movie counts only once it has read it all

    def ways(self) -> dict[str, Way]:
        """All ways to train by their names; where no movies are, none splits them."""
        return {name: way for name, way in ways(self.scores, self.longer).items()
                if way.data is not by_exchange or "left over" in self.data.splits}  # fmt: skip


def quarters(data: Prepared, settings: Settings) -> Prepared:
    """Every fourth exchange of validation is asked in all validations; the others wait for `by_exchange`."""
    validation = data.splits["validation"]
    places = torch.arange(len(validation))
    parts = {"validation": places[places % 4 == 0], "left over": places[places % 4 > 0]}
    splits = data.splits | {name: rows(validation, which) for name, which in parts.items()}
    return dataclasses.replace(data, settings=settings, splits=splits)


def copying(updates: int = 600) -> Task:
    """To copy lines of 2 to 10 words; also longer ones are asked."""
    settings = steady(race.COPY, updates)
    data = race.copying(settings).data
    pairs = [pair for length in range(race.COPIED[0], race.LONGEST + 1) for pair in race.copied(length, 60, 3)]
    lines = [line for line, _ in pairs]
    counted = [str(length) for length in race.COPIED]
    asked = Pairs.from_words(pairs, data.vocabulary)
    return Task(data, asked, lines, [str(len(line)) for line in lines], counted, SCORES, 0.0)


def talking(source: str | Path, settings: Settings, scores: tuple[str, ...], longer: int = 0) -> Task:
    """To answer as a corpus does; movies are asked QUERIES. Of the embedded world's replies those count to whose query
    only one is right."""
    data = prepare(read_corpus(source), settings)
    texts, test, least = data.texts["test"], data.splits["test"], None
    kinds = ["movie"] * len(texts)
    if data.corpus["name"] == "sample":
        behind, facts = world.known(data.vocabulary.tokenise), world.World().grammar["facts"]
        sure = [behind[pair][1].chance == 1 and behind[pair][0].meaning in facts for pair in texts]
        kinds = ["fact" if one else "open" for one in sure]
        least = -sum(math.log(behind[pair][1].chance) for pair in texts) / int(test.response_lengths.sum())
    references = [response.split() for _, response in texts]
    asked = len(texts) if least else QUERIES
    lists, counted = (references[:asked], kinds[:asked]), ["fact"] if least else ["movie"]
    return Task(quarters(data, settings), test.first(asked), *lists, counted, scores, least, longer)


TASKS: dict[str, Callable[[str], Task]] = {
    "world": lambda _: talking("sample", steady(load_profile("sample"), 800), ("dot",)),
    "copying": lambda _: copying(),
    "movies": lambda source: talking(source, steady(load_profile("quick").change(**SMALLER), 400), ("general",), 1500),
}


def trained(task: Task, way: Way, seed: int, device: torch.device) -> tuple[Seq2Seq, Prepared, dict]:
    """A model trained in one way, the data as it saw them, and the curve: [update, validation loss, and means of the
    training loss and the gradient's norm since the point before]."""
    settings = task.data.settings.change(seed=seed, **way.changes)
    data, points, since = way.data(dataclasses.replace(task.data, settings=settings)), [], []

    def take_note(row: dict) -> None:
        if "validation_loss" in row:
            means = [float(np.mean([one[name] for one in since])) for name in ("loss", "gradient_norm")]
            points.append([row["update"], *(round(value, 4) for value in (row["validation_loss"], *means))])
            since.clear()
        else:
            since.append(row)

    with tempfile.TemporaryDirectory() as folder:
        model = fit(Run(Path(folder)), data, settings, device, take_note, progress_bar=False)
    return model, data, {"curve": points, "parameters": parameter_count(model)}


def without_padding(pairs: Pairs) -> Iterator[tuple[Tensor, Pairs]]:
    """Groups of queries of one length, which are read as if each were asked alone, and their places."""
    for length in pairs.query_lengths.unique().tolist():
        places = (pairs.query_lengths == length).nonzero()[:, 0]
        part = rows(pairs, places)
        yield places, dataclasses.replace(part, queries=part.queries[:, :length])


def spoken(task: Task, model: Seq2Seq, asked: Pairs) -> list[list[str]]:
    """Greedy replies to queries, in their order."""
    return replies_of(model, asked, task.data.vocabulary, task.data.settings.max_response_words + 1, greedy)


def replies(task: Task, model: Seq2Seq, asked: Pairs) -> list[list[str]]:
    """The same to all that a task asks: first those that count, among themselves, so that no line to copy is padded to
    the length of one that is longer than any trained on; then the others."""
    said: list[list[str]] = [[] for _ in task.kinds]
    counts = torch.tensor([kind in task.counted for kind in task.kinds])
    for places in filter(len, (counts.nonzero()[:, 0], (~counts).nonzero()[:, 0])):
        for place, reply in zip(places.tolist(), spoken(task, model, rows(asked, places)), strict=True):
            said[place] = reply
    return said


def exact(task: Task, said: list[list[str]]) -> float:
    """The share of the counted replies that are right word for word."""
    counted = [place for place, kind in enumerate(task.kinds) if kind in task.counted]
    return exact_matches([said[place] for place in counted], [task.references[place] for place in counted])


def unlike(some: list[list[str]], others: list[list[str]]) -> float:
    """The share of replies that differ."""
    return sum(one != other for one, other in zip(some, others, strict=True)) / len(some)


def by_kind(task: Task, said: list[list[str]]) -> dict[str, float]:
    """The share of exact replies of each kind of query."""
    shares = {}
    for kind in dict.fromkeys(task.kinds):
        places = [place for place, one in enumerate(task.kinds) if one == kind]
        shares[kind] = exact_matches([said[p] for p in places], [task.references[p] for p in places])
    return shares


def asked_alone(task: Task, model: Seq2Seq, test: Pairs, said: list[list[str]]) -> dict:
    """The same figures when each query is read without padding, the share of replies that are then others than those
    `said` in batches, and how much of attention's weight lay on padding there."""
    alone: list[list[str]] = [[] for _ in said]
    for places, part in without_padding(task.asked):
        for place, reply in zip(places.tolist(), spoken(task, model, part), strict=True):
            alone[place] = reply
    likelihoods = [evaluate(model, part) for _, part in without_padding(test)]
    nats = sum(one.nll for one in likelihoods) / sum(one.tokens for one in likelihoods)
    return {
        "alone": nats, "exact alone": exact(task, alone), "other replies alone": unlike(alone, said),
        "weight on padding": weight_on_padding(model, test),
    }  # fmt: skip


@torch.no_grad()
def weight_on_padding(model: Seq2Seq, pairs: Pairs) -> float:
    """The share of attention that falls on padding, over all words of all responses, in the batches of `pairs`."""
    total, words = 0.0, 0
    for indices in pairs.order().split(BATCH):
        batch = pairs.batch(indices)
        memory, state = model.encode(batch.query, batch.query_lengths)
        weights = model.decode(batch.inputs, state, memory)[1] * (batch.query == PAD).unsqueeze(1)
        total += float((weights.sum(2) * (batch.targets != PAD)).sum())
        words += int((batch.targets != PAD).sum())
    return total / words


def answering(task: Task, model: Seq2Seq, test: Pairs, said: list[list[str]], seed: int) -> dict[str, dict]:
    """The mistakes that one makes with a model that was trained in the right way: what each gives, by its name."""
    vocabulary, nats = task.data.vocabulary, evaluate(model, test).per_token
    found = {"no mask when answering": {}}
    many, test_mixed = (Mixed(**vars(pairs)) for pairs in (task.asked, test))
    with made("no mask"):
        unmasked = replies(task, model, many)
        found["no mask when answering"] = {
            "test": evaluate(model, test_mixed).per_token, "exact": exact(task, unmasked),
            "other replies": unlike(unmasked, said),
            "weight on padding": weight_on_padding(model, test_mixed),
        }  # fmt: skip
    printed = types.SimpleNamespace(decode=lambda ids: [vocabulary.words[i] for i in ids if i not in (PAD, EOS)])
    most = task.data.settings.max_response_words + 1
    with made("past the end"):
        endless = replies_of(model, task.asked, printed, most, greedy)
        words = [float(np.mean([len(reply) for reply in some])) for some in (said, endless)]
        found["past the end"] = {"exact": exact(task, endless), "words": words[1], "words of the right reply": words[0]}
    with made("UNK and PAD spoken"):
        other = replies(task, model, task.asked)
        unknown = sum(vocabulary.words[UNK] in reply for reply in other) / len(other)
        found["UNK and PAD spoken"] = {"exact": exact(task, other), "replies with UNK": unknown}
    with made("SOS fed as zeros"):
        other = replies(task, model, task.asked)
        found["SOS fed as zeros"] = {"exact": exact(task, other), "other replies": unlike(other, said)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found["dropout on"] = {"test": EDITS["dropout on"][0].function()(model.train(), test).per_token}
        model.eval()
    for name, pairs in (("by length", test), ("at random", test_mixed)):
        found[f"mean of the batches' perplexities, {name}"] = {"test": math.log(mean_perplexity(model, pairs))}
    assert nats == evaluate(model, test).per_token, "a measurement has left its mistake behind"
    return found


@torch.no_grad()
def mean_perplexity(model: Seq2Seq, pairs: Pairs) -> float:
    """The mean of the perplexities of batches, in place of that of all tokens."""
    found = []
    for indices in pairs.order().split(BATCH):
        nll, tokens = batch_loss(model, pairs.batch(indices))
        found.append(math.exp(nll.item() / int(tokens)))
    return sum(found) / len(found)


def measured(task: Task, way: str, seed: int, device: torch.device) -> dict:
    """One run: train in one way, and measure. Its process computes with one thread on a CPU, on every machine."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = figures(task, way, seed, device)
    return found | {"seconds": round(time.perf_counter() - started, 1), "machine": machine(device)}


def figures(task: Task, name: str, seed: int, device: torch.device) -> dict:
    """What is noted of one run. One whose loss was no number any more has the reason in place of figures."""
    way = task.ways()[name]
    with made(way.edit):
        try:
            model, data, noted = trained(task, way, seed, device)
        except NotFiniteError as error:
            return {"failed": str(error)}
        kind = Mixed if way.data is mixed else Pairs
        test, asked = (kind(**vars(pairs)).to(device) for pairs in (data.splits["test"], task.asked))
        said = replies(task, model, asked)
        noted |= {"test": evaluate(model, test).per_token, "exact": exact(task, said), "kinds": by_kind(task, said)}
        noted["commonest share"] = commonest_reply(said)[1]
        if way.edit == "no mask":
            noted |= asked_alone(task, model, test, said)
    if name == RECIPE:
        noted["answering"] = answering(task, model, test, said, seed)
    return noted


def run_all(name: str, source: str, file: Path, device: torch.device, seeds: int, most: int | None) -> int:
    """Run what the file lacks of a task, `most` runs at most, each in a process of its own; returns how many ran. Runs
    that another program is at work on are left to it. Raises UserError for a file of other data or settings."""
    task, claims, ran = TASKS[name](source), Run.named("mistakes").folder / file.stem, 0
    claims.mkdir(parents=True, exist_ok=True)
    facts = {"digest": task.data.digest, "settings": task.data.settings.to_dict(), "least": task.least,
             "exchanges": {part: len(pairs) for part, pairs in task.data.splits.items()}}  # fmt: skip

    def noted(run: dict | None = None) -> list[tuple]:
        """What the file holds of this task, after a run was added to it."""
        with FileLock(claims / ".file.lock"):
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"tasks": {}, "runs": []}
            if found["tasks"].setdefault(name, facts) != json.loads(json.dumps(facts)):
                raise UserError(f"{display_path(file)} holds {name} of other data or settings: move it away first.")
            if run:
                found["machine"] = run.pop("machine")
                found["runs"].append(run)
                write_json(file, found)
        return [(run["way"], run["seed"]) for run in found["runs"] if run["task"] == name]

    for seed in range(1, seeds + 1):
        for way in task.ways():
            if ran == most:
                return ran
            with contextlib.suppress(Timeout), FileLock(claims / f"{name} {way} {seed}.lock", blocking=False):
                if (way, seed) in noted():
                    continue
                with process("ours") as alone:
                    found = alone.apply(measured, (task, way, seed, device))
                noted({"task": name, "way": way, "seed": seed} | found)
                told = found.get("failed") or f"{found['test']:.3f} nats per token, {found['exact']:.1%} exact"
                print(f"{name}, {way}, seed {seed}: {told}", flush=True)
                ran += 1
    return ran


def later(right: list[list[float]], wrong: list[list[float]]) -> float:
    """By how many updates a curve of [update, loss, …] comes later to the loss where both have been: the wrong one's
    best, which the right one had after fewer updates, or the other way round (below 0), read between the points."""
    sign, fast, slow = (1, right, wrong) if min(p[1] for p in right) <= min(p[1] for p in wrong) else (-1, wrong, right)
    wanted, (end, *_) = min(point[1] for point in slow), slow[-1]
    before, there = 0.0, math.inf
    for update, loss, *_ in fast:
        if loss <= wanted:
            share = 1.0 if math.isinf(there) else (there - wanted) / (there - loss)
            return sign * (end - before - share * (update - before))
        before, there = update, loss
    return 0.0


def spread(values: list[float]) -> float:
    """Half the width of the 95% interval of the values' mean, by Student's t; nan for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def prices(found: dict) -> pd.DataFrame:
    """A row per task and mistake: its figures beside the right way's, the means over the seeds, and the differences of
    equal seeds with their `spread`: nats per token, exact replies as a share, and updates later. A model without mask
    has a second row: what it says when it is asked alone."""
    by_run = {(run["task"], run["way"], run["seed"]): run for run in found["runs"]}
    table = []

    def add(name: str, mistake: str, against: str, pairs: list[tuple[dict, dict]]) -> None:
        row = {"task": name, "mistake": mistake, "against": against, "seeds": len(pairs)}
        for figure, key in (("nats", "test"), ("exact", "exact")):
            both = [(right[key], wrong[key]) for right, wrong in pairs if key in right and key in wrong]
            differences = [wrong - right for right, wrong in both]
            if both:
                row |= {f"{figure}, right": np.mean([right for right, _ in both]), figure: np.mean(differences)}
                row |= {f"{figure} ±": spread(differences)}
        updates = [later(right["curve"], wrong["curve"]) for right, wrong in pairs if "curve" in wrong]
        table.append(row | ({"later": np.mean(updates), "later ±": spread(updates)} if updates else {}))

    for name, facts in found["tasks"].items():
        runs = {key: run for key, run in by_run.items() if key[0] == name and "failed" not in run}
        own = facts["settings"]["attention"]
        longer = any(way == LONG for _, way, _ in runs)
        for way, made_so in ways([own, *(score for score in SCORES if score != own)], longer).items():
            right = made_so.against
            seeds = [seed for _, other, seed in runs if other == way and (name, right, seed) in runs]
            pairs = [(runs[name, right, seed], runs[name, way, seed]) for seed in seeds]
            if pairs:
                add(name, way, right, pairs)
            if pairs and "alone" in pairs[0][1]:
                asked = [(one, {"test": run["alone"], "exact": run["exact alone"]}) for one, run in pairs]
                add(name, f"{way}{ALONE}", right, asked)
        rights = [run for (_, way, _), run in runs.items() if way == RECIPE]
        for mistake in rights[0]["answering"] if rights else ():
            add(name, mistake, RECIPE, [(run, run["answering"][mistake]) for run in rights])
    return pd.DataFrame(table)


def told(row: dict, figure: str) -> str:
    """One figure of a row of `prices`, nats, exact (in points of 100) or later: mean difference ± `spread`, in brackets
    where the seeds do not tell it from 0; nothing where it was not measured."""
    digits, scale = {"nats": (3, 1), "exact": (1, 100), "later": (0, 1)}[figure]
    mean, width = row.get(figure, math.nan), row.get(f"{figure} ±", math.nan)
    if math.isnan(mean):
        return ""
    text = f"{scale * mean:+.{digits}f} ± {scale * width:.{digits}f}"
    return text if abs(mean) > width else f"({text})"


def overview(found: dict, figure: str) -> pd.DataFrame:
    """The mistakes (rows) in each task (columns), as one figure is told."""
    table: dict[str, dict[str, str]] = {}
    for row in prices(found).to_dict("records"):
        if text := told(row, figure):
            table.setdefault(row["mistake"], {})[row["task"]] = text
    order = {name: place for place, name in enumerate(f"{way}{more}" for way in ways(SCORES) for more in ("", ALONE))}
    names = sorted(table, key=lambda name: order.get(name, len(order)))  # the others, of answering, come last
    return pd.DataFrame([table[name] for name in names], index=names, columns=list(found["tasks"])).fillna("")


@command_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="", help="movies, for the task movies, which is left out without")
    parser.add_argument("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=TASKS, help="some of the tasks")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 1 on")
    parser.add_argument("--runs", type=int, help="stop after so many; the next call goes on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of the file in results/")
    options = parser.parse_args(arguments)
    if "movies" in (options.only or ()) and not options.corpus:
        raise UserError("The task movies needs movies: name them with --corpus PATH.")
    file, left = options.json or result_path("mistakes", machine(options.device)), options.runs
    for name in options.only or [name for name in TASKS if name != "movies" or options.corpus]:
        ran = run_all(name, options.corpus, file, options.device, options.seeds, left)
        left = None if left is None else left - ran
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        print(prices(found).to_string(index=False, float_format="{:,.3f}".format))


if __name__ == "__main__":
    sys.exit(main())
