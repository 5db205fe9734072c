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

from helpers.corpus import Corpus, Exchange
from helpers.run import digest, display_path, no_garbage_collection, read_tensors, write_tensors
from helpers.settings import DATA_SETTINGS, Settings, UserError, user_errors
from helpers.text import EOS, PAD, SOS, SPECIAL, UNK, Vocabulary, tokenise

SPLITS = ("train", "validation", "test")
FORMAT = 3  # of data.pt
BUCKET = 100  # batches whose examples are sorted by length together
# What batches are padded to, in words: few shapes, each of which libraries prepare for and CUDA graphs record.
SIZES = [2, 4, 6, 8, 10, 12, *(n * 2**k for k in range(2, 20) for n in (4, 5, 6))]


class Batch(NamedTuple):
    """A batch of exchanges as ids, padded with PAD, on one device."""

    query: Tensor  # (batch, query time)
    query_lengths: Tensor  # (batch,)
    inputs: Tensor  # (batch, response time): SOS and the response without its last id
    targets: Tensor  # (batch, response time): the response and its EOS

    def with_dropout(self, query_share: float, word_share: float) -> "Batch":
        """The batch with a share of its queries replaced by silence, and of its words (not the targets) by UNK.
        Both are drawn from torch's global random numbers, of which none are used where the share is 0."""
        query, lengths, inputs = self.query, self.query_lengths, self.inputs
        if word_share:
            query, inputs = (
                ids.masked_fill((torch.rand(ids.shape, device=ids.device) < word_share) & (ids > UNK), UNK)
                for ids in (query, inputs)
            )
        if query_share:
            silent = torch.rand(len(query), device=query.device) < query_share
            lengths = lengths.masked_fill(silent, 1)
            first = torch.arange(query.size(1), device=query.device) == 0
            query = torch.where(silent.unsqueeze(1), torch.where(first, EOS, PAD), query)
        return Batch(query, lengths, inputs, self.targets)


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
        longest = self.query_lengths[indices].max(), self.response_lengths[indices].max()
        return _padded_size(longest[0]), _padded_size(longest[1])

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
    digest: str  # of the corpus and the data settings

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
            texts = {name: [tuple(pair) for pair in pairs] for name, pairs in json.loads(state.pop("texts")).items()}
            splits = {name: Pairs(**tensors) for name, tensors in state.pop("splits").items()}
            settings, vocabulary = Settings(**state.pop("settings")), Vocabulary.from_json(state.pop("vocabulary"))
            counts = Counter(json.loads(state.pop("counts")))
            return cls(settings, vocabulary, splits, texts, counts=counts, **state)


class Tokenised(NamedTuple):
    """An exchange in words, with the query's own predecessor in the conversation, if any."""

    before: list[str]
    query: list[str]
    response: list[str]

    def known(self, vocabulary: Vocabulary) -> bool:
        return all(word in vocabulary for word in self.query + self.response)


@no_garbage_collection()
def prepare(corpus: Corpus, settings: Settings) -> Prepared:
    """Tokenise, filter, split by movie, build the vocabulary from the training part alone, encode.
    Raises UserError if nothing, or too little to split in three, is left."""
    exchanges, split_words = corpus.exchanges, functools.cache(tokenise)  # a line is often a response and then a query
    part_of = split(exchanges, settings.held_out_share, settings.seed)
    report = {"exchanges": len(exchanges), "no word left": 0, "response too long": 0, "query too long": 0}
    kept: dict[str, list[Tokenised]] = {name: [] for name in SPLITS}
    openers: list[Tokenised] = []
    before, conversation = [], None
    for asked, answered, talk, movie in exchanges:
        query, response, part = split_words(asked), split_words(answered), part_of[movie]
        if talk != conversation:
            before, conversation = [], talk
            if settings.openers and part == "train" and 0 < len(query) <= settings.max_response_words:
                openers.append(Tokenised([], [], query))
        if not query or not response:
            report["no word left"] += 1
        elif len(response) > settings.max_response_words:
            report["response too long"] += 1
        elif len(query) > settings.max_query_words and settings.long_queries == "drop":
            report["query too long"] += 1
        else:  # of a long query the end says most about the response
            kept[part].append(Tokenised(before, query[-settings.max_query_words :], response))
        before = query

    counts = Counter(itertools.chain.from_iterable(line.query + line.response for line in kept["train"]))
    vocabulary = Vocabulary.from_counts(counts, settings.min_count)
    if settings.rare_words == "drop":
        known = {name: [line for line in part if line.known(vocabulary)] for name, part in kept.items()}
        report["rare word"] = sum(map(len, kept.values())) - sum(map(len, known.values()))
        kept, openers = known, [line for line in openers if line.known(vocabulary)]
    report |= {name: len(part) for name, part in kept.items()}
    if not all(kept.values()):
        raise UserError(f"Too little is left to split: {report}. Give a larger corpus, or settings that drop less.")
    texts = {name: [(" ".join(line.query), " ".join(line.response)) for line in kept[name]] for name in SPLITS[1:]}
    if settings.openers:
        report["openers"] = len(openers)
        kept["train"] += openers
    pairs = {}
    for name, part in kept.items():
        words = [(with_context(line.before, line.query, settings.context_words), line.response) for line in part]
        pairs[name] = Pairs.from_words(words, vocabulary)
    source = {name: getattr(corpus, name) for name in ("name", "digest", "lines", "conversations")}
    choices = [getattr(settings, name) for name in DATA_SETTINGS]
    made_from = digest(corpus.digest, repr(choices), str(FORMAT))
    return Prepared(settings, vocabulary, pairs, texts, report, counts, source, made_from)


def with_context(before: list[str], query: list[str], context_words: int) -> list[str]:
    """The query, preceded by the last `context_words` words of the line before it and EOS, if there are any."""
    return [*before[-context_words:], SPECIAL[EOS], *query] if before and context_words else query


def split(exchanges: list[Exchange], share: float, seed: int) -> dict[str, str]:
    """Each movie's part, train, validation or test, chosen by seed: a movie goes wholly into one of them.
    Test and validation get at least `share` of the exchanges each. All exchanges count, also those that the filters
    drop, so that models trained with different filters are held to the same movies."""
    sizes = Counter(exchange.movie for exchange in exchanges)
    movies = sorted(sizes)
    random.Random(seed).shuffle(movies)
    chosen = dict.fromkeys(movies, "train")
    for name in ("test", "validation"):
        wanted = share * len(exchanges)
        while wanted > 0 and movies:
            movie = movies.pop()
            chosen[movie] = name
            wanted -= sizes[movie]
    return chosen


def _padded_size(length: Tensor) -> int:
    return SIZES[bisect.bisect_left(SIZES, int(length))]


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Lists of ids as one tensor (rows, size that holds the longest) filled with PAD, and their lengths (rows,)."""
    lengths = np.array([len(row) for row in rows], np.int64)
    matrix = np.full((len(rows), _padded_size(lengths.max(initial=0))), PAD, np.int32)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    return torch.from_numpy(matrix), torch.from_numpy(lengths)
