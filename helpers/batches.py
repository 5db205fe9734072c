"""Exchanges to tensors: filters, split, vocabulary, and seeded batches of similar length."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.corpus import Corpus, Exchange
from helpers.run import digest, read_tensors, shown, write_tensors
from helpers.settings import DATA_SETTINGS, Settings, UserError
from helpers.text import EOS, PAD, SOS, SPECIAL, UNK, Vocabulary, tokenise

SPLITS = ("train", "validation", "test")
FORMAT = 1  # of data.pt
BUCKET = 50  # batches whose examples are sorted by length together


class Batch(NamedTuple):
    """A batch of exchanges as ids, padded with PAD, on one device."""

    query: Tensor  # (batch, query time)
    query_lengths: Tensor  # (batch,), on the CPU, where packing wants them
    inputs: Tensor  # (batch, response time): SOS and the response without its last id
    targets: Tensor  # (batch, response time): the response and its EOS

    @property
    def target_mask(self) -> Tensor:
        """(batch, response time): True where there is a real token, which is where the loss counts."""
        return self.targets != PAD

    def dropped(self, query_share: float, word_share: float) -> Batch:
        """The batch with a share of its queries replaced by silence, and of its words (not the targets) by UNK.

        Both are drawn from torch's global random numbers, of which none are used where the share is 0.
        """
        query, lengths, inputs = self.query, self.query_lengths, self.inputs
        if word_share:
            query = query.masked_fill((torch.rand(query.shape, device=query.device) < word_share) & (query > UNK), UNK)
            inputs = inputs.masked_fill(
                (torch.rand(inputs.shape, device=inputs.device) < word_share) & (inputs > UNK), UNK
            )
        if query_share:
            silent = torch.rand(len(query)) < query_share
            lengths = lengths.masked_fill(silent, 1)
            silent = silent.to(query.device, non_blocking=True).unsqueeze(1)
            first = torch.arange(query.size(1), device=query.device) == 0
            query = torch.where(silent, torch.where(first, EOS, PAD), query)
        return Batch(query, lengths, inputs, self.targets)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The exchanges of one split as resident tensors, padded to the longest; responses end in EOS."""

    queries: Tensor  # (examples, query time), int32
    query_lengths: Tensor  # (examples,)
    responses: Tensor  # (examples, response time), int32
    response_lengths: Tensor  # (examples,), EOS counted

    @classmethod
    def from_words(cls, pairs: list[tuple[list[str], list[str]]], vocabulary: Vocabulary) -> Pairs:
        """Encode (query words, response words). A query of no words is silence: EOS alone."""
        queries = [vocabulary.encode(query) or [EOS] for query, _ in pairs]
        responses = [[*vocabulary.encode(response), EOS] for _, response in pairs]
        return cls(*_padded(queries), *_padded(responses))

    def __len__(self) -> int:
        return len(self.queries)

    def to(self, device: torch.device) -> Pairs:
        """The same with the ids on a device; the lengths stay on the CPU, where batches are planned."""
        return dataclasses.replace(self, queries=self.queries.to(device), responses=self.responses.to(device))

    def batch(self, indices: Tensor) -> Batch:
        """The examples with these indices (on the CPU), padded to the longest among them."""
        lengths = self.query_lengths[indices]
        longest = int(self.response_lengths[indices].max())
        where = indices.to(self.queries.device, non_blocking=True)
        query = self.queries[where, : int(lengths.max())].long()
        targets = self.responses[where, :longest].long()
        start = torch.full_like(targets[:, :1], SOS)
        return Batch(query, lengths, torch.cat([start, targets[:, :-1]], dim=1), targets)

    def first(self, count: int) -> Pairs:
        """The first `count` examples."""
        return Pairs(*(getattr(self, field.name)[:count] for field in dataclasses.fields(self)))

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """All examples once, those of similar length together: for evaluation, where order does not matter."""
        for indices in self.order().split(batch_size):
            yield self.batch(indices)

    def order(self) -> Tensor:
        """Indices by rising response length, then query length."""
        return torch.argsort(self.response_lengths * 4096 + self.query_lengths, stable=True)


class BucketedSampler:
    """Seeded batches of similar length, a pure function of (seed, epoch): nothing to save for an exact resume.

    Each epoch is shuffled, cut into buckets of 50 batches, each bucket sorted by length and cut into batches, and
    the batches shuffled. Every example comes once an epoch.
    """

    def __init__(self, pairs: Pairs, batch_size: int, seed: int) -> None:
        self.keys = pairs.response_lengths * 4096 + pairs.query_lengths
        self.batch_size, self.seed = batch_size, seed
        self.batches_per_epoch = -(-len(pairs) // batch_size)

    def epoch(self, epoch: int) -> list[Tensor]:
        """The batches of an epoch, each a tensor of indices."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.keys), generator=generator)
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
    texts: dict[str, list[tuple[str, str]]]  # validation and test, as normalised text with every word, no context
    report: dict[str, int]  # exchanges after each filter
    counts: Counter[str]  # training words
    corpus: dict[str, str | int]
    digest: str  # of the corpus and the data settings

    def save(self, path: Path) -> None:
        state = {
            "format": FORMAT,
            "settings": self.settings.to_dict(),
            "vocabulary": self.vocabulary.to_json(),
            "splits": {name: dataclasses.asdict(pairs) for name, pairs in self.splits.items()},
            "texts": self.texts,
            "report": self.report,
            "counts": dict(self.counts),
            "corpus": self.corpus,
            "digest": self.digest,
        }
        write_tensors(path, state)

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """What `save` wrote. Raises UserError if the file is missing, damaged or of another format."""
        if not path.is_file():
            raise UserError(f"{shown(path)} is missing: notebook 01_data_preparation makes it. Run that first.")
        state = read_tensors(path, "Delete it and prepare the data again.")
        if state.get("format") != FORMAT:
            raise UserError(f"{shown(path)} is not of format {FORMAT}: delete it and prepare the data again.")
        try:
            return cls(
                Settings().change(**state["settings"]),
                Vocabulary.from_json(state["vocabulary"]),
                {name: Pairs(**tensors) for name, tensors in state["splits"].items()},
                state["texts"],
                state["report"],
                Counter(state["counts"]),
                state["corpus"],
                state["digest"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{shown(path)} is incomplete ({error!r}). Delete it and prepare the data again.") from None


def prepare(corpus: Corpus, settings: Settings) -> Prepared:
    """Tokenise, filter, split by movie, build the vocabulary from the training part alone, encode.

    Raises UserError if nothing, or too little to split in three, is left.
    """
    report = {"exchanges": len(corpus.exchanges)}
    kept: list[tuple[Exchange, list[str], list[str]]] = []
    empty = long_response = long_query = 0
    for exchange in corpus.exchanges:
        query, response = tokenise(exchange.query), tokenise(exchange.response)
        if not query or not response:
            empty += 1
        elif len(response) > settings.max_response_words:
            long_response += 1
        elif len(query) > settings.max_query_words and settings.long_queries == "drop":
            long_query += 1
        else:  # of a long query the end says most about the response
            kept.append((exchange, query[-settings.max_query_words :], response))
    report |= {"no word left": empty, "response too long": long_response, "query too long": long_query}

    chosen = split(corpus.exchanges, settings.held_out_share, settings.seed)
    parts: dict[str, list] = {name: [row for row in kept if chosen[row[0].movie] == name] for name in SPLITS}
    counts = Counter(word for _, query, response in parts["train"] for word in query + response)
    vocabulary = Vocabulary.from_counts(counts, settings.min_count)
    if settings.rare_words == "drop":
        before = sum(len(part) for part in parts.values())
        parts = {name: [row for row in part if _known(row, vocabulary)] for name, part in parts.items()}
        report["rare word"] = before - sum(len(part) for part in parts.values())
    for name, part in parts.items():
        if not part:
            raise UserError(
                f"No exchange is left for {name}: {report}. Give a larger corpus, or settings that drop less."
            )
        report[name] = len(part)
    pairs = {name: [(query, response) for _, query, response in part] for name, part in parts.items()}
    texts = {name: [(" ".join(query), " ".join(response)) for query, response in pairs[name]] for name in SPLITS[1:]}
    if settings.context_words:
        follows = itertools.pairwise(corpus.exchanges)
        before = {id(later): earlier.query for earlier, later in follows if earlier.conversation == later.conversation}
        for name, part in parts.items():
            pairs[name] = [
                (with_context(tokenise(before.get(id(exchange), "")), query, settings.context_words), response)
                for exchange, query, response in part
            ]
    if settings.openers:
        first = {exchange.conversation: exchange for exchange in reversed(corpus.exchanges)}.values()
        lines = [tokenise(exchange.query) for exchange in first if chosen[exchange.movie] == "train"]
        lines = [line for line in lines if 0 < len(line) <= settings.max_response_words]
        if settings.rare_words == "drop":
            lines = [line for line in lines if all(word in vocabulary for word in line)]
        pairs["train"] += [([], line) for line in lines]
        report["openers"] = len(lines)
    choices = {name: getattr(settings, name) for name in DATA_SETTINGS}
    return Prepared(
        settings,
        vocabulary,
        {name: Pairs.from_words(rows, vocabulary) for name, rows in pairs.items()},
        texts,
        report,
        counts,
        {"name": corpus.name, "digest": corpus.digest, "lines": corpus.lines, "conversations": corpus.conversations},
        digest(corpus.digest, repr(sorted(choices.items())), str(FORMAT)),
    )


def with_context(before: list[str], query: list[str], context_words: int) -> list[str]:
    """The query, preceded by the last `context_words` words of the line before it and EOS, if there are any."""
    return [*before[-context_words:], SPECIAL[EOS], *query] if before and context_words else query


def split(exchanges: list[Exchange], share: float, seed: int) -> dict[str, str]:
    """Each movie's part, train, validation or test, chosen by seed: a movie goes wholly into one of them.

    Test and validation get at least `share` of the exchanges each. All exchanges count, also those that the filters
    drop, so that models trained with different filters are held to the same movies.
    """
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


def padding_share(batches: list[Tensor], pairs: Pairs) -> float:
    """The share of response places that would hold padding in these batches (tensors of indices)."""
    lengths = [pairs.response_lengths[indices] for indices in batches]
    places = sum(int(part.max()) * len(part) for part in lengths)
    return 1 - sum(int(part.sum()) for part in lengths) / places


def _known(row: tuple[Exchange, list[str], list[str]], vocabulary: Vocabulary) -> bool:
    return all(word in vocabulary for words in row[1:] for word in words)


def _padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.long)
    padded = torch.full((len(sequences), max(map(len, sequences), default=0)), PAD, dtype=torch.int32)
    if len(sequences):
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        padded[mask] = torch.tensor([index for ids in sequences for index in ids], dtype=torch.int32)
    return padded, lengths
