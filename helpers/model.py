"""Encoder, Luong attention and decoder: a GRU sequence-to-sequence model, batch first throughout.

Every module can be compiled by `torch.jit.script`, so types are kept plain and are not postponed.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from helpers.settings import Settings
from helpers.text import PAD


class Memory(NamedTuple):
    """What attention looks at: the encoded query, computed once and used at every decoding step."""

    states: Tensor  # (batch, query time, hidden), h̄_s
    keys: Tensor  # (batch, query time, hidden), the part of the score that depends on h̄_s alone
    padding: Tensor  # (batch, query time), True at padding, False at words


class State(NamedTuple):
    """What the decoder carries from one step to the next."""

    hidden: Tensor  # (layers, batch, hidden)
    attentional: Tensor  # (batch, embedding), h̃ of the step before; only input feeding reads it


class EncoderLayer(nn.Module):
    """Two GRUs over padded queries, one along the words and one against them, which reads each query turned round
    within its own length: it too meets padding only after the last word. Packing does the same, in more shapes."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.along, self.against = (nn.GRU(input_size, hidden_size, batch_first=True) for _ in range(2))
        self.bridge = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, inputs: Tensor, turned: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """inputs (batch, time, input), turned (batch, time, 1): each place's opposite, start (1, batch, hidden): zeros.
        Returns both directions' outputs (batch, time, hidden) and the bridged state (batch, hidden)."""
        along, _ = self.along(inputs, start)
        against, _ = self.against(inputs.gather(1, turned.expand_as(inputs)), start)
        against = against.gather(1, turned.expand_as(against))
        # Each has read all at its own end: the last word's place, which is the first one's opposite, or the first.
        ends = along.gather(1, turned[:, :1].expand(-1, 1, along.size(2))), against[:, :1]
        return along, against, torch.tanh(self.bridge(torch.cat(ends, 2)[:, 0]))


class Encoder(nn.Module):
    """A bidirectional GRU over the padded query, with dropout between its layers.
    The two directions' outputs are summed. Each layer's two final states are bridged into the decoder's state of that
    layer, tanh(W [forward; backward] + b), as in the appendix of arXiv:1409.0473 and for both directions."""

    def __init__(self, embedding_size: int, hidden_size: int, layers: int, dropout: float) -> None:
        super().__init__()
        sizes = [embedding_size] + [2 * hidden_size] * (layers - 1)
        self.layers = nn.ModuleList([EncoderLayer(size, hidden_size) for size in sizes])
        self.dropout = nn.Dropout(dropout)

    def forward(self, embedded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """embedded (batch, time, embedding), lengths (batch,), each at least 1.
        Returns outputs (batch, time, hidden), at padding without meaning, and hidden (layers, batch, hidden)."""
        batch, time, _ = embedded.shape
        places = torch.arange(1, time + 1, device=embedded.device).view(1, -1, 1)
        turned = (lengths.to(embedded.device).view(-1, 1, 1) - places) % time  # words to words, padding to padding
        start = embedded.new_zeros(1, batch, self.layers[0].along.hidden_size)
        outputs, hidden = embedded, []
        for number, layer in enumerate(self.layers):
            along, against, state = layer(outputs, turned, start)
            hidden.append(state)
            outputs = self.dropout(torch.cat([along, against], 2)) if number + 1 < len(self.layers) else along + against
        return outputs, torch.stack(hidden)


class LuongAttention(nn.Module):
    """Global attention of Luong et al., arXiv:1508.04025, section 3.1: equation 7 and the scores below it.
    score(h_t, h̄_s) is h_tᵀ h̄_s (`dot`), h_tᵀ W_a h̄_s (`general`) or v_aᵀ tanh(W_a [h_t; h̄_s]) (`concat`).
    The part that depends on h̄_s alone, W_a h̄_s, is computed once per query: `keys`."""

    def __init__(self, score: str, hidden_size: int) -> None:
        super().__init__()
        self.keys = nn.Identity() if score == "dot" else nn.Linear(hidden_size, hidden_size, bias=False)
        self.for_queries = nn.Linear(hidden_size, hidden_size, bias=False) if score == "concat" else nn.Identity()
        self.register_parameter("v", nn.Parameter(torch.empty(hidden_size)) if score == "concat" else None)
        if self.v is not None:
            nn.init.uniform_(self.v, -(hidden_size**-0.5), hidden_size**-0.5)

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """hidden (batch, time, hidden), keys (batch, query time, hidden) to (batch, time, query time)."""
        if self.v is None:  # in fp32: on CPUs bf16 prepares again for each pair of lengths
            return hidden.float() @ keys.float().transpose(1, 2)
        return torch.tanh(self.for_queries(hidden).unsqueeze(2) + keys.unsqueeze(1)) @ self.v

    def forward(self, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Context vectors (batch, time, hidden) and weights (batch, time, query time) for decoder states (eq. 7).
        Padding gets a score of -inf and so a weight of exactly 0: a reply does not depend on its batch."""
        scores = self.scores(hidden, memory.keys).masked_fill_(memory.padding.unsqueeze(1), float("-inf"))
        weights = torch.softmax(scores, dim=2)
        return (weights.float() @ memory.states.float()).to(hidden.dtype), weights


class Decoder(nn.Module):
    """A GRU whose states attend to the query: h̃_t = tanh(W_c [c_t; h_t]), equation 5 of arXiv:1508.04025.
    h̃ has the embedding's size, so that the output matrix W_s of equation 6 can be the embedding itself.
    With `input_feeding` (section 3.3 there) h̃_{t-1} joins the input of step t, which forbids whole sequences."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        embedding, hidden = settings.embedding_size, settings.hidden_size
        self.input_feeding = settings.input_feeding
        width = embedding * 2 if settings.input_feeding else embedding
        sizes = [width] + [hidden] * (settings.layers - 1)
        # One by one: an nn.GRU's own dropout has cuDNN set up its random numbers again at every update.
        self.grus = nn.ModuleList([nn.GRU(size, hidden, batch_first=True) for size in sizes])
        self.attention = LuongAttention(settings.attention, hidden)
        self.combine = nn.Linear(2 * hidden, embedding)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, embedded: Tensor, state: State, memory: Memory) -> tuple[Tensor, Tensor, State]:
        """embedded (batch, time, embedding): the words so far, SOS first; any number of steps, also one.
        Returns h̃ (batch, time, embedding), attention weights (batch, time, query time) and the state after them."""
        if not self.input_feeding:
            outputs, hidden = self.recur(embedded, state.hidden)
            attentional, weights = self.attend(outputs, memory)
            return attentional, weights, State(hidden, attentional[:, -1])
        steps, all_weights = [], []
        for step in embedded.split(1, dim=1):
            outputs, hidden = self.recur(torch.cat([step, state.attentional.unsqueeze(1)], 2), state.hidden)
            attentional, weights = self.attend(outputs, memory)
            state = State(hidden, attentional[:, 0])
            steps.append(attentional)
            all_weights.append(weights)
        return torch.cat(steps, 1), torch.cat(all_weights, 1), state

    def recur(self, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The layers of GRUs: outputs (batch, time, hidden), and hidden (layers, batch, hidden) after them."""
        after = []
        for number, gru in enumerate(self.grus):
            inputs, state = gru(self.dropout(inputs) if number else inputs, hidden[number : number + 1])
            after.append(state)
        return inputs, torch.cat(after) if len(after) > 1 else after[0]

    def attend(self, outputs: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """GRU outputs (batch, time, hidden) to h̃ (batch, time, embedding) and weights (batch, time, query time)."""
        context, weights = self.attention(outputs, memory)
        return self.dropout(torch.tanh(self.combine(torch.cat([context, outputs], 2)))), weights


class Seq2Seq(nn.Module):
    """The whole model: p(response | query), one word at a time."""

    def __init__(self, settings: Settings, words: int) -> None:
        super().__init__()
        self.pad = PAD  # TorchScript reads attributes, not globals
        self.embedding = nn.Embedding(words, settings.embedding_size, padding_idx=PAD)
        self.encoder = Encoder(settings.embedding_size, settings.hidden_size, settings.layers, settings.dropout)
        self.decoder = Decoder(settings)
        self.output = nn.Linear(settings.embedding_size, words)
        self.dropout = nn.Dropout(settings.dropout)
        if settings.tie_weights:
            # As an output matrix, rows of variance 1 would give logits far too large.
            nn.init.normal_(self.embedding.weight, std=settings.embedding_size**-0.5)
            with torch.no_grad():
                self.embedding.weight[PAD].zero_()
            self.output.weight = self.embedding.weight

    def encode(self, query: Tensor, lengths: Tensor) -> tuple[Memory, State]:
        """query (batch, query time) and its lengths (batch,) to what decoding needs."""
        outputs, hidden = self.encoder(self.dropout(self.embedding(query)), lengths)
        memory = Memory(outputs, self.decoder.attention.keys(outputs), query == self.pad)
        return memory, State(hidden, hidden.new_zeros(query.size(0), self.decoder.combine.out_features))

    def decode(self, inputs: Tensor, state: State, memory: Memory) -> tuple[Tensor, Tensor, State]:
        """inputs (batch, time) to h̃ (batch, time, embedding), weights (batch, time, query time), and state."""
        return self.decoder(self.dropout(self.embedding(inputs)), state, memory)

    def step(self, words: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """One decoding step: words (batch,) just said to logits (batch, vocabulary) of the next, and the state."""
        attentional, _, state = self.decode(words.unsqueeze(1), state, memory)
        return self.output(attentional[:, 0]), state

    def forward(self, query: Tensor, query_lengths: Tensor, inputs: Tensor) -> Tensor:
        """Teacher forcing, the whole response at once: logits (batch, response time, vocabulary) after each input."""
        memory, state = self.encode(query, query_lengths)
        attentional, _, _ = self.decode(inputs, state, memory)
        return self.output(attentional)


def new_model(settings: Settings, words: int) -> Seq2Seq:
    """A model with weights drawn by the settings' seed, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return Seq2Seq(settings, words)


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers, a tied matrix counted once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
