"""Exchanges to tensors: filters, split, vocabulary, and seeded batches of similar length."""

import bisect
import dataclasses
import functools
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers.corpus import Corpus, Exchange, read_corpus
from helpers.run import digest, display_path, read_tensors, write_tensors
from helpers.settings import DATA_SETTINGS, Settings, UserError, user_errors
from helpers.text import EOS, PAD, SOS, SPECIAL, UNK, Vocabulary, forms, lower, spell

SPLITS = ("train", "validation", "test")
FORMAT = 4  # of data.pt
BUCKET = 100  # batches whose examples are sorted by length together
# What batches are padded to, in words: few shapes, each of which libraries prepare for and CUDA graphs record.
SIZES = [2, 4, 6, 8, 10, 12, *(n * 2**k for k in range(2, 20) for n in (4, 5, 6))]


class Batch(NamedTuple):
    """A batch of exchanges as ids, padded with PAD, on one device."""

    query: Tensor  # (batch, query time)
    query_lengths: Tensor  # (batch,)
    inputs: Tensor  # (batch, response time): SOS and the response without its last id
    targets: Tensor  # (batch, response time): the response and its EOS

    def with_dropout(self, query_share: float, word_share: float, strange_share: float = 0.0) -> "Batch":
        """The batch with a share of its queries replaced by silence, and of its words (not the targets) by UNK.
        A further share gets strange queries, words of the batch in any order and UNK, and no words for a response.
        All are drawn from torch's global random numbers, of which none are used where the share is 0."""
        query, lengths, inputs, targets = self
        draw = functools.partial(torch.rand, device=query.device)
        at_first = lambda ids: torch.arange(ids.size(1), device=ids.device) == 0  # noqa: E731
        if strange_share:
            strange = draw(len(query), 1) < strange_share
            jumbled = query.flatten()[torch.randperm(query.numel(), device=query.device)].view_as(query).clamp(min=UNK)
            changed = draw(query.shape) < 0.5 + 0.5 * draw(len(query), 1)
            query = torch.where(strange & changed & (query > EOS), jumbled, query)
            inputs = inputs.masked_fill(strange & ~at_first(inputs), PAD)
            targets = torch.where(strange, torch.where(at_first(targets), EOS, PAD), targets)
        if word_share:
            query = query.masked_fill((draw(query.shape) < word_share) & (query > UNK), UNK)
            inputs = inputs.masked_fill((draw(inputs.shape) < word_share) & (inputs > UNK), UNK)
        if query_share:
            silent = draw(len(query)) < query_share
            lengths = lengths.masked_fill(silent, 1)
            query = torch.where(silent.unsqueeze(1), torch.where(at_first(query), EOS, PAD), query)
        return Batch(query, lengths, inputs, targets)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The exchanges of one split as resident tensors, padded to the longest; responses end in EOS."""

    queries: Tensor  # (examples, query time), int32
    query_lengths: Tensor  # (examples,)
    responses: Tensor  # (examples, response time), int32
    response_lengths: Tensor  # (examples,), EOS counted

    @classmethod
    def from_words(cls, pairs: list[tuple[list[str], list[str]]], vocabulary: Vocabulary) -> "Pairs":
        """Encode (query words, response words). A query of no words is silence: EOS alone."""
        queries = [vocabulary.encode(query) or [EOS] for query, _ in pairs]
        responses = [[*vocabulary.encode(response), EOS] for _, response in pairs]
        return cls(*_padded(queries), *_padded(responses))

    def __len__(self) -> int:
        return len(self.queries)

    def to(self, device: torch.device) -> "Pairs":
        """The same with the ids on a device; the lengths stay on the CPU, where batches are planned."""
        return dataclasses.replace(self, queries=self.queries.to(device), responses=self.responses.to(device))

    def batch(self, indices: Tensor) -> Batch:
        """The examples with these indices (on the CPU), padded to the shape that holds the longest among them."""
        return self.batch_of(self.upload(indices), *self.shape(indices))

    def upload(self, indices: Tensor) -> Tensor:
        """(2, batch): indices and query lengths, on their way to a GPU in one piece while the CPU goes on."""
        rows = torch.stack([indices, self.query_lengths[indices]])
        return rows.pin_memory().to(self.queries.device, non_blocking=True) if self.queries.is_cuda else rows

    def shape(self, indices: Tensor) -> tuple[int, int]:
        """Query time and response time of the batch of these examples."""
        return _padded_size(self.query_lengths[indices].max()), _padded_size(self.response_lengths[indices].max())

    def batch_of(self, rows: Tensor, query_time: int, response_time: int) -> Batch:
        """The examples of `rows`, what `upload` gave, on the device itself: nothing makes the CPU wait for a GPU."""
        where, lengths = rows
        query, targets = self.queries[where, :query_time].long(), self.responses[where, :response_time].long()
        return Batch(query, lengths, torch.cat([torch.full_like(targets[:, :1], SOS), targets[:, :-1]], 1), targets)

    def first(self, count: int) -> "Pairs":
        """The first `count` examples."""
        return Pairs(*(getattr(self, field.name)[:count] for field in dataclasses.fields(self)))

    def order(self) -> Tensor:
        """Indices by rising response length, then query length."""
        return torch.argsort(self.keys, stable=True)

    @property
    def keys(self) -> Tensor:
        """(examples,): sorts by padded response length, within one by query length, rising and falling in turns."""
        size = torch.bucketize(self.response_lengths, torch.tensor(SIZES))
        return size * 4096 + torch.where(size % 2 == 0, self.query_lengths, 4095 - self.query_lengths)


class BucketedSampler:
    """Seeded batches of similar length, a pure function of (seed, epoch): nothing to save for an exact resume.
    Each epoch is shuffled, cut into buckets of 100 batches, each bucket sorted by length and cut into batches, and the
    batches shuffled. Every example comes once an epoch, but for the few, others each time, that fill the last batch."""

    def __init__(self, pairs: Pairs, batch_size: int, seed: int) -> None:
        self.keys = pairs.keys
        self.batch_size, self.seed = min(batch_size, len(pairs)), seed
        self.batches_per_epoch = -(-len(pairs) // self.batch_size)

    def epoch(self, epoch: int) -> list[Tensor]:
        """The batches of an epoch, each a tensor of indices."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.keys), generator=generator)
        shuffled = torch.cat([shuffled, shuffled[: -len(shuffled) % self.batch_size]])
        batches: list[Tensor] = []
        for bucket in shuffled.split(self.batch_size * BUCKET):
            batches += bucket[torch.argsort(self.keys[bucket], stable=True)].split(self.batch_size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def from_update(self, update: int) -> Iterator[Tensor]:
        """Batches without end, beginning with that of the given update (counted from 0)."""
        epoch, position = divmod(update, self.batches_per_epoch)
        while True:
            yield from self.epoch(epoch)[position:]
            epoch, position = epoch + 1, 0


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What notebook 01 makes and all others use: encoded splits, vocabulary, and an account of what was dropped."""

    settings: Settings
    vocabulary: Vocabulary
    splits: dict[str, Pairs]
    texts: dict[str, list[tuple[str, str]]]  # validation and test as normalised text, no context
    report: dict[str, int]  # exchanges read, dropped by each filter, and kept in each part
    counts: Counter[str]  # training words
    corpus: dict[str, str | int]
    examples: list[str]  # some queries of training, as people write them
    digest: str  # of the corpus and the data settings

    def anew(self, settings: Settings, base: Vocabulary | None = None) -> "Prepared":
        """The same for other settings: prepared again only if they, or a vocabulary to build on, ask for it."""
        if base is None and all(getattr(settings, name) == getattr(self.settings, name) for name in DATA_SETTINGS):
            return dataclasses.replace(self, settings=settings)
        return prepare(read_corpus(self.corpus["source"]), settings, base)

    def account(self) -> str:
        """One sentence: what was read, what each filter dropped, what was kept, and how many words are known."""
        report, source = self.report, self.corpus
        dropped = {"a line without text": source["silent"], "no line that they answer": source["lost"]}
        read = report["exchanges"] + sum(dropped.values())
        dropped |= {name: count for name, count in report.items() if name not in ("exchanges", "openers", *SPLITS)}
        why = ", ".join(f"{count:,} for {name}" for name, count in dropped.items() if count) or "none"
        parts = ", ".join(f"{report[name]:,} for {name}" for name in SPLITS) + f", split by {source['unit']}"
        kept = parts if self.settings.held_out_share else "all to train on, none held out"
        words = len(self.vocabulary) - len(SPECIAL)
        known = f"{words:,} of {words + self.vocabulary.unknown_types:,} words known"
        return f"{read:,} exchanges read from {source['name']}; dropped: {why}; kept: {kept}; {known}"

    def save(self, path: Path) -> None:
        state = vars(self) | {"settings": self.settings.to_dict()}
        state |= {"vocabulary": self.vocabulary.to_json(), "splits": {name: vars(p) for name, p in self.splits.items()}}
        # As text, which loads many times faster than as objects.
        write_tensors(path, FORMAT, state | {"texts": json.dumps(self.texts), "counts": json.dumps(self.counts)})

    @classmethod
    def load(cls, path: Path) -> "Prepared":
        """What `save` wrote. Raises UserError if the file is missing, damaged or of another format."""
        state = read_tensors(path, FORMAT, "notebook 01_data_preparation")
        kinds = (KeyError, TypeError, ValueError, AttributeError, RecursionError, UserError)
        with user_errors(f"{display_path(path)} is incomplete", "Delete it and prepare the data again.", *kinds):
            state |= {name: json.loads(state[name]) for name in ("texts", "counts")}
            state["texts"] = {name: [tuple(pair) for pair in pairs] for name, pairs in state["texts"].items()}
            state["splits"] = {name: Pairs(**tensors) for name, tensors in state["splits"].items()}
            state |= {"counts": Counter(state["counts"]), "settings": Settings(**state["settings"])}
            return cls(**state | {"vocabulary": Vocabulary.from_json(state["vocabulary"])})


def prepare(corpus: Corpus, settings: Settings, base: Vocabulary | None = None) -> Prepared:
    """Tokenise, filter, split, build the vocabulary from the training part alone (and a `base`), encode.
    Where nothing is held out, validation and test are the training's own exchanges.
    Raises UserError if nothing, or too little to split in three, is left."""

    @functools.cache  # many a line comes twice, as a response and then as a query
    def read(text: str) -> tuple[list[str], list[str]]:
        written = forms(text, settings.marks)
        return lower(written), written

    parts, unit = split(corpus.exchanges, settings.held_out_share, settings.seed)
    report = {"exchanges": len(corpus.exchanges), "no word left": 0, "response too long": 0, "query too long": 0}
    kept: dict[str, list] = {name: [] for name in SPLITS}  # of (the line before, query, response), all in words
    first_lines: dict[tuple[str, str], tuple] = {}
    spelling: dict[str, Counter[str]] = {}
    for (asked, answered, talk, _, preceding), part in zip(corpus.exchanges, parts, strict=True):
        (before, _), (query, asks), (response, says) = read(preceding or ""), read(asked), read(answered)
        if settings.openers and part == "train" and preceding is None and 0 < len(query) <= settings.max_response_words:
            first_lines[talk, asked] = ([], [], query)
        if not query or not response:
            report["no word left"] += 1
        elif len(response) > settings.max_response_words:
            report["response too long"] += 1
        elif len(query) > settings.max_query_words and settings.long_queries == "drop":
            report["query too long"] += 1
        else:  # of a long query the end says most about the response
            kept[part].append((before, query[-settings.max_query_words :], response))
            if part == "train":
                ends = [*settings.marks, ""]  # where a sentence starts, a capital says nothing
                for said, forms_of in ((query, asks), (response, says)):
                    for after, word, form in zip(["", *said], said, forms_of, strict=False):
                        if after not in ends:
                            spelling.setdefault(word, Counter())[form] += 1

    counts = Counter(itertools.chain.from_iterable(query + response for _, query, response in kept["train"]))
    vocabulary = Vocabulary.from_counts(counts, settings.min_count, settings.marks, base)
    commonest = {word: written.most_common(1)[0][0] for word, written in spelling.items() if word in vocabulary}
    vocabulary.spelling.update({word: form for word, form in commonest.items() if form != word})
    openers = list(first_lines.values())

    def known(part: list) -> list:
        return [line for line in part if all(word in vocabulary for word in line[1] + line[2])]

    if settings.rare_words == "drop":
        report["rare word"] = sum(len(part) - len(known(part)) for part in kept.values())
        kept, openers = {name: known(part) for name, part in kept.items()}, known(openers)
    if settings.held_out_share == 0:
        kept = dict.fromkeys(SPLITS, kept["train"])
    report |= {name: len(part) for name, part in kept.items()}
    if not all(kept.values()):
        raise UserError(f"Too little is left to split: {report}. Give a larger corpus, or settings that drop less.")
    texts = {name: [(" ".join(query), " ".join(response)) for _, query, response in kept[name]] for name in SPLITS[1:]}
    if settings.openers:
        report["openers"] = len(openers)
        kept["train"] += openers
    splits = {}
    for name, part in kept.items():
        words = [(with_context(before, query, settings.context_words), answer) for before, query, answer in part]
        splits[name] = Pairs.from_words(words, vocabulary)
    source = {name: value for name, value in vars(corpus).items() if name != "exchanges"} | {"unit": unit}
    choices = repr([getattr(settings, name) for name in DATA_SETTINGS])
    made_from = digest(corpus.digest, choices, str(FORMAT), *vocabulary.words)
    short = {spell(query, vocabulary.spelling) for _, query, _ in known(kept["train"]) if len(query) <= 12}
    examples = random.Random(settings.seed).sample(sorted(short), min(6, len(short)))
    return Prepared(settings, vocabulary, splits, texts, report, counts, source, examples, made_from)


def with_context(before: list[str], query: list[str], context_words: int) -> list[str]:
    """The query, preceded by the last `context_words` words of the line before it and EOS, if there are any."""
    return [*before[-context_words:], SPECIAL[EOS], *query] if before and context_words else query


def split(exchanges: list[Exchange], share: float, seed: int) -> tuple[list[str], str]:
    """Each exchange's part, train, validation or test, and what was split by seed: movies, each of which goes wholly
    into one part, or where these are too few or too large conversations, or else exchanges.
    Test and validation get at least `share` of the exchanges each. All exchanges count, also those that the filters
    drop, so that models trained with different filters are held to the same movies."""
    for unit in ("movie", "conversation", "exchange"):
        owners = [getattr(exchange, unit, place) for place, exchange in enumerate(exchanges)]
        sizes = Counter(owners)
        waiting = sorted(sizes)
        random.Random(seed).shuffle(waiting)
        chosen = dict.fromkeys(waiting, "train")
        for name in ("test", "validation"):
            held_out = 0
            while held_out < share * len(exchanges) and waiting:
                owner = waiting.pop()
                chosen[owner] = name
                held_out += sizes[owner]
        parts = [chosen[owner] for owner in owners]
        if share == 0 or (set(parts) == set(SPLITS) and 2 * parts.count("train") >= len(parts)):
            break
    return parts, unit


def _padded_size(length: Tensor) -> int:
    return SIZES[bisect.bisect_left(SIZES, int(length))]


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Lists of ids as one tensor (rows, size that holds the longest) filled with PAD, and their lengths (rows,)."""
    lengths = np.array([len(row) for row in rows], np.int64)
    matrix = np.full((len(rows), _padded_size(lengths.max(initial=0))), PAD, np.int32)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    return torch.from_numpy(matrix), torch.from_numpy(lengths)
