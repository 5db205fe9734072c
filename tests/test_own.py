"""Own questions and answers: learnt by heart in any language, and nothing else answered."""

import os
import random
from pathlib import Path

import pytest

from helpers.batches import prepare
from helpers.chat import Chatbot
from helpers.corpus import read_corpus
from helpers.run import Run
from helpers.settings import load_profile
from helpers.training import fit
from tests.conftest import CPU

FILES = sorted((Path(__file__).parent / "own").glob("*.tsv"))
LANGUAGES = [path.stem for path in FILES]
FEW = LANGUAGES if os.environ.get("CHATBOT_SOAK") else ["german", "japanese"]


@pytest.fixture(scope="module", params=FEW)
def talker(request, tmp_path_factory):
    corpus = read_corpus(Path(__file__).parent / "own" / f"{request.param}.tsv")
    assert corpus.profile == "own"
    settings = load_profile(corpus.profile)
    run = Run(tmp_path_factory.mktemp("own"))
    fit(run, prepare(corpus, settings), settings, CPU, progress_bar=False)
    return request.param, corpus.exchanges, Chatbot.load(run, CPU)


def test_every_own_question_gets_its_own_answer(talker):
    language, exchanges, bot = talker
    right = [bot.reply(e.query).words == bot.vocabulary.tokenise(e.response) for e in exchanges]
    print(f"{language}: {sum(right)} of {len(right)} own questions answered")
    assert sum(right) >= 0.95 * len(right), right


def test_a_word_less_more_or_misspelt_changes_nothing(talker):
    language, exchanges, bot = talker
    right, luck = [], random.Random(1)
    for exchange in exchanges:
        words, wanted = bot.vocabulary.tokenise(exchange.query), bot.vocabulary.tokenise(exchange.response)
        if len(words) < 4:
            continue  # of a greeting nothing is left
        place = luck.randrange(len(words) - 1)
        for changed in (
            words[:place] + words[place + 1 :],
            [*words[:place], "xylophon", *words[place:]],
            [*words[:place], words[place] + "x", *words[place + 1 :]],
        ):
            right.append(bot.reply(" ".join(changed)).words == wanted)
    print(f"{language}: {sum(right)} of {len(right)} with a word less, more or misspelt")
    assert sum(right) >= 0.8 * len(right), (sum(right), len(right))


def test_a_mark_more_or_less_at_the_end_changes_nothing(talker):
    _, exchanges, bot = talker
    right = []
    for exchange in exchanges:
        wanted = bot.vocabulary.tokenise(exchange.response)
        bare = exchange.query.rstrip(bot.vocabulary.marks)
        right += [bot.reply(text).words == wanted for text in (bare, f"{bare}!", f"{bare}?")]
    assert sum(right) >= 0.95 * len(right), (sum(right), len(right))


def test_other_questions_are_declined_with_examples_of_what_is_known(talker):
    language, _, bot = talker
    path = Path(__file__).parent / "own" / f"{language}_strange.txt"
    strange = path.read_text(encoding="utf-8").splitlines()
    replies = [bot.reply(question) for question in strange]
    declined = [reply for reply in replies if not reply.words]
    print(f"{language}: {len(declined)} of {len(strange)} strange questions declined")
    assert len(strange) == 20
    assert len(declined) >= 16, [(q, r.text) for q, r in zip(strange, replies, strict=True) if r.words]
    assert all(any(example in reply.text for example in bot.examples) for reply in declined)
    assert len(bot.examples) == 6


WRITTEN = {
    "german": ("Wo wohnst du?", "Ich wohne in der Gießener Straße."),
    "russian": ("Где ты живёшь?", "Я живу в Казани."),
    "chinese": ("你会做什么？", "我会回答问题。"),
    "hindi": ("तुम्हारा नाम क्या है?", "मेरा नाम लता है।"),
    "arabic": ("ما اسمك؟", "اسمي ليلى."),
    "japanese": ("何歳ですか？", "三歳です。"),
}


def test_words_come_back_as_they_are_written(talker):
    language, _, bot = talker
    question, answer = WRITTEN[language]
    assert bot.reply(question).text == answer
