"""The generator of the embedded corpus: a small world of people, things and places, in the Cornell files' own format.

    python -m benchmarks.world corpora/sample

Each *conversation* is a chain of two or three lines, and every line follows from the one before it alone. Each is
about one *combination* of words (a name, a city, …), and a combination belongs to one *movie*. The split goes by
movie, so what is held out are combinations that training has never seen, made of words that it has seen often.
Only a conversation's first line is paraphrased; a reply is always the same for the same query.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers.corpus import SEPARATOR
from helpers.run import atomic_write

EXCHANGES = 12000
PARAPHRASES = 2  # of each combination that a movie is about

WORLD = {
    "name": """anna ben clara david emma frank grace henry iris jack kate leo mary nina oscar paul rosa sam tina victor
        alice bruno celia dora eddie fiona george hannah ivan julia karl laura martin nora otto peter ruth simon thomas
        walter adam bella daisy edgar flora gustav helen linda marco oliver rita stella toby vera william agnes boris
        chloe felix gloria""",
    "city": """paris london rome berlin madrid vienna lisbon dublin oslo athens cairo boston chicago moscow tokyo
        sydney prague warsaw geneva dallas havana lima naples venice""",
    "thing": """hat coat box lamp book chair table clock bag cup plate knife bottle mirror carpet blanket pencil radio
        guitar piano boat bicycle car wagon ladder basket candle pillow whistle drum violin hammer kettle
        lantern mask ring scarf shirt sword tent""",
    "colour": "red blue green yellow black white brown pink grey purple golden silver",
    "place": """market station library church school hospital museum theatre park bridge harbour garden bakery castle
        hotel airport bank office cinema farm beach river lake forest mill palace stadium zoo cafe pharmacy""",
    "food": """bread cheese soup rice fish cake honey butter apples cherries onions carrots potatoes beans noodles
        pancakes mushrooms olives lemons plums sausages salad eggs pie""",
    "job": """doctor teacher lawyer painter baker driver sailor nurse farmer writer singer dancer builder pilot cook
        judge soldier tailor plumber gardener""",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "hour": "one two three four five six seven eight nine ten eleven noon",
    "greeting": "hello|hi|hey|good morning|good evening|good afternoon|greetings|howdy|good day|hi there|ahoy",
    "smalltalk": """=Nice to see you again.|How are you?=I am fine, thank you.|What is your name?=My name is Robin.|Who
        are you?=I am Robin, a small machine.|Where do you live?=I live in a small computer.|How old are you?=I was
        born this morning.|Are you human?=No, I am only a program.|Can you help me?=Yes, tell me what you need.|Do
        you like music?=Yes, I love every song.|What can you do?=I can talk about people and things.|Are you
        happy?=Yes, I am always happy.|Do you ever sleep?=No, I never sleep.|Is it raining?=I can't see the sky from
        here.|Tell me a joke!=I don't know any.|What time is it?=I have no clock.""",
}

# A kind: the paraphrases of the query, then the lines that answer one another. {a1} is the asked-for filler of slot
# a, {a2} another one that only distracts.
KINDS = {
    "introduction": (
        [
            "Hello, I am {name1} from {city1}.",
            "Hi, my name is {name1} and I live in {city1}.",
            "My name is {name1}. I come from {city1}.",
            "Good morning, {name1} from {city1} here.",
        ],
        "Nice to meet you, {name1}. How is {city1}?",
        "{city1} is lovely, thank you. I am glad to be here.",
    ),
    "colour": (
        [
            "{name1} has a {colour1} {thing1} and a {colour2} {thing2}. What colour is the {thing1}?",
            "{name1} has a {colour2} {thing2} and a {colour1} {thing1}. What colour is the {thing1}?",
            "I gave {name1} a {colour1} {thing1} and a {colour2} {thing2}. Which colour is the {thing1}?",
            "I gave {name1} a {colour2} {thing2} and a {colour1} {thing1}. Which colour is the {thing1}?",
        ],
        "The {thing1} is {colour1}.",
    ),
    "whereabouts": (
        [
            "{name1} is at the {place1} with {name2}. Where is {name1}?",
            "{name1} met {name2} at the {place1}. Where is {name1}?",
            "I saw {name1} with {name2} at the {place1}. Where can I find {name1}?",
        ],
        "{name1} is at the {place1}.",
    ),
    "company": (
        [
            "{name1} is at the {place1} with {name2}. Who is with {name1}?",
            "{name1} met {name2} at the {place1}. Who is with {name1}?",
            "I saw {name1} with {name2} at the {place1}. Who was with {name1}?",
        ],
        "{name1} is with {name2}.",
    ),
    "purchase": (
        [
            "{name1} bought a {thing1} in {city1}. What did {name1} buy?",
            "In {city1} {name1} found a {thing1}. What did {name1} buy?",
            "{name1} came back from {city1} with a {thing1}. What did {name1} bring?",
        ],
        "{name1} bought a {thing1}.",
    ),
    "meal": (
        [
            "{name1} loves {food1} but hates {food2}. What shall I cook?",
            "{name1} hates {food2} but loves {food1}. What shall I cook?",
            "What should I cook for {name1}, who likes {food1} and never eats {food2}?",
        ],
        "Cook {food1} for {name1} but no {food2}.",
        "{food1} it is. {name1} will be happy without {food2}.",
    ),
    "message": (
        [
            "Tell {name1} to come on {day1} at {hour1}.",
            "Please ask {name1} to be here {day1} at {hour1}.",
            "I want to see {name1} on {day1} at {hour1}. Can you pass it on?",
        ],
        "I will tell {name1}: {day1} at {hour1}.",
        "Thank you. I will wait for {name1} on {day1}.",
    ),
    "job": (
        [
            "{name1} works as a {job1} in {city1}. What does {name1} do?",
            "In {city1} {name1} found work as a {job1}. What is the job of {name1}?",
            "{name1} moved to {city1} and became a {job1}. What does {name1} do now?",
        ],
        "{name1} is a {job1} in {city1}.",
        "I know no better {job1} than {name1}.",
    ),
    "farewell": (
        [
            "Goodbye, I am going to {city1} with {name1}.",
            "I must go now. {name1} and I are leaving for {city1}.",
            "See you later, {name1} takes me to {city1}.",
        ],
        "Goodbye! Have a good time in {city1} with {name1}.",
        "We will. {name1} sends you a card from {city1}.",
    ),
    "smalltalk": (
        [
            "{greeting1}. {smalltalk1}",
            "{greeting1}! {smalltalk1}",
            "{greeting1}, Robin. {smalltalk1}",
            "{greeting1}, my friend. {smalltalk1}",
            "Oh, {greeting1}! {smalltalk1}",
        ],
        "{greeting1}! {answer1}",
    ),
}

_SLOT = re.compile(r"{(\w+?)([12])}")


def write_corpus(folder: str | Path, exchanges: int = EXCHANGES, seed: int = 1) -> Path:
    """Write `movie_lines.txt` and `movie_conversations.txt` with at least that many exchanges into the folder.

    The same arguments always give the same bytes. Beyond the default size new names are made up, so a corpus of any
    size (300 thousand lines, 3 million) has combinations of its own in every movie, and its vocabulary grows.
    """
    folder = Path(folder)
    with (
        atomic_write(folder / "movie_lines.txt") as lines_file,
        atomic_write(folder / "movie_conversations.txt") as conversations_file,
    ):
        number = made = 0
        for movie, conversations in enumerate(_movies(exchanges, random.Random(seed))):
            for conversation in conversations:
                ids = [f"L{number + turn}" for turn in range(len(conversation))]
                for turn, (line, text) in enumerate(zip(ids, conversation, strict=True)):
                    lines_file.write(_record(line, f"u{2 * movie + turn % 2}", f"m{movie}", "AB"[turn % 2], text))
                conversations_file.write(_record(f"u{2 * movie}", f"u{2 * movie + 1}", f"m{movie}", str(ids)))
                number += len(ids)
                made += len(ids) - 1
            if made >= exchanges:
                break
    return folder


def _record(*fields: str) -> bytes:
    return (SEPARATOR.join(fields) + "\n").encode("iso-8859-1")


def _movies(exchanges: int, randomness: random.Random) -> Iterator[list[list[str]]]:
    """One movie after another, without end: a list of conversations, each a list of lines."""
    exchanges_per_movie = 2 * PARAPHRASES * (len(KINDS) - 1)  # small talk, which some movies have, left aside
    movies = exchanges // exchanges_per_movie + 1
    decks = {slot: _Deck(words.split(), randomness) for slot, words in WORLD.items() if "|" not in words}
    decks["name"] = _Deck(WORLD["name"].split() + [_made_up_name(i) for i in range(movies * 4 // 27 - 60)], randomness)
    small_talk = [
        {"greeting1": greeting, "smalltalk1": query, "answer1": answer}
        for greeting in WORLD["greeting"].split("|")
        for query, answer in (" ".join(item.split()).split("=") for item in WORLD["smalltalk"].split("|"))
    ]
    randomness.shuffle(small_talk)
    used: set[tuple[str, ...]] = set()
    while True:
        conversations = []
        for kind in KINDS:
            if kind != "smalltalk":
                for _ in range(4 - len(KINDS[kind])):  # where no third line follows, twice as many
                    words = _combination(kind, decks, used)
                    conversations += _conversations(kind, words, PARAPHRASES, randomness)
            elif small_talk:
                conversations += _conversations(kind, small_talk.pop(), len(KINDS[kind][0]), randomness)
        yield conversations


def _combination(kind: str, decks: dict[str, _Deck], used: set[tuple[str, ...]]) -> dict[str, str]:
    """Fillers for the slots of a kind, such that neither what is asked for nor what distracts stood anywhere before."""
    slots = sorted(set(_SLOT.findall(" ".join(KINDS[kind][0]))))
    numbers = sorted({number for _, number in slots})
    while True:
        words: dict[str, str] = {}
        for slot, number in slots:
            words[slot + number] = decks[slot].draw(but_not=words.get(slot + "1"))
        if kind == "meal":  # what is loved and what is hated belong together, either way round
            keys = [(kind, words["name1"], words[a], words[b]) for a, b in (("food1", "food2"), ("food2", "food1"))]
        else:  # what belongs to the first of two, and to the second, where a missing second name is the first's
            keys = [(kind, *(words.get(s + n, words[s + "1"]) for s in sorted({s for s, _ in slots}))) for n in numbers]
        if not used.intersection(keys):
            used.update(keys)
            return words


def _conversations(kind: str, words: dict[str, str], count: int, randomness: random.Random) -> Iterator[list[str]]:
    """`count` conversations about one combination, each opened by another paraphrase.

    Every second one asks for what distracts in the others: what was said is the same, only the question tells what
    to look at.
    """
    openings, *answers = KINDS[kind]
    words = {slot: word.title() if slot[:-1] in ("name", "city", "day") else word for slot, word in words.items()}
    swapped = words | {
        slot[:-1] + "21"[slot[-1] == "2"]: word for slot, word in words.items() if slot[:-1] + "2" in words
    }
    for turn, opening in enumerate(randomness.sample(openings, count)):
        lines = [line.format(**(swapped if turn % 2 else words)).strip() for line in (opening, *answers)]
        yield [line[0].upper() + line[1:] for line in lines]


class _Deck:
    """Words dealt like cards: shuffled, and every word comes once before any comes again."""

    def __init__(self, words: list[str], randomness: random.Random) -> None:
        self.words, self.randomness, self.left = words, randomness, []

    def draw(self, but_not: str | None = None) -> str:
        if not self.left:
            self.left = self.randomness.sample(self.words, len(self.words))
        word = self.left.pop()
        return self.draw() if word == but_not else word


def _made_up_name(index: int) -> str:
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    index = (index * 999_983 + 314_159) % 70**4  # one to one, since 999,983 is prime
    name = ""
    for _ in range(4):
        index, syllable = divmod(index, len(consonants) * len(vowels))
        name += consonants[syllable // len(vowels)] + vowels[syllable % len(vowels)]
    return name


if __name__ == "__main__":
    write_corpus(sys.argv[1])
