"""The replies to all queries of a split, and what they are measured by."""

from collections import Counter
from collections.abc import Callable

import sacrebleu
from torch import Tensor

from helpers.batches import Pairs
from helpers.evaluation import BATCH
from helpers.model import Seq2Seq
from helpers.text import Vocabulary

Words = list[str]


def replies_of(
    model: Seq2Seq, pairs: Pairs, vocabulary: Vocabulary, max_words: int, search: Callable[..., Tensor]
) -> list[Words]:
    """The words that a decoder, search(model, query, lengths, max_words), gives to each query, in their order."""
    replies: list[Words] = [[] for _ in range(len(pairs))]
    for indices in pairs.order().split(BATCH):
        batch = pairs.batch(indices)
        ids = search(model, batch.query, batch.query_lengths, max_words)
        for index, row in zip(indices.tolist(), ids.tolist(), strict=True):
            replies[index] = vocabulary.decode(row)
    return replies


def reply_metrics(replies: list[Words], references: list[Words]) -> dict[str, float]:
    """The figures below, for one decoder's replies to one set of queries."""
    figures = {"exact": exact_matches(replies, references), "BLEU": bleu(replies, references)}
    figures |= {f"distinct-{n}": distinct(replies, n) for n in (1, 2)}
    return figures | {
        "commonest share": commonest_reply(replies)[1], "mean words": sum(map(len, replies)) / len(replies)
    }  # fmt: skip


def exact_matches(replies: list[Words], references: list[Words]) -> float:
    """The share of replies that are the reference word for word."""
    return sum(reply == reference for reply, reference in zip(replies, references, strict=True)) / len(references)


def bleu(replies: list[Words], references: list[Words]) -> float:
    """Corpus BLEU-4 in percent, as sacrebleu computes it on words already parted by blanks."""
    hypotheses, wanted = ([" ".join(words) for words in side] for side in (replies, references))
    return sacrebleu.corpus_bleu(hypotheses, [wanted], tokenize="none", force=True).score


def distinct(replies: list[Words], n: int) -> float:
    """Different n-grams / all n-grams over all replies (arXiv:1510.03055): 1 is all different, near 0 is parroting."""
    grams = Counter(tuple(words[i : i + n]) for words in replies for i in range(len(words) - n + 1))
    return len(grams) / max(sum(grams.values()), 1)


def commonest_reply(replies: list[Words]) -> tuple[str, float]:
    """The reply given most often, and its share of all replies."""
    (reply, count), *_ = Counter(" ".join(words) for words in replies).most_common(1)
    return reply, count / len(replies)
