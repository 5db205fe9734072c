"""A model of the classic tutorial's size, which most readers' own figures are about, for the latency table."""

from __future__ import annotations

import torch

from benchmarks.textbook import textbook_greedy
from helpers.batches import BucketedSampler, Pairs, Prepared
from helpers.latency import Subject
from helpers.model import new_model
from helpers.settings import Settings
from helpers.text import UNK
from helpers.training import Trainer

CLASSIC = Settings(embedding_size=500, hidden_size=500, layers=2, attention="dot", tie_weights=False, clip=0.0)
WORDS, REPLY, UPDATES = 7_800, 10, 150


def classic(data: Prepared, device: torch.device) -> Subject:
    """A model of the classic tutorial's size that answers in exactly ten words, and test exchanges to compare it on.

    It is trained for a moment on the run's own exchanges, with each response's words repeated to ten and no EOS:
    random weights have near ties everywhere, which says nothing about what a variant loses.
    """

    def ten_words(pairs: Pairs) -> Pairs:
        places = torch.arange(REPLY) % (pairs.response_lengths - 1).unsqueeze(1)
        ids = [pairs.queries, pairs.responses.gather(1, places)]
        queries, responses = (part.masked_fill(part >= WORDS, UNK) for part in ids)
        lengths = torch.full_like(pairs.response_lengths, REPLY)
        return Pairs(queries, pairs.query_lengths, responses, lengths).to(device)

    train = ten_words(data.splits["train"])
    model = new_model(CLASSIC, WORDS).to(device)
    trainer = Trainer(model, CLASSIC)
    batches = BucketedSampler(train, CLASSIC.batch_size, CLASSIC.seed).from_update(0)
    with torch.random.fork_rng():
        for update in range(UPDATES):
            trainer.step(train, next(batches), update)
    name = f"classic: {CLASSIC.hidden_size} hidden, {CLASSIC.layers} layers, {WORDS:,} words"
    return Subject(name, model.eval().requires_grad_(False), ten_words(data.splits["test"]), REPLY, textbook_greedy)
