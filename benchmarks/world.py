"""The generator of the embedded corpus: a small world whose every probability is known, in the Cornell files' format.

    python -m benchmarks.world corpora/sample docs/world.md    # the grammar is world.yaml, the page tells what follows

A movie is a list of *scenes*, chains of two to ten lines of a visitor and Robin, and every line follows from the one
before it alone: `World.replies` gives all that may answer a line, with their probabilities. So the least loss that any
model can reach is known. What a scene says of one combination of words (a name, a colour, …) belongs to one movie; the
split goes by movie, so what is held out are combinations that training has never seen, of words that it has seen often.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from helpers.corpus import CONVERSATIONS, LINES, SEPARATOR
from helpers.run import atomic_write, write_text

EXCHANGES = 22000
LONGEST = 10  # lines of a scene
CAPITAL = ("name", "city", "day")  # slots whose fillers are names
GRAMMAR = Path(__file__).with_suffix(".yaml")
_SLOT = re.compile(r"{([a-z]+?)(\d?)}")


@dataclasses.dataclass(frozen=True)
class Line:
    """What is said, what it means, the fillers of its slots, and its probability as an answer to the line before."""

    text: str
    meaning: str
    words: dict[str, str]
    chance: float = 1.0


class Pattern(NamedTuple):
    """A wording with the fillers that it keeps, its probability, and how many fillers each other slot may take."""

    meaning: str
    way: str
    words: dict[str, str]
    chance: float
    free: dict[str, int]


class World:
    """The grammar of `world.yaml`, with `names` made-up names besides its own."""

    def __init__(self, names: int = 0) -> None:
        self.grammar = yaml.safe_load(GRAMMAR.read_text(encoding="utf-8"))
        self.fillers = {
            slot: text.split("|") if "|" in text else text.split() for slot, text in self.grammar["fillers"].items()
        }
        self.fillers["name"] += [made_up(index) for index in range(names)]
        self.ways = {name: meaning["ways"].split(" | ") for name, meaning in self.grammar["meanings"].items()}
        self.answers = {name: meaning.get("replies", {}) for name, meaning in self.grammar["meanings"].items()}
        self.talk = {
            name: weight for weight, names in self.grammar["talk"].items() for name in map(str.strip, names.split("|"))
        }
        self.unheard = itertools.count(1)  # words that are made up for one line

    def patterns(self, line: Line) -> Iterator[Pattern]:
        """All wordings that may answer a line. They keep the fillers of its slots, where they have the same ones."""
        for meaning, chance in self.answers[line.meaning].items():
            for way in self.ways[meaning]:
                yield self._pattern(meaning, way, line.words, chance / len(self.ways[meaning]))

    def _pattern(self, meaning: str, way: str, given: dict[str, str], chance: float) -> Pattern:
        slots = ["".join(slot) for slot in dict.fromkeys(_SLOT.findall(way))]
        words = {slot: given[slot] for slot in slots if slot in given}
        free, taken = {}, Counter(slot.rstrip("23") for slot in words)
        for slot in slots:
            if slot not in words and not slot.startswith("word"):
                kind = slot.rstrip("23")
                free[slot] = len(self.fillers[kind]) - taken[kind]
                taken[kind] += 1
        return Pattern(meaning, way, words, chance, free)

    def replies(self, line: Line) -> list[Line]:
        """All that may answer a line, the likeliest first."""
        found: dict[str, Line] = {}
        for pattern in self.patterns(line):
            for words in self._fillings(pattern.words, list(pattern.free)):
                text, chance = said(pattern.way, words), pattern.chance / math.prod(pattern.free.values())
                found[text] = Line(text, pattern.meaning, words, chance + (found[text].chance if text in found else 0))
        return sorted(found.values(), key=lambda reply: -reply.chance)

    def _fillings(self, words: dict[str, str], free: list[str]) -> Iterator[dict[str, str]]:
        if not free:
            yield words
        else:
            for word in self.choices(free[0], words):
                yield from self._fillings(words | {free[0]: word}, free[1:])

    def choices(self, slot: str, words: dict[str, str]) -> list[str]:
        """What may stand in a slot: no filler of its kind is said twice in a line."""
        return [word for word in self.fillers[slot.rstrip("23")] if word not in words.values()]

    def say(self, meaning: str, given: dict[str, str], randomness: random.Random) -> Line:
        """A line of this meaning, which keeps what is `given`. Its chance is that among all of this meaning."""
        way = randomness.choice(self.ways[meaning])
        pattern = self._pattern(meaning, way, given, 1 / len(self.ways[meaning]))
        filled = dict(pattern.words)
        for slot in dict.fromkeys("".join(slot) for slot in _SLOT.findall(way)):
            if slot.startswith("word"):
                filled[slot] = made_up(-next(self.unheard))
            elif slot in pattern.free:
                filled[slot] = randomness.choice(self.choices(slot, filled))
        return Line(said(way, filled), meaning, filled, pattern.chance / math.prod(pattern.free.values()))

    def scene(self, opening: Line, randomness: random.Random) -> list[Line]:
        """A scene that opens with this line: each answers the one before it."""
        lines = [opening]
        while answers := self.answers[lines[-1].meaning]:
            if len(lines) == LONGEST or (len(lines) > 1 and randomness.random() < self.grammar["stop"]):
                break
            meaning = randomness.choices(list(answers), answers.values())[0]
            reply = self.say(meaning, lines[-1].words, randomness)
            lines.append(dataclasses.replace(reply, chance=reply.chance * answers[meaning]))
        return lines

    def movies(self, seed: int) -> Iterator[list[list[Line]]]:
        """One movie after another, without end: a list of scenes."""
        randomness = random.Random(seed)
        decks = {slot: _Deck(words, randomness) for slot, words in self.fillers.items()}
        used: set[tuple] = set()
        while True:
            openings = []
            for meaning, count in self.grammar["facts"].items():
                for _ in range(count):
                    openings += self._twins(meaning, self._combination(meaning, decks, used), randomness)
            for meaning in randomness.choices(list(self.talk), self.talk.values(), k=self.grammar["talk_scenes"]):
                opening = self.say(meaning, {}, randomness)
                alone = self.grammar["meanings"][meaning].get("alone")
                if not alone and randomness.random() < self.grammar["greeted"]:
                    greeting = said(randomness.choice(self.fillers["greeting"]), {})
                    text = greeting + randomness.choice([". ", "! ", ", Robin. "]) + opening.text
                    opening = dataclasses.replace(opening, text=text)
                openings.append(opening)
            for place, opening in enumerate(openings):
                if randomness.random() < self.grammar["unmarked"]:
                    openings[place] = dataclasses.replace(opening, text=opening.text.rstrip(".!?"))
            yield [self.scene(opening, randomness) for opening in openings]

    def _combination(self, meaning: str, decks: dict[str, _Deck], used: set[tuple]) -> dict[str, str]:
        """Fillers of a fact's slots, such that neither what is asked for nor what distracts stood anywhere before."""
        slots = sorted({slot for way in self.ways[meaning] for slot in _SLOT.findall(way)})
        while True:
            words: dict[str, str] = {}
            for slot, number in slots:
                words[slot + number] = decks[slot].draw(but_not=words.get(slot))
            keys = [
                (meaning, *(words.get(slot + number, words.get(slot)) for slot in sorted({slot for slot, _ in slots})))
                for number in {number for _, number in slots}
            ]
            if not used.intersection(keys):
                used.update(keys)
                return words

    def _twins(self, meaning: str, words: dict[str, str], randomness: random.Random) -> Iterator[Line]:
        """Two openings about one combination. Where there is something that distracts, the second one asks for it: what
        was said is the same, only the question tells what to look at."""
        other = words | {
            slot: words[twin] for one in words for slot, twin in [(one, one + "2"), (one + "2", one)]
            if slot in words and twin in words
        }  # fmt: skip
        for way, fillers in zip(randomness.sample(self.ways[meaning], 2), (words, other), strict=True):
            slots = ["".join(slot) for slot in _SLOT.findall(way)]
            yield Line(said(way, fillers), meaning, {slot: fillers[slot] for slot in slots})

    def expected(self) -> dict[str, float]:
        """How often each meaning is answered in a movie, on average."""
        scale = self.grammar["talk_scenes"] / sum(self.talk.values())
        at = {meaning: weight * scale for meaning, weight in self.talk.items()}
        at |= {meaning: 2 * count for meaning, count in self.grammar["facts"].items()}
        answered: Counter[str] = Counter()
        for turn in range(1, LONGEST):
            following: Counter[str] = Counter()
            for meaning, number in at.items():
                number *= bool(self.answers[meaning]) * (1 if turn == 1 else 1 - self.grammar["stop"])
                answered[meaning] += number
                following.update({reply: number * chance for reply, chance in self.answers[meaning].items()})
            at = following
        return +answered

    def entropy(self, meaning: str) -> float:
        """Of the answers to a line of this meaning, in nats: what a model that knows the world loses on average."""
        line = self.say(meaning, {}, random.Random(1))
        return sum(one.chance * math.log(math.prod(one.free.values()) / one.chance) for one in self.patterns(line))


def said(way: str, words: dict[str, str]) -> str:
    """A wording with its slots filled, as people write it."""
    text = way.format(**{slot: word.title() if slot.startswith(CAPITAL) else word for slot, word in words.items()})
    return re.sub(r"(?:^|[.!?] )[a-z]", lambda match: match[0].upper(), text)


def scenes(exchanges: int = EXCHANGES, seed: int = 1) -> Iterator[list[list[Line]]]:
    """The movies of a corpus of at least so many exchanges: the same arguments always give the same ones.
    Beyond the default size new names are made up, so that a corpus of any size (300 thousand lines, 3 million) has
    combinations of its own in every movie, and its vocabulary grows."""
    made, per_movie = 0, sum(World().expected().values())
    names = max(0, exchanges - EXCHANGES) / per_movie / 3  # a new one for three movies: their combinations suffice
    for movie in World(round(names)).movies(seed):
        yield movie
        made += sum(len(scene) - 1 for scene in movie)
        if made >= exchanges:
            return


def write_corpus(folder: str | Path, exchanges: int = EXCHANGES, seed: int = 1) -> Path:
    """Write `movie_lines.txt` and `movie_conversations.txt` into the folder."""
    folder, number = Path(folder), 0
    with atomic_write(folder / LINES) as lines_file, atomic_write(folder / CONVERSATIONS) as conversations_file:
        for movie, conversations in enumerate(scenes(exchanges, seed)):
            speakers = [(f"u{2 * movie}", "VISITOR"), (f"u{2 * movie + 1}", "ROBIN")]
            for conversation in conversations:
                ids = [f"L{number + turn}" for turn in range(len(conversation))]
                for turn, line in enumerate(conversation):
                    user, name = speakers[turn % 2]
                    lines_file.write(_record(ids[turn], user, f"m{movie}", name, line.text))
                conversations_file.write(_record(speakers[0][0], speakers[1][0], f"m{movie}", str(ids)))
                number += len(ids)
    return folder


def _record(*fields: str) -> bytes:
    return (SEPARATOR.join(fields) + "\n").encode("iso-8859-1")


class _Deck:
    """Words dealt like cards: shuffled, and every word comes once before any comes again."""

    def __init__(self, words: list[str], randomness: random.Random) -> None:
        self.words, self.randomness, self.left = words, randomness, []

    def draw(self, but_not: str | None = None) -> str:
        if not self.left:
            self.left = self.randomness.sample(self.words, len(self.words))
        word = self.left.pop()
        return self.draw(but_not) if word == but_not else word


def made_up(index: int) -> str:
    """A word of four syllables that is no English one, another for each of 194,481 numbers."""
    index = (index * 99_991 + 31_415) % 21**4  # one to one, since 99,991 is prime
    syllables = [consonant + vowel for consonant in "bdlmrvz" for vowel in "aeo"]
    digits = [index // 21**place % 21 for place in range(4)]
    return "".join(syllables[digit] for digit in digits)


def known(tokenise: Callable[[str], list[str]], exchanges: int = EXCHANGES) -> dict[tuple[str, str], tuple[Line, Line]]:
    """What stands behind each exchange of the corpus: the lines of query and response, by their words with blanks
    between. The response's `chance` is its probability, given the query."""
    pairs = (pair for movie in scenes(exchanges) for scene in movie for pair in itertools.pairwise(scene))
    return {(" ".join(tokenise(query.text)), " ".join(tokenise(reply.text))): (query, reply) for query, reply in pairs}


def page() -> str:
    """docs/world.md: what follows from the grammar."""
    world = World()
    often, facts = world.expected(), world.grammar["facts"]
    total = sum(often.values())
    mean = sum(number * world.entropy(meaning) for meaning, number in often.items()) / total
    rows = []
    for meaning in sorted(often, key=lambda meaning: (-often[meaning], meaning))[:30]:
        replies = ", ".join(f"{reply} {chance:g}" for reply, chance in world.answers[meaning].items())
        example = world.say(meaning, {}, random.Random(1)).text
        share, nats = f"{often[meaning] / total:.1%}", f"{world.entropy(meaning):.2f}"
        rows.append(f"| {' | '.join([meaning, 'fact' * (meaning in facts), example, share, replies, nats])} |")
    return PAGE.format(
        exchanges=EXCHANGES, meanings=len(world.ways), wordings=sum(map(len, world.ways.values())), mean=mean,
        per_movie=total, rows="\n".join(rows), stop=world.grammar["stop"], longest=LONGEST,
        fillers=", ".join(f"{len(words)} of {slot}" for slot, words in world.fillers.items()),
    )  # fmt: skip


PAGE = r"""# The world of the embedded corpus

The corpus in [corpora/sample](../corpora/sample) is drawn by a program, [world.py](../benchmarks/world.py), from a
grammar that one can read, [world.yaml](../benchmarks/world.yaml). So every probability in it is known, and with them
the least loss that any model can reach. This page is made by the same program (`python -m
benchmarks.world corpora/sample docs/world.md`), and a test holds both to it.

## How a scene is drawn

A movie is a list of scenes, chains of two to {longest} lines between a visitor and Robin, a small machine. A line has a
*meaning* (there are {meanings}) and is said in one of that meaning's wordings (there are {wordings} in all), which are
equally likely. The next line's meaning is drawn with the probabilities that the grammar gives for the line before it,
and depends on nothing else. It takes over the names and things of that line; others are drawn again, all equally likely
({fillers}).
After each answer the scene ends with probability {stop:g}.

*Facts* are about one combination of words, which is said in one movie only. There are always two scenes of it. Where
something distracts (two things with two colours, two people at a place), the second scene asks for what distracts in
the first one: what is said is the same, only the question tells what to look at. Since training, validation and test
have different movies, what is held out are combinations that training has never seen. Words such as *dolemar* are made
up for one line: nobody can know them, and a model learns to say so.

## The least possible loss

Let $P(r \mid q)$ be the probability of a response given its query. A model that knows the world loses on average

$$H = \sum_q P(q) \sum_r -P(r \mid q) \ln P(r \mid q)$$

nats per response, and nothing can lose less. Here $H$ = {mean:.3f}: the mean of the last column below, weighted by how
often each meaning is answered, over the {per_movie:.1f} exchanges that a movie has on average. A particular corpus of
{exchanges:,} exchanges comes near it, and what its responses cost is known one by one (`world.known`).

The thirty meanings that are answered most often:

| meaning | | for example | share | answered by | nats |
|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    write_corpus(sys.argv[1])
    for target in sys.argv[2:]:
        write_text(Path(target), page())
