"""The textbook way really is what the textbook does, and learns."""

import torch

from benchmarks import textbook, world
from benchmarks.textbook import textbook_greedy
from helpers.decoding import greedy
from helpers.model import Seq2Seq
from helpers.settings import Settings
from helpers.text import EOS


def test_it_reads_the_corpus_and_learns(tmp_path):
    world.write_corpus(tmp_path, exchanges=4000)
    pairs, ids = textbook.read_pairs(tmp_path, max_words=20, min_count=3)
    assert len(pairs) > 1000
    torch.manual_seed(0)
    trainer = textbook.StepwiseTrainer(ids, torch.device("cpu"), hidden_size=32, learning_rate=2e-3)
    validation = [pairs[:64]]
    before = trainer.evaluate(validation)
    for start in range(64, 64 * 31, 64):
        loss, tokens = trainer.train(pairs[start : start + 64])
    assert tokens == sum(len(response.split(" ")) + 1 for _, response in pairs[start : start + 64])
    assert trainer.evaluate(validation) < before - 1
    assert 0 < loss < before


def test_its_search_gives_the_words_of_ours_and_goes_on_after_the_end():
    torch.manual_seed(0)
    model = Seq2Seq(Settings(embedding_size=16, hidden_size=24), 40).eval()
    query, lengths = torch.randint(4, 40, (8, 6)), torch.tensor([6, 5, 4, 3, 6, 2, 1, 6])
    query[torch.arange(6) >= lengths.unsqueeze(1)] = 0
    ours, theirs = greedy(model, query, lengths, 12), textbook_greedy(model, query, lengths, 12)
    assert theirs.shape == (8, 12)
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        end = a.index(EOS) + 1 if EOS in a else len(a)
        assert a[:end] == b[:end]
