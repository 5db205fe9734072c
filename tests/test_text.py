from collections import Counter

import pytest

from helpers.settings import UserError
from helpers.text import EOS, PAD, SOS, UNK, Vocabulary, spell, tokenise

STRANGE = [
    "",
    " ",
    "1984",
    "...",
    "🙂",
    "\x00",
    "a\u0301",
    "İstanbul",
    "don’t",
    "rock 'n' roll",
    "<u>you</u>",
    "ﬁne",
    "\u202eabc",
    "-- --",
]


def test_accents_case_tags_and_contractions():
    assert tokenise("<b>Café</b>, DON’T stop!") == ["cafe", "don't", "stop", "!"]
    assert tokenise("don\x92t") == ["don't"]  # Windows-1252, as in the published files


def test_a_number_is_a_word_and_nothing_becomes_an_empty_word():
    assert tokenise("1984") == ["1984"]
    for text in STRANGE:
        assert "" not in tokenise(text)
    assert tokenise("«…»") == []


@pytest.mark.parametrize("text", [*STRANGE, "Hello, world. How's it going?!"])
def test_tokenising_is_idempotent(text):
    words = tokenise(text)
    assert tokenise(" ".join(words)) == words


def test_spelling_for_people():
    assert spell(["i'm", "here", ".", "i", "don't", "know", "!", "do", "you", "?"]) == "I'm here. I don't know! Do you?"
    assert spell([]) == ""


def test_every_known_word_survives_encode_and_decode():
    vocabulary = Vocabulary.from_counts(Counter(["a", "a", "b", "b", "b", "c"]), 2)
    assert vocabulary.words[4:] == ["b", "a"]
    assert vocabulary.unknown_types == 1
    assert vocabulary.decode(vocabulary.encode(["a", "b"])) == ["a", "b"]
    assert vocabulary.encode(["c", "zebra"]) == [UNK, UNK]
    assert vocabulary.decode([SOS, 4, PAD, 5, EOS, 4]) == ["b", "a"]


def test_the_vocabulary_survives_json_and_refuses_nonsense():
    vocabulary = Vocabulary(["a", "b"], unknown_types=7)
    again = Vocabulary.from_json(vocabulary.to_json())
    assert (again.words, again.unknown_types) == (vocabulary.words, 7)
    for text in (
        "",
        "[]",
        "{}",
        '{"words": ["a", "a"], "unknown_types": 0}',
        '{"words": ["<pad>"], "unknown_types": 0}',
    ):
        with pytest.raises(UserError):
            Vocabulary.from_json(text)
