"""Run by `make check` on a copy of the finished run of the embedded corpus: what its checkpoint must be able to do."""

import torch

from benchmarks.replies import exact_matches, replies_of
from helpers.batches import Prepared
from helpers.chat import Chatbot
from helpers.decoding import greedy
from helpers.run import Run

RUN = Run.named("sample")


def test_the_bot_answers_held_out_queries_exactly():
    data = Prepared.load(RUN.data)
    bot = Chatbot.load(RUN, torch.device("cpu"))
    replies = replies_of(bot.model, data.splits["test"], bot.vocabulary, bot.settings.max_response_words + 1, greedy)
    references = [response.split() for _, response in data.texts["test"]]
    assert exact_matches(replies, references) >= 0.95


def test_a_run_leaves_what_the_readme_promises():
    for path in (RUN.manifest, RUN.data, RUN.checkpoint, RUN.metrics, RUN.latency, RUN.scripted):
        assert path.is_file(), path.name
    assert len(list((RUN.folder / "notebooks").glob("0*.ipynb"))) == 7
    assert len(list(RUN.figures.glob("*.png"))) >= 8
