"""Run by `make check` on a copy of the finished run of the embedded corpus: what its checkpoint must be able to do."""

import math
import re

import pytest
import torch

from benchmarks import world
from benchmarks.replies import replies_of
from helpers.batches import Prepared
from helpers.chat import Chatbot
from helpers.corpus import read_corpus
from helpers.decoding import greedy
from helpers.evaluation import evaluate
from helpers.run import ROOT, Run

RUN = Run.named("sample")


def test_the_bot_answers_held_out_facts_exactly_and_loses_at_most_a_third_more_than_it_must():
    data = Prepared.load(RUN.data)
    bot = Chatbot.load(RUN, torch.device("cpu"))
    replies = replies_of(bot.model, data.splits["test"], bot.vocabulary, bot.settings.max_response_words + 1, greedy)
    behind, facts = world.known(bot.vocabulary.tokenise), world.World().grammar["facts"]
    asked = [behind[pair] for pair in data.texts["test"]]
    right = [
        " ".join(said) == response
        for said, (_, response), (query, reply) in zip(replies, data.texts["test"], asked, strict=True)
        if query.meaning in facts and reply.chance == 1
    ]
    assert len(right) > 200
    assert sum(right) / len(right) >= 0.95
    least = -sum(math.log(reply.chance) for _, reply in asked) / int(data.splits["test"].response_lengths.sum())
    assert least < evaluate(bot.model, data.splits["test"]).per_token < 4 / 3 * least


@pytest.mark.parametrize(
    ("said", "sensible"),
    [
        ("Hello", "hello"),
        ("How are you?", "fine|well|tired"),
        ("What's your name?", "robin"),
        ("Do you like pizza?", "word"),
        ("My name is Sarah.", "nice to meet you"),
        ("Where is Anna?", "know|anna"),
        ("Thanks", "welcome|any time|pleasure"),
        ("Bye", "goodbye|bye|see you"),
        ("What colour is the box? Anna has a red hat and a blue box.", "the box is blue"),
    ],
)
def test_a_strangers_first_sentence_gets_a_sensible_reply(said, sensible):
    bot = Chatbot.load(RUN, torch.device("cpu"))
    for decoder in ("greedy", "mmi"):
        assert re.search(sensible, bot.reply(said, decoder).text.lower()), decoder


def test_a_run_leaves_what_the_readme_promises():
    for path in (RUN.manifest, RUN.data, RUN.checkpoint, RUN.metrics, RUN.latency, RUN.scripted):
        assert path.is_file(), path.name
    assert len(list((RUN.folder / "notebooks").glob("0*.ipynb"))) == 8
    assert len(list(RUN.figures.glob("*.png"))) >= 8


def test_the_bot_says_what_readme_shows():
    bot = Chatbot.load(RUN, torch.device("cpu"))
    shown = re.findall(r"^you  (.+)\nbot  (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) >= 3
    known = {exchange.query for exchange in read_corpus("sample").exchanges}
    for said, reply in shown:
        assert said not in known
        now = bot.reply(said).text
        assert now == reply or ("word" in reply and "word" in now)  # an unknown word is told of in several ways
