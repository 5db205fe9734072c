"""The loss, and the likelihood of given responses."""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from helpers.batches import Batch, Pairs
from helpers.model import Seq2Seq
from helpers.settings import UserError
from helpers.text import PAD, SOS, UNK, Vocabulary

BATCH = 64  # examples that are evaluated at once


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """A summed negative log-likelihood in nats, and over how much it was summed."""

    nll: float
    tokens: int  # EOS counted
    responses: int

    @property
    def per_token(self) -> float:
        """Nats per token: the loss."""
        return self.nll / self.tokens

    @property
    def per_response(self) -> float:
        """Nats per response."""
        return self.nll / self.responses

    @property
    def perplexity(self) -> float:
        """exp(sum of losses / sum of tokens), which is not the mean of the batches' perplexities."""
        return math.exp(min(self.per_token, 700.0))


def batch_loss(model: Seq2Seq, batch: Batch, teacher_forcing: bool = True) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropy of every real token, in nats, and their number, both still on the device.
    The loss is their quotient. Padding in `batch.targets` (batch, response time) counts for nothing."""
    if teacher_forcing:
        logits = model(batch.query, batch.query_lengths, batch.inputs)
    else:
        logits = free_running_logits(model, batch)
    logits, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
    return functional.cross_entropy(logits, targets, ignore_index=PAD, reduction="sum"), (targets != PAD).sum()


def free_running_logits(model: Seq2Seq, batch: Batch) -> Tensor:
    """Logits (batch, response time, vocabulary) of a decoder that reads its own likeliest words, not the response's."""
    memory, state = model.encode(batch.query, batch.query_lengths)
    words, steps = batch.inputs[:, 0], []
    for _ in range(batch.inputs.size(1)):
        logits, state = model.step(words, state, memory)
        steps.append(logits)
        words = logits.argmax(1)
    return torch.stack(steps, 1)


@torch.no_grad()
def evaluate(model: Seq2Seq, pairs: Pairs) -> Likelihood:
    """The exact teacher-forced likelihood of all responses, in fp32 and without dropout."""
    training = model.training
    model.eval()
    nll = torch.zeros((), dtype=torch.double, device=pairs.queries.device)
    for indices in pairs.order().split(BATCH):
        nll += batch_loss(model, pairs.batch(indices))[0]
    model.train(training)
    return Likelihood(nll.item(), int(pairs.response_lengths.sum()), len(pairs))


def score(model: Seq2Seq, vocabulary: Vocabulary, texts: list[tuple[str, str]]) -> dict[str, float]:
    """The likelihood of whole responses given their queries, nothing cut and nothing dropped.
    A word that is not in the vocabulary costs -ln P(UNK) + ln(number of training words that UNK stands for): the share
    of one of them if all are equally likely. Raises UserError for a query without any word."""
    pairs = [(vocabulary.tokenise(query), vocabulary.tokenise(response)) for query, response in texts]
    for number, (query, _) in enumerate(pairs, 1):
        if not query:
            raise UserError(f"Pair {number}: the query {texts[number - 1][0][:50]!r} has no word in it.")
    encoded = Pairs.from_words(pairs, vocabulary)
    unknown = int((encoded.responses == UNK).sum())
    known = evaluate(model, encoded.to(model.embedding.weight.device))
    full = Likelihood(known.nll + unknown * math.log(max(vocabulary.unknown_types, 1)), known.tokens, known.responses)
    return {
        "pairs": full.responses, "tokens": full.tokens, "nll_per_token": full.per_token, "perplexity": full.perplexity,
        "nll_per_response": full.per_response, "unknown_rate": unknown / full.tokens,
    }  # fmt: skip


@torch.no_grad()
def log_probability(model: Seq2Seq, query: Tensor, lengths: Tensor, replies: Tensor) -> Tensor:
    """ln p(reply | query), (batch,): replies (batch, time) end in EOS or are cut off, and are PAD after that."""
    totals = []
    for rows in torch.arange(len(query), device=query.device).split(BATCH):  # bounds the memory that logits take
        targets = replies[rows]
        inputs = torch.cat([torch.full_like(targets[:, :1], SOS), targets[:, :-1]], 1)
        logits = model(query[rows], lengths[rows], inputs).float().transpose(1, 2)
        totals.append(-functional.cross_entropy(logits, targets, ignore_index=PAD, reduction="none").sum(1))
    return torch.cat(totals)
