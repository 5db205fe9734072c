import math
from collections import Counter

import pytest
import torch
from torch import nn

from benchmarks.compare import choice_accuracy, unigram_perplexity
from benchmarks.replies import bleu, commonest_reply, distinct, exact_matches, replies_of, reply_metrics
from helpers.batches import Pairs
from helpers.decoding import beam_search, greedy
from helpers.evaluation import (
    Likelihood,
    batch_loss,
    evaluate,
    free_running_logits,
    log_probability,
    score,
)
from helpers.model import new_model
from helpers.settings import UserError
from helpers.text import EOS, PAD, UNK, Vocabulary
from helpers.training import load_model
from tests.conftest import CPU, TINY

A, B = ["the", "cat", "sat", "on", "the", "mat", "."], ["no", "."]


def test_perplexity_is_of_the_sum_not_the_mean_of_batches():
    likelihood = Likelihood(nll=2 * math.log(8), tokens=2, responses=1)
    assert likelihood.perplexity == pytest.approx(8)
    assert likelihood.per_response == pytest.approx(2 * math.log(8))


def test_a_hopeless_loss_gives_a_large_number_not_an_overflow():
    assert math.isfinite(Likelihood(1e9, 1, 1).perplexity)


def test_the_loss_is_the_mean_over_real_tokens(prepared):
    model = new_model(TINY, len(prepared.vocabulary)).eval()
    batch = prepared.splits["train"].batch(torch.tensor([0, 9, 50]))
    total, tokens = batch_loss(model, batch)
    logits = model(batch.query, batch.query_lengths, batch.inputs)
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=0)
    assert tokens == int((batch.targets != 0).sum())
    assert torch.allclose(total / tokens, expected, atol=1e-6)


@pytest.mark.parametrize("teacher_forcing", [True, False])
def test_padding_counts_for_nothing_in_loss_and_gradient(prepared, teacher_forcing):
    model = new_model(TINY.change(dropout=0.0), len(prepared.vocabulary))
    train = prepared.splits["train"]
    batch = train.batch(torch.arange(12))
    assert (batch.targets == PAD).any()
    found = []
    for rows in ([range(12)], [[row] for row in range(12)]):  # together, padded; and each alone, as long as it is
        model.zero_grad()
        losses = [batch_loss(model, train.batch(torch.tensor(list(part))), teacher_forcing) for part in rows]
        sum(total for total, _ in losses).backward()
        found.append((sum(total.item() for total, _ in losses), sum(int(tokens) for _, tokens in losses)))
        found[-1] += ([parameter.grad.clone() for parameter in model.parameters()],)
    (total, tokens, gradients), (expected, count, alone) = found
    assert tokens == count == int(train.response_lengths[:12].sum())
    assert total == pytest.approx(expected, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(gradients, alone, strict=True))


def test_evaluation_does_not_depend_on_batches_and_leaves_the_mode_alone(prepared, monkeypatch):
    model = new_model(TINY, len(prepared.vocabulary))
    part = prepared.splits["validation"]
    a, calls = evaluate(model, part), []
    monkeypatch.setattr("helpers.evaluation.BATCH", 7)
    monkeypatch.setattr("helpers.evaluation.batch_loss", lambda *given: calls.append(1) or batch_loss(*given))
    b = evaluate(model, part)
    assert len(calls) == -(-len(part) // 7)
    assert a.per_token == pytest.approx(b.per_token, abs=1e-6)
    assert (a.tokens, a.responses) == (b.tokens, len(part))
    assert model.training
    assert evaluate(model.eval(), part) == b
    assert not model.training


def test_loss_and_tokens_stay_on_the_device(prepared):
    total, tokens = batch_loss(
        new_model(TINY, len(prepared.vocabulary)), prepared.splits["train"].batch(torch.arange(9))
    )
    assert all(isinstance(value, torch.Tensor) and value.shape == () for value in (total, tokens))


def test_free_running_feeds_back_the_models_own_words(prepared):
    model = new_model(TINY, len(prepared.vocabulary)).eval()
    batch = prepared.splits["train"].batch(torch.tensor([0, 1]))
    own = free_running_logits(model, batch)
    forced = model(batch.query, batch.query_lengths, batch.inputs)
    assert own.shape == forced.shape
    assert torch.allclose(own[:, 0], forced[:, 0], atol=1e-5)  # the first step sees SOS either way
    fed = torch.cat([batch.inputs[:, :1], own.argmax(2)[:, :-1]], 1)
    assert torch.allclose(own, model(batch.query, batch.query_lengths, fed), atol=1e-5)
    assert not torch.allclose(own, forced, atol=1e-5)


def test_score_charges_unknown_words_and_cuts_nothing(prepared):
    vocabulary = Vocabulary(prepared.vocabulary.words[4:], unknown_types=100)
    model = new_model(TINY, len(vocabulary)).eval()
    replies = (reply.split() for _, reply in prepared.texts["test"])
    known = " ".join(next(words for words in replies if all(word in vocabulary for word in words)) * 10)
    result = score(model, vocabulary, [("hello", known), ("hello", "zebra xylophone")])
    assert result["pairs"] == 2
    assert result["tokens"] == len(known.split()) + 1 + 3
    assert result["unknown_rate"] == pytest.approx(2 / result["tokens"])
    assert result["perplexity"] == pytest.approx(math.exp(result["nll_per_token"]))
    alone = score(model, vocabulary, [("hello", "zebra xylophone")])
    pairs = Pairs.from_words([(["hello"], ["zebra", "xylophone"])], vocabulary)
    assert pairs.responses.tolist() == [[UNK, UNK, EOS, PAD]]
    assert alone["nll_per_response"] == pytest.approx(evaluate(model, pairs).nll + 2 * math.log(100), rel=1e-6)
    with pytest.raises(UserError, match="Pair 1"):
        score(model, vocabulary, [("«»", "yes")])


def test_a_response_of_any_length_is_scored_whole(prepared):
    model = new_model(TINY, len(prepared.vocabulary)).eval()
    assert score(model, prepared.vocabulary, [("hello", "no " * 4000)])["tokens"] == 4001


def test_log_probability_does_not_depend_on_how_many_are_asked_at_once(trained, prepared, monkeypatch):
    model = load_model(trained.checkpoint, CPU)[0]
    batch = prepared.splits["test"].batch(torch.arange(20))
    together = log_probability(model, batch.query, batch.query_lengths, batch.targets)
    monkeypatch.setattr("helpers.evaluation.BATCH", 3)
    assert torch.allclose(log_probability(model, batch.query, batch.query_lengths, batch.targets), together, atol=1e-4)


def test_the_true_response_is_chosen_by_one_who_knows_and_by_chance_by_one_who_does_not(prepared):
    test = prepared.splits["test"]
    true = {tuple(query[:n].tolist()): response for query, n, response in
            zip(test.queries, test.query_lengths, test.responses, strict=True)}  # fmt: skip

    def knowing(query, lengths, replies):
        rows = zip(query, lengths, replies, strict=True)
        return torch.tensor([float(torch.equal(true[tuple(q[:n].tolist())].long(), reply)) for q, n, reply in rows])

    def ignorant(query, lengths, replies):
        return torch.rand(len(query), generator=torch.Generator().manual_seed(int(replies.sum())))

    assert choice_accuracy(knowing, test) > 0.95  # two queries may be the same and have several responses
    assert 0.02 < choice_accuracy(ignorant, test) < 0.25
    assert choice_accuracy(ignorant, test) == choice_accuracy(ignorant, test)
    assert 0.4 < choice_accuracy(ignorant, test, others=1) < 0.6


def test_replies_come_in_the_examples_order(trained, prepared):
    model, vocabulary, *_ = load_model(trained.checkpoint, CPU)
    pairs = prepared.splits["test"]
    for search in (greedy, beam_search):
        replies = replies_of(model, pairs, vocabulary, 10, search)
        assert len(replies) == len(pairs)
        batch = pairs.batch(torch.arange(len(pairs)))
        ids = search(model, batch.query, batch.query_lengths, 10)
        assert replies == [vocabulary.decode(row) for row in ids.tolist()]


def test_unigram_perplexity_by_hand():
    counts = Counter({"a": 3, "b": 1})
    expected = math.exp(-(2 * math.log(4 / 7) + math.log(1 / 7)) / 3)
    assert unigram_perplexity(counts, [["a", "a", "new"]]) == pytest.approx(expected)


def test_bleu_is_100_for_the_reference_and_near_0_for_another():
    assert bleu([A, A], [A, A]) == pytest.approx(100)
    assert bleu([B], [A]) < 10


def test_distinct_counts_different_ngrams():
    assert distinct([["a", "b", "a", "b"]], 1) == 0.5
    assert distinct([["a", "b", "a", "b"]], 2) == pytest.approx(2 / 3)
    assert distinct([["a"]], 2) == 0


def test_commonest_reply_and_exact_matches():
    assert commonest_reply([A, B, B]) == ("no .", 2 / 3)
    assert exact_matches([A, B], [A, A]) == 0.5
    assert reply_metrics([A, []], [A, B])["exact"] == 0.5
