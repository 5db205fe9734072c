"""Text to words and back, in any script: tokenise, spell, and the vocabulary."""

import functools
import html
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Self

import regex

from helpers.settings import MARKS, UserError, user_errors

PAD, SOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<sos>", "<eos>", "<unk>")

# Scripts that are written without blanks: each of their characters is a word.
_UNSPACED = r"\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}"
_LETTER = rf"(?:[[\p{{L}}\p{{Nd}}]--[{_UNSPACED}]]\p{{M}}*+)"
_EMOJI = r"[\p{Extended_Pictographic}--[\u00a9\u00ae\u203c\u2049\u2122]]\p{Emoji_Modifier}?"
_WORD = (
    rf"{_LETTER}++(?:'{_LETTER}++)*+|[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*+"
    rf"|{_EMOJI}(?:\u200d{_EMOJI})*+|\p{{Regional_Indicator}}{{2}}"  # families are joined, flags are pairs
)
_ENTITY = regex.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_TAG = regex.compile(r"</?[a-zA-Z]{1,10}(?:\s[^<>]{0,200})?/?>")  # the corpus marks emphasis as in HTML: <u>you</u>
# Soft hyphens, zero-width blanks, variation selectors; joiners too, but for those between two emoji.
_UNSEEN = regex.compile(r"(?!\u200d)[\p{Cf}\ufe00-\ufe0f]|\u200d(?!\p{Extended_Pictographic})")
_RUN_OF_MARKS = regex.compile(r"(\p{M}{8})\p{M}+")  # which take normalisation a time quadratic in their number
_ALIKE = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u0091\u0092\u00b4", "'") | {"İ": "i"})  # 91: Windows-1252's
_NO_BLANK = regex.compile(rf"(?V1)(?<=[{_UNSPACED}。！？．]\p{{M}}*) (?=[{_UNSPACED}])|(?<=[¿¡]) | (?=[\p{{P}}--[¿¡]])")
_SENTENCE_START = regex.compile(r"(?<=^|[.!?] [¿¡]?)\p{Ll}")


@functools.cache
def _pattern(marks: str) -> regex.Pattern:
    return regex.compile(f"{_WORD}|[{regex.escape(marks)}]" if marks else _WORD, regex.V1)


def forms(text: str, marks: str = MARKS) -> list[str]:
    """The words of a text as they are written: NFC, in upper and lower case, without HTML's tags and entities."""
    text = _TAG.sub(" ", _ENTITY.sub(lambda match: html.unescape(match[0]), text))
    if not text.isascii():
        text = unicodedata.normalize("NFC", _RUN_OF_MARKS.sub(r"\1", _UNSEEN.sub("", text.translate(_ALIKE))))
    return _pattern(marks).findall(text)


def tokenise(text: str, marks: str = MARKS) -> list[str]:
    """The words of a text in lower case: letters with their accents and digits, apostrophes inside; in scripts without
    blanks each character; each of `marks`; each emoji. Everything else is dropped, so the list can be empty.

    >>> tokenise("Don't  go to the Café! 東京")
    ["don't", 'go', 'to', 'the', 'café', '!', '東', '京']
    """
    return lower(forms(text, marks))


def lower(written: list[str]) -> list[str]:
    """Words as `forms` gives them, in lower case."""
    return [unicodedata.normalize("NFC", form.lower()) for form in written]


def spell(words: Iterable[str], spelling: dict[str, str] | None = None) -> str:
    """Words as people write them: sentences start with a capital, no blank before marks or in scripts without blanks.
    `spelling` gives the words that are written otherwise than in lower case, as a vocabulary has found them.

    >>> spell("i don't know marco . do you ?".split(), {"i": "I", "marco": "Marco"})
    "I don't know Marco. Do you?"
    """
    text = _NO_BLANK.sub("", " ".join((spelling or {}).get(word, word) for word in words))
    return _SENTENCE_START.sub(lambda found: big if (big := found[0].title()).lower() == found[0] else found[0], text)


class Vocabulary:
    """Words and their ids. Ids 0 to 3 are PAD, SOS, EOS and UNK; then the words, the commonest first. `unknown_types`
    is the number of different training words that were left out, all of which UNK stands for; `marks` are those that
    are words; `spelling` holds the words that are mostly not written in lower case, and how they are."""

    def __init__(self, words: list[str], unknown_types=0, marks=MARKS, spelling: dict[str, str] | None = None) -> None:
        if len(set(words)) != len(words) or set(words) & set(SPECIAL):
            raise UserError("A vocabulary's words must differ from one another and from " + ", ".join(SPECIAL) + ".")
        self.words = [*SPECIAL, *words]
        self.ids = {word: index for index, word in enumerate(self.words)}
        self.unknown_types, self.marks, self.spelling = unknown_types, marks, spelling or {}

    @classmethod
    def from_counts(cls, counts: Counter[str], min_count: int, marks: str = MARKS, base: Self | None = None) -> Self:
        """The words of `base`, if any, then those that occur `min_count` times, by falling count, then by alphabet."""
        old = base.words[len(SPECIAL) :] if base else []
        new = counts.keys() - old
        frequent = sorted((w for w in new if counts[w] >= min_count), key=lambda word: (-counts[word], word))
        return cls([*old, *frequent], len(new) - len(frequent), marks, dict(base.spelling) if base else None)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.ids

    def tokenise(self, text: str) -> list[str]:
        """The words of a text, known or not, with this vocabulary's marks."""
        return tokenise(text, self.marks)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Ids of the words; a word that is not in the vocabulary becomes UNK. No SOS or EOS is added."""
        return [self.ids.get(word, UNK) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Words of the ids up to the first EOS, without PAD and SOS."""
        spoken = itertools.takewhile(lambda index: index != EOS, ids)
        return [self.words[index] for index in spoken if index not in (PAD, SOS)]

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"words": self.words[len(SPECIAL) :], "ids": None})

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """The vocabulary that `to_json` wrote. Raises UserError if the text is not one."""
        kinds = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
        with user_errors("This is not a vocabulary's JSON", "", *kinds):
            data = json.loads(text)
            words, marks, spelling = data["words"], str(data["marks"]), dict(data["spelling"])
            written = [*zip(words, words, strict=True), *spelling.items()]
            if wrong := [form for word, form in written if tokenise(form, marks) != [word]]:
                raise UserError(
                    f"A vocabulary cannot hold {wrong[0][:40]!r}, which is not read as the word it stands for."
                )
            return cls(words, int(data["unknown_types"]), marks, spelling)
