import math
from collections import Counter

import pytest

from helpers.metrics import (
    Likelihood,
    bleu,
    commonest_reply,
    distinct,
    exact_matches,
    reply_metrics,
    unigram_perplexity,
)

A, B = ["the", "cat", "sat", "on", "the", "mat", "."], ["no", "."]


def test_perplexity_is_of_the_sum_not_the_mean_of_batches():
    likelihood = Likelihood(nll=2 * math.log(8), tokens=2, responses=1)
    assert likelihood.perplexity == pytest.approx(8)
    assert likelihood.per_response == pytest.approx(2 * math.log(8))


def test_a_hopeless_loss_gives_a_large_number_not_an_overflow():
    assert math.isfinite(Likelihood(1e9, 1, 1).perplexity)


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
