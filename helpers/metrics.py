"""What a chatbot is measured by; plain functions of counts and word lists, no model needed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

Words = list[str]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """A summed negative log-likelihood in nats, and over how much it was summed."""

    nll: float
    tokens: int  # EOS counted
    responses: int

    @property
    def per_token(self) -> float:
        """Nats a token: the loss."""
        return self.nll / self.tokens

    @property
    def per_response(self) -> float:
        """Nats a response."""
        return self.nll / self.responses

    @property
    def perplexity(self) -> float:
        """exp(sum of losses / sum of tokens), which is not the mean of the batches' perplexities."""
        return math.exp(min(self.per_token, 700.0))


def unigram_perplexity(training: Counter[str], responses: list[Words]) -> float:
    """Perplexity of a model that knows only how often each word (EOS included) occurs; counts + 1 for new ones.

    `training` counts response words with their EOS; `responses` carry their EOS too. What beats nothing else.
    """
    types, total = len(training) + 1, sum(training.values())
    words = [word for response in responses for word in response]
    nll = -sum(math.log((training[word] + 1) / (total + types)) for word in words)
    return math.exp(nll / len(words))


def bleu(replies: list[Words], references: list[Words]) -> float:
    """Corpus BLEU-4 in percent, as sacrebleu computes it on words already parted by blanks."""
    import sacrebleu  # here, since nothing else needs it

    hypotheses = [" ".join(words) for words in replies]
    return sacrebleu.corpus_bleu(
        hypotheses, [[" ".join(words) for words in references]], tokenize="none", force=True
    ).score


def distinct(replies: list[Words], n: int) -> float:
    """Different n-grams / all n-grams over all replies (arXiv:1510.03055): 1 is all different, near 0 is parroting."""
    grams = Counter(tuple(words[i : i + n]) for words in replies for i in range(len(words) - n + 1))
    return len(grams) / max(sum(grams.values()), 1)


def commonest_reply(replies: list[Words]) -> tuple[str, float]:
    """The reply given most often, and its share of all replies."""
    (reply, count), *_ = Counter(" ".join(words) for words in replies).most_common(1)
    return reply, count / len(replies)


def exact_matches(replies: list[Words], references: list[Words]) -> float:
    """The share of replies that are the reference word for word."""
    return sum(reply == reference for reply, reference in zip(replies, references, strict=True)) / len(references)


def reply_metrics(replies: list[Words], references: list[Words]) -> dict[str, float]:
    """All of these for one decoder's replies to one set of queries."""
    return {
        "exact": exact_matches(replies, references),
        "BLEU": bleu(replies, references),
        "distinct-1": distinct(replies, 1),
        "distinct-2": distinct(replies, 2),
        "commonest share": commonest_reply(replies)[1],
        "mean words": sum(map(len, replies)) / len(replies),
    }
