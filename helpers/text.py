"""Text to words and back: tokenise, spell, and the vocabulary."""

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from helpers.settings import UserError, user_errors

PAD, SOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<sos>", "<eos>", "<unk>")

_TAGS = re.compile(r"</?[a-zA-Z]{1,10}>")  # the corpus marks emphasis as in HTML: <u>you</u>
_APOSTROPHES = "\u2018\u2019\u02bc\u0091\u0092\u00b4"  # 91 and 92 are Windows-1252's
_WORDS = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*|[.!?]")
_SENTENCE_START = re.compile(r"(^|[.!?] )([a-z])")
_FIRST_PERSON = re.compile(r"\bi(?=\b(?!')|'(?:m|ll|ve|d)\b)")


class _Unaccented(dict):
    """For str.translate: each character in NFD without its marks, found once. A character at a time, because NFD of a
    whole text takes time quadratic in a run of marks, and a hostile line is nothing else."""

    def __missing__(self, code: int) -> str:
        parts = unicodedata.normalize("NFD", chr(code))
        self[code] = "".join(part for part in parts if unicodedata.category(part) != "Mn")
        return self[code]


_UNACCENTED = _Unaccented(str.maketrans(dict.fromkeys(_APOSTROPHES, "'")))


def tokenise(text: str) -> list[str]:
    """The words of a text: lower case, accents off, contractions whole, `.`, `!` and `?` words of their own.

    >>> tokenise("Don't  go to the Café!")
    ["don't", 'go', 'to', 'the', 'cafe', '!']

    Everything else is dropped, so the list can be empty: callers check for that here, after normalising.
    """
    if "<" in text:
        text = _TAGS.sub(" ", text)
    if not text.isascii():
        text = text.translate(_UNACCENTED)
    return _WORDS.findall(text.lower())


def spell(words: Iterable[str]) -> str:
    """Words as people write them: `i'm` becomes I'm, sentences start with a capital, no space before marks.

    >>> spell("i don't know . do you ?".split())
    "I don't know. Do you?"
    """
    text = re.sub(r" (?=[.!?])", "", " ".join(words))
    text = _FIRST_PERSON.sub("I", text)
    return _SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)


class Vocabulary:
    """Words and their ids. Ids 0 to 3 are PAD, SOS, EOS and UNK; then the words, the commonest first. `unknown_types`
    is the number of different training words that were left out, all of which UNK stands for."""

    def __init__(self, words: list[str], unknown_types: int = 0) -> None:
        if len(set(words)) != len(words) or set(words) & set(SPECIAL):
            raise UserError("A vocabulary's words must differ from one another and from " + ", ".join(SPECIAL) + ".")
        self.words = [*SPECIAL, *words]
        self.ids = {word: index for index, word in enumerate(self.words)}
        self.unknown_types = unknown_types

    @classmethod
    def from_counts(cls, counts: Counter[str], min_count: int) -> "Vocabulary":
        """The words that occur at least `min_count` times, by falling count and then by alphabet."""
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [word for word, count in ranked if count >= min_count]
        return cls(kept, unknown_types=len(ranked) - len(kept))

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.ids

    def encode(self, words: Iterable[str]) -> list[int]:
        """Ids of the words; a word that is not in the vocabulary becomes UNK. No SOS or EOS is added."""
        return list(map(self.ids.get, words, itertools.repeat(UNK)))

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Words of the ids up to the first EOS, without PAD and SOS."""
        words = []
        for index in ids:
            if index == EOS:
                break
            if index not in (PAD, SOS):
                words.append(self.words[index])
        return words

    def to_json(self) -> str:
        return json.dumps({"words": self.words[len(SPECIAL) :], "unknown_types": self.unknown_types})

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """The vocabulary that `to_json` wrote. Raises UserError if the text is not one."""
        kinds = (ValueError, TypeError, KeyError, OverflowError, RecursionError)
        with user_errors("This is not a vocabulary's JSON", "", *kinds):
            data = json.loads(text)
            if foreign := [word for word in data["words"] if not _WORDS.fullmatch(word)]:
                raise UserError(f"A vocabulary cannot hold {foreign[0][:40]!r}, which no text is split into.")
            return cls(data["words"], int(data["unknown_types"]))
