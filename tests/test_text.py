from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.settings import UserError
from helpers.text import EOS, PAD, SOS, UNK, Vocabulary, spell, tokenise, tokenise_all

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


@given(st.lists(st.text(st.sampled_from("aB 'é’İßΣ<u>/i≮.!?\n\r\u0301\x85\u2028 9"), max_size=12), max_size=20))
def test_a_whole_corpus_is_tokenised_like_its_texts_one_by_one(texts):
    stream, lengths, words = tokenise_all(texts)
    expected = [tokenise(text) for text in texts]
    assert lengths.tolist() == [len(text) for text in expected]
    assert [words[number] for number in stream] == [word for text in expected for word in text]
    assert len(set(words)) == len(words)
