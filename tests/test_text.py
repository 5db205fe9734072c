import json
import time
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Straße, cœur, Kızım, Smørrebrød!", "straße cœur kızım smørrebrød !"),
        ("İyi, Işık", "iyi işık"),
        ("Привет! Как дела?", "привет ! как дела ?"),
        ("नमस्ते दुनिया।", "नमस्ते दुनिया ।"),
        ("你好。我用Python写！", "你 好 。 我 用 python 写 ！"),
        ("タワーへ行く。", "タ ワ ー へ 行 く 。"),
        ("สวัสดี", "ส วั ส ดี"),
        ("كيف حالك؟", "كيف حالك ؟"),
        ("zero\u200bwidth so\u00adft می\u200cروم", "zerowidth soft میروم"),
        ("cafe\u0301", "caf\u00e9"),
        ("ok👍🏽👨\u200d👩\u200d👧 🇩🇪❤\ufe0f", "ok 👍🏽 👨\u200d👩\u200d👧 🇩🇪 ❤"),
        ("&quot;War &amp; Peace&quot;<br />It&#39;s", "war peace it's"),
        ("&#99999999999999999999; &lt;b&gt;x", "99999999999999999999 x"),
    ],
)
def test_words_of_any_script(text, words):
    assert tokenise(text) == words.split()
    assert tokenise(words) == words.split()


@pytest.mark.parametrize(
    "text", ["你好。我用 python 写代码！好吗？", "नमस्ते। कैसे हो?", "مرحبا كيف حالك؟", "Cómo estás? Bien!", "Ça va. Où?"]
)
def test_spelling_restores_blanks_and_marks_of_any_script(text):
    assert spell(tokenise(text)) == text


@pytest.mark.parametrize("marks", ["", ",", ".,-]^", ";!", "--&&"])
def test_the_marks_that_count_are_the_readers_choice(marks):
    assert tokenise("a,b-c].d^e;f!", marks) == [c for c in "a,b-c].d^e;f!" if c.isalpha() or c in marks]


def test_a_line_of_nothing_but_accents_takes_no_time():
    line = "a" + "\u0301\u0323" * 100_000
    started = time.perf_counter()
    assert len(tokenise(line)) == 1
    assert time.perf_counter() - started < 5


def test_accents_case_tags_and_contractions():
    assert tokenise("<b>Café</b>, DON’T stop!") == ["café", "don't", "stop", "!"]
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
    words = ["i'm", "here", ".", "i", "don't", "know", "marco", "!", "do", "you", "?"]
    assert spell(words) == "I'm here. I don't know marco! Do you?"
    assert spell(["so", "i", "met", "marco"], {"i": "I", "marco": "Marco"}) == "So I met Marco"
    assert spell([]) == ""
    assert spell(["µ", "."]) == "µ."  # whose capital, Μ, is that of another letter, μ


def test_every_known_word_survives_encode_and_decode():
    vocabulary = Vocabulary.from_counts(Counter(["a", "a", "b", "b", "b", "c"]), 2)
    assert vocabulary.words[4:] == ["b", "a"]
    assert vocabulary.unknown_types == 1
    assert vocabulary.decode(vocabulary.encode(["a", "b"])) == ["a", "b"]
    assert vocabulary.encode(["c", "zebra"]) == [UNK, UNK]
    assert vocabulary.decode([SOS, 4, PAD, 5, EOS, 4]) == ["b", "a"]


def test_the_vocabulary_survives_json_and_refuses_nonsense():
    vocabulary = Vocabulary(["a", "b", ","], unknown_types=7, marks=",", spelling={"b": "B"})
    again = Vocabulary.from_json(vocabulary.to_json())
    assert vars(again) == vars(vocabulary)
    whole = json.loads(vocabulary.to_json())
    for spoilt in ({"words": ["a b"]}, {"spelling": {"b": "Z"}}, {"marks": ""}, {"marks": None}, {"spelling": 3}):
        with pytest.raises(UserError):
            Vocabulary.from_json(json.dumps(whole | spoilt))
    for text in (
        "",
        "[]",
        "{}",
        '{"words": ["a", "a"], "unknown_types": 0}',
        '{"words": ["<pad>"], "unknown_types": 0}',
    ):
        with pytest.raises(UserError):
            Vocabulary.from_json(text)
