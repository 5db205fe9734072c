"""From logits to words: greedy search, beam search, sampling and MMI. PAD, SOS and UNK are never spoken."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers.evaluation import log_probability
from helpers.model import Memory, Seq2Seq, State
from helpers.settings import UserError
from helpers.text import EOS, PAD, SOS, UNK


class GreedySearch(nn.Module):
    """The likeliest word at every step. The whole search, loop and early stop included, can be scripted."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.model = model
        self.sos, self.eos, self.pad = SOS, EOS, PAD  # TorchScript reads attributes, not globals
        never = never_spoken(model.output.out_features, model.embedding.weight.device)
        self.register_buffer("never", never, persistent=False)

    def forward(self, query: Tensor, lengths: Tensor, max_words: int, min_words: int = 0) -> Tensor:
        """query (batch, query time), lengths (batch,) to ids (batch, at most max_words), PAD after EOS.
        On a GPU, where looking whether all replies have ended makes the CPU wait, only every fourth step looks: up to
        three columns of PAD more. Raises UserError (torch.jit.Error once scripted) for a query of no words."""
        if int(lengths.min()) < 1:
            raise UserError("A query has no words, and silence is EOS alone: give each row a length of at least 1.")
        every = 4 if query.is_cuda else 1
        memory, state = self.model.encode(query, lengths)
        spoken = query.new_full((query.size(0), max_words), self.pad)
        words = torch.full_like(query[:, 0], self.sos)
        steps = 0
        for step in range(max_words):
            logits, state = self.model.step(words, state, memory)
            logits.add_(self.never)
            if step < min_words:
                logits[:, self.eos] = float("-inf")
            words = logits.argmax(1)
            spoken[:, step] = words
            steps = step + 1
            if steps % every == 0 and bool((spoken == self.eos).any(1).all()):
                break
        ends = (spoken[:, :steps] == self.eos).int()
        return spoken[:, :steps].masked_fill(ends.cumsum(1) > ends, self.pad)


def never_spoken(words: int, device: torch.device) -> Tensor:
    """(vocabulary,): -inf at PAD, SOS and UNK, to be added to logits."""
    penalty = torch.zeros(words, device=device)
    for word in (PAD, SOS, UNK):
        penalty[word].fill_(float("-inf"))
    return penalty


@torch.no_grad()
def greedy(model: Seq2Seq, query: Tensor, lengths: Tensor, max_words: int, min_words: int = 0) -> Tensor:
    """Ids (batch, at most max_words) of the greedy replies, none of which ends before it has `min_words`."""
    return GreedySearch(model)(query, lengths, max_words, min_words)


def _may_follow(logits: Tensor, never: Tensor, step: int, min_words: int) -> Tensor:
    """Logits (rows, vocabulary) in fp32, -inf where the word of this step (from 0) must not be."""
    logits = logits.float() + never
    if step < min_words:
        logits[:, EOS] = float("-inf")
    return logits


@torch.no_grad()
def beam_search(
    model: Seq2Seq, query: Tensor, lengths: Tensor, max_words: int, min_words: int = 0,
    *, beam: int = 5, length_penalty: float = 1.0, count: int = 1,
) -> Tensor:  # fmt: skip
    """Ids (batch · count, max_words) of each query's `count` replies with the best log-probability / words **
    length_penalty, the best first; rows of PAD where fewer were found.
    `beam` partial replies per query are kept. A reply that ends joins the finished ones, of which the best are given;
    a query's search is over when `beam` have finished. One beam is greedy search. Raises UserError if there is none."""
    if beam < 1:
        raise UserError(f"A beam search keeps at least 1 partial reply, not {beam}.")
    batch, vocabulary = len(query), model.output.out_features
    beam = min(beam, vocabulary - 3)
    memory, state = model.encode(query, lengths)
    rows = torch.arange(batch, device=query.device).repeat_interleave(beam)
    memory = Memory(*(part[rows] for part in memory))
    state = State(state.hidden[:, rows], state.attentional[rows])
    never = never_spoken(vocabulary, query.device)
    first = torch.arange(batch, device=query.device).unsqueeze(1) * beam  # of each query's rows
    words, partial = torch.full_like(rows, SOS), query.new_empty(batch * beam, 0)
    every = 4 if query.is_cuda else 1
    # At first all beams of a query are the same, so only one of them counts.
    total = torch.full((batch, beam), float("-inf"), device=query.device)
    total[:, 0] = 0.0
    best = torch.full((batch, count), float("-inf"), device=query.device)
    replies, finished = query.new_full((batch, count, max_words), PAD), query.new_zeros(batch)
    for length in range(1, max_words + 1):
        logits, state = model.step(words, state, memory)
        logits = _may_follow(logits, never, length - 1, min_words)
        log_probability = torch.log_softmax(logits, 1).view(batch, beam, vocabulary)
        candidates = (total.unsqueeze(2) + log_probability).view(batch, -1)
        # Twice the beam: even if all of the best end, enough go on.
        scores, where = candidates.topk(min(2 * beam, candidates.size(1)), dim=1)
        origin, word = first + where // vocabulary, where % vocabulary
        last = length == max_words
        ends = (word == EOS) & (torch.arange(scores.size(1), device=query.device) < beam) | last
        ends = ends & (finished < beam).unsqueeze(1) & scores.isfinite()
        quality = (scores / length**length_penalty).masked_fill(~ends, float("-inf"))
        sequences = torch.cat([partial[origin], word.unsqueeze(2)], 2)
        sequences = torch.cat([replies, functional.pad(sequences, (0, max_words - length), value=PAD)], 1)
        best, chosen = torch.cat([best, quality], 1).topk(count, 1)
        replies = sequences.gather(1, chosen.unsqueeze(2).expand(-1, -1, max_words))
        finished += ends.sum(1)
        if last or (length % every == 0 and bool((finished >= beam).all())):
            break
        total, keep = scores.masked_fill(word == EOS, float("-inf")).topk(beam, dim=1)
        rows, words = origin.gather(1, keep).flatten(), word.gather(1, keep).flatten()
        partial = torch.cat([partial[rows], words.unsqueeze(1)], 1)
        state = State(state.hidden[:, rows], state.attentional[rows])
    return replies.flatten(0, 1)


@torch.no_grad()
def sample(
    model: Seq2Seq, query: Tensor, lengths: Tensor, max_words: int, min_words: int = 0,
    *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, count: int = 1,
) -> Tensor:  # fmt: skip
    """Ids (batch · count, at most max_words), `count` a query, each word drawn from softmax(logits / temperature).
    `top_k` keeps the k likeliest words (0: all), `top_p` the fewest likeliest whose probability reaches p (nucleus
    sampling, arXiv:1904.09751). A temperature of 0 is greedy search. Raises UserError for values out of range."""
    if not (0 <= temperature < float("inf") and top_k >= 0 and 0 < top_p <= 1):
        asked = f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        raise UserError(f"{asked}: the first two must be 0 or more, and top_p above 0 and at most 1.")
    if temperature == 0:
        return greedy(model, query, lengths, max_words, min_words).repeat_interleave(count, 0)
    query, lengths = query.repeat_interleave(count, 0), lengths.to(query.device).repeat_interleave(count)
    memory, state = model.encode(query, lengths)
    never = never_spoken(model.output.out_features, query.device)
    generator = torch.Generator(query.device).manual_seed(seed)
    words, spoken, every = torch.full_like(query[:, 0], SOS), [], 4 if query.is_cuda else 1
    ended = torch.zeros_like(words, dtype=torch.bool)
    for _ in range(max_words):
        logits, state = model.step(words, state, memory)
        logits = _may_follow(logits, never, len(spoken), min_words)
        probability = filtered(torch.softmax(logits / max(temperature, 1e-6), 1), top_k, top_p)
        # What torch.multinomial does, but for its look at the probabilities, for which the CPU would wait.
        luck = torch.empty_like(probability).exponential_(generator=generator)
        words = (probability / luck).argmax(1).masked_fill(ended, PAD)
        spoken.append(words)
        ended = ended | (words == EOS)
        if len(spoken) % every == 0 and bool(ended.all()):
            break
    return torch.stack(spoken, 1)


def filtered(probability: Tensor, top_k: int, top_p: float) -> Tensor:
    """probability (batch, vocabulary) with the words outside top-k and the nucleus set to 0; rows not rescaled."""
    ranked, order = probability.topk(min(top_k or probability.size(1), probability.size(1)), dim=1)
    # A word stays if those before it do not reach top_p yet: the likeliest always does.
    ranked = ranked.masked_fill(ranked.cumsum(1) - ranked >= top_p, 0)
    return torch.zeros_like(probability).scatter(1, order, ranked)


def silence(queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As many queries of EOS alone, (queries, 1), and their lengths: what precedes a line that answers nothing."""
    return torch.full((queries, 1), EOS, device=device), torch.ones(queries, dtype=torch.long, device=device)


@torch.no_grad()
def mutual_information(
    model: Seq2Seq, query: Tensor, lengths: Tensor, replies: Tensor, weight: float = 0.85, word_reward: float = 0.5
) -> Tensor:
    """ln p(T | S) - weight · ln p(T) + word_reward · |T|, (batch,): the MMI-antiLM objective of arXiv:1510.03055.
    A reply that fits any query, such as "I don't know", has a high p(T) and loses; the reward keeps the shortest from
    winning. p(T) is the same model's probability of the reply to silence, so train it with `query_dropout`."""
    alone = log_probability(model, *silence(len(query), query.device), replies)
    words = (replies != PAD).sum(1)
    return log_probability(model, query, lengths, replies) - weight * alone + word_reward * words


@torch.no_grad()
def mmi(
    model: Seq2Seq, query: Tensor, lengths: Tensor, max_words: int, min_words: int = 0,
    *, candidates: int = 16, seed: int = 0, count: int = 1,
) -> Tensor:  # fmt: skip
    """Ids (batch · count, at most max_words): of sampled candidates those with most mutual information with the query.
    Candidates come from nucleus sampling among the hundred likeliest words; one that says two words in the same order
    twice is taken only if all do. Equal seeds give equal replies; the batch matters through the random numbers alone.
    Raises UserError if there is not at least 1 candidate."""
    if candidates < 1:
        raise UserError(f"MMI chooses among at least 1 candidate, not {candidates}.")
    candidates = max(candidates, count)
    many = query.repeat_interleave(candidates, 0), lengths.to(query.device).repeat_interleave(candidates)
    replies = sample(model, *many, max_words, min_words, temperature=0.7, top_k=100, top_p=0.9, seed=seed)
    scores = mutual_information(model, *many, replies) - 1e6 * _repeats(replies)
    replies, best = replies.view(len(query), candidates, -1), scores.view(-1, candidates).topk(count).indices
    return replies.gather(1, best.unsqueeze(2).expand(-1, -1, replies.size(2))).flatten(0, 1)


def _repeats(replies: Tensor) -> Tensor:
    """(batch,): 1 where a pair of neighbouring words comes twice in a reply (batch, time)."""
    pairs = replies[:, :-1] * (1 << 32) + replies[:, 1:]
    same = (pairs.unsqueeze(1) == pairs.unsqueeze(2)).triu(1) & (replies[:, 1:] != PAD).unsqueeze(1)
    return same.flatten(1).any(1).long()


@torch.no_grad()
def attention_weights(model: Seq2Seq, query: Tensor, lengths: Tensor, reply: Tensor) -> Tensor:
    """Weights (batch, reply time, query time) with which each word of the given replies was chosen."""
    memory, state = model.encode(query, lengths)
    inputs = torch.cat([torch.full_like(reply[:, :1], SOS), reply[:, :-1]], 1)
    return model.decode(inputs, state, memory)[1]
