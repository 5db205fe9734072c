"""Exchanges to tensors: filters, split, vocabulary, and seeded batches of similar length."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers.corpus import DATA, Corpus, Exchange, fingerprint, locate, read_corpus
from helpers.run import code_of, digest, need, no_collection, read_tensors, shown, write_tensors
from helpers.settings import DATA_SETTINGS, Settings, UserError, refusing
from helpers.text import EOS, PAD, SOS, SPECIAL, UNK, Vocabulary, tokenise_all

SPLITS = ("train", "validation", "test")
FORMAT = 2  # of data.pt
CACHED = 5  # corpora that are kept prepared
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
            query, inputs = (
                ids.masked_fill((torch.rand(ids.shape, device=ids.device) < word_share) & (ids > UNK), UNK)
                for ids in (query, inputs)
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
        return cls.from_ids(*(_encoded([pair[side] for pair in pairs], vocabulary) for side in (0, 1)))

    @classmethod
    def from_ids(cls, queries: np.ndarray, responses: np.ndarray) -> Pairs:
        """The same from (examples, words) with PAD after the last word of each."""
        queries = np.pad(queries, ((0, 0), (0, int(queries.shape[1] == 0))), constant_values=PAD)
        queries[queries[:, 0] == PAD, 0] = EOS
        responses = np.pad(responses, ((0, 0), (0, 1)), constant_values=PAD)
        lengths = (responses != PAD).sum(1)
        responses[np.arange(len(responses)), lengths] = EOS
        query_lengths, lengths = (queries != PAD).sum(1), lengths + 1
        queries = np.ascontiguousarray(queries[:, : query_lengths.max(initial=0)])
        responses = np.ascontiguousarray(responses[:, : lengths.max(initial=0)])
        return cls(*map(torch.from_numpy, (queries, query_lengths, responses, lengths)))

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
        return torch.argsort(self.keys, stable=True)

    @property
    def keys(self) -> Tensor:
        """(examples,): what sorts them by response length, then query length."""
        return self.response_lengths * 4096 + self.query_lengths


class BucketedSampler:
    """Seeded batches of similar length, a pure function of (seed, epoch): nothing to save for an exact resume.

    Each epoch is shuffled, cut into buckets of 50 batches, each bucket sorted by length and cut into batches, and
    the batches shuffled. Every example comes once an epoch.
    """

    def __init__(self, pairs: Pairs, batch_size: int, seed: int) -> None:
        self.keys = pairs.keys
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
            "splits": {name: vars(pairs) for name, pairs in self.splits.items()},
            "texts": json.dumps(self.texts),  # as text, which loads many times faster than as objects
            "report": self.report,
            "counts": json.dumps(self.counts),
            "corpus": self.corpus,
            "digest": self.digest,
        }
        write_tensors(path, state)

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """What `save` wrote. Raises UserError if the file is missing, damaged or of another format."""
        need(path, "notebook 01_data_preparation")
        again = "Delete it and prepare the data again."
        state = read_tensors(path, again)
        if state.get("format") != FORMAT:
            raise UserError(f"{shown(path)} is not of format {FORMAT}. {again}")
        kinds = (KeyError, TypeError, ValueError, AttributeError, RecursionError, UserError)
        with refusing(f"{shown(path)} is incomplete", again, *kinds):
            return cls(
                Settings().change(**state["settings"]),
                Vocabulary.from_json(state["vocabulary"]),
                {name: Pairs(**tensors) for name, tensors in state["splits"].items()},
                {name: [tuple(pair) for pair in pairs] for name, pairs in json.loads(state["texts"]).items()},
                state["report"],
                Counter(json.loads(state["counts"])),
                state["corpus"],
                state["digest"],
            )


def prepared_data(source: str | Path, settings: Settings) -> Prepared:
    """`prepare(read_corpus(source), settings)`, kept in `data/cache` under a key of the files, settings and code.

    The cache holds the last few corpora that were prepared, and can be deleted at any time.
    """
    path, name = locate(source)
    choices = repr([getattr(settings, name) for name in DATA_SETTINGS])
    key = digest(fingerprint(path), name, choices, *code_of("corpus", "text", "batches"))
    cached = DATA / "cache" / f"{key}.pt"
    with contextlib.suppress(UserError):  # not there, or damaged: made anew
        return dataclasses.replace(Prepared.load(cached), settings=settings)
    prepared = prepare(read_corpus(source), settings)
    with contextlib.suppress(UserError, OSError):  # without room or leave to write, the next run prepares anew
        prepared.save(cached)
        for old in sorted(cached.parent.glob("*.pt"), key=lambda file: file.stat().st_mtime)[:-CACHED]:
            old.unlink()
    return prepared


@no_collection()
def prepare(corpus: Corpus, settings: Settings) -> Prepared:
    """Tokenise, filter, split by movie, build the vocabulary from the training part alone, encode.

    Raises UserError if nothing, or too little to split in three, is left.
    """
    exchanges = corpus.exchanges
    lines = _Lines(exchanges)
    query_words, response_words = lines.lengths[lines.queries], lines.lengths[lines.responses]
    empty = (query_words == 0) | (response_words == 0)
    long_response = ~empty & (response_words > settings.max_response_words)
    long_query = ~empty & ~long_response & (query_words > settings.max_query_words)
    if settings.long_queries == "cut":  # of a long query the end says most about the response
        long_query[:] = False
    kept = ~(empty | long_response | long_query)
    report = {"exchanges": len(exchanges), "no word left": int(empty.sum())}
    report |= {"response too long": int(long_response.sum()), "query too long": int(long_query.sum())}

    chosen = split(exchanges, settings.held_out_share, settings.seed)
    part_of = np.fromiter((SPLITS.index(chosen[exchange.movie]) for exchange in exchanges), np.int8, len(exchanges))
    rows = np.flatnonzero(kept)
    queries = lines.matrix(lines.queries[rows], settings.max_query_words)
    responses = lines.matrix(lines.responses[rows], settings.max_response_words)
    said = [side[part_of[rows] == 0] for side in (queries, responses)]
    totals = sum(np.bincount(side[side >= 0], minlength=len(lines.words)) for side in said)
    counts = Counter({word: int(total) for word, total in zip(lines.words, totals, strict=True) if total})
    vocabulary = Vocabulary.from_counts(counts, settings.min_count)
    ids = np.array([*vocabulary.encode(lines.words), PAD], np.int32)  # number -1, which is padding, finds the last
    queries, responses = ids[queries], ids[responses]
    if settings.rare_words == "drop":
        known = ~((queries == UNK).any(1) | (responses == UNK).any(1))
        report["rare word"] = int((~known).sum())
        rows, queries, responses = rows[known], queries[known], responses[known]
    encoded, parts = {}, {}
    for number, name in enumerate(SPLITS):
        here = part_of[rows] == number
        if not here.any():
            raise UserError(
                f"No exchange is left for {name}: {report}. Give a larger corpus, or settings that drop less."
            )
        report[name] = int(here.sum())
        parts[name], encoded[name] = rows[here], [queries[here], responses[here]]
        if settings.context_words:
            encoded[name][0] = lines.in_context(exchanges, parts[name], settings, vocabulary)
    if settings.openers:
        first = {exchange.conversation: number for number, exchange in reversed([*enumerate(exchanges)])}.values()
        openers = lines.queries[[number for number in first if part_of[number] == 0]]
        openers = openers[(lines.lengths[openers] > 0) & (lines.lengths[openers] <= settings.max_response_words)]
        opening = ids[lines.matrix(openers, settings.max_response_words)]
        if settings.rare_words == "drop":
            opening = opening[~(opening == UNK).any(1)]
        silence = np.zeros((len(opening), 0), np.int32)
        encoded["train"] = [_below(*two) for two in zip(encoded["train"], (silence, opening), strict=True)]
        report["openers"] = len(opening)
    choices = {name: getattr(settings, name) for name in DATA_SETTINGS}
    return Prepared(
        settings,
        vocabulary,
        {name: Pairs.from_ids(*sides) for name, sides in encoded.items()},
        {name: lines.texts(parts[name], settings) for name in SPLITS[1:]},
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
    """The share of places, in queries and responses, that would hold padding in these batches (tensors of indices)."""
    lengths = [side[indices] for indices in batches for side in (pairs.query_lengths, pairs.response_lengths)]
    places = sum(int(part.max()) * len(part) for part in lengths)
    return 1 - sum(int(part.sum()) for part in lengths) / places


class _Lines:
    """All lines of a corpus, every different one tokenised once, and those that each exchange is made of."""

    def __init__(self, exchanges: list[Exchange]) -> None:
        numbers: dict[str, int] = {}
        self.queries = np.array([numbers.setdefault(exchange.query, len(numbers)) for exchange in exchanges], np.int64)
        self.responses = np.array(
            [numbers.setdefault(exchange.response, len(numbers)) for exchange in exchanges], np.int64
        )
        self.stream, self.lengths, self.words = tokenise_all(list(numbers))
        self.ends = np.cumsum(self.lengths)

    def matrix(self, lines: np.ndarray, most: int) -> np.ndarray:
        """The last `most` words of some lines by their numbers, (lines, words), with -1 after the last of each."""
        lengths = np.minimum(self.lengths[lines], most)
        return _matrix(self.stream, self.ends[lines] - lengths, lengths, -1)

    def last_words(self, line: int, most: int) -> list[str]:
        """The last `most` words of a line."""
        end, length = self.ends[line], self.lengths[line]
        return [self.words[word] for word in self.stream[end - min(length, most) : end].tolist()]

    def texts(self, rows: np.ndarray, settings: Settings) -> list[tuple[str, str]]:
        """Queries, cut, and responses of some exchanges as normalised text."""
        most = (settings.max_query_words, settings.max_response_words)
        sides = (self.queries, self.responses)
        return [tuple(" ".join(self.last_words(side[i], n)) for side, n in zip(sides, most, strict=True)) for i in rows]

    def in_context(
        self, exchanges: list[Exchange], rows: np.ndarray, settings: Settings, vocabulary: Vocabulary
    ) -> np.ndarray:
        """The queries of some exchanges with the line before each, where there is one, as ids."""
        queries = []
        for i in rows:
            query, before = self.last_words(self.queries[i], settings.max_query_words), []
            if i and exchanges[i - 1].conversation == exchanges[i].conversation:
                before = self.last_words(self.queries[i - 1], settings.context_words)
            queries.append(with_context(before, query, settings.context_words))
        return _encoded(queries, vocabulary)


def _below(*matrices: np.ndarray) -> np.ndarray:
    """Rows of ids one below the other, as wide as the widest."""
    widest = max(matrix.shape[1] for matrix in matrices)
    wide = [np.pad(matrix, ((0, 0), (0, widest - matrix.shape[1])), constant_values=PAD) for matrix in matrices]
    return np.concatenate(wide)


def _encoded(texts: list[list[str]], vocabulary: Vocabulary) -> np.ndarray:
    """Lists of words as rows of ids, filled up with PAD."""
    ids = np.array([index for words in texts for index in vocabulary.encode(words)], np.int32)
    lengths = np.array([len(words) for words in texts], np.int64)
    return _matrix(ids, np.cumsum(lengths) - lengths, lengths, PAD)


def _matrix(stream: np.ndarray, starts: np.ndarray, lengths: np.ndarray, filler: int) -> np.ndarray:
    """Pieces of a stream as the rows of a matrix, filled up with `filler`."""
    rows = np.full((len(lengths), lengths.max(initial=0)), filler, np.int32)
    places = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = stream[places]
    return rows
