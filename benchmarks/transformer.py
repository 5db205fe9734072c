"""The series' model with self-attention in the GRUs' place: a Transformer (arXiv:1706.03762) that speaks the same
`Memory` and `State`, so that whatever takes a `Seq2Seq` takes it too. Notebook 08 builds it, one idea at a time.

Of the settings, `embedding_size` is the size of every vector between layers, and `hidden_size` that inside the networks
that think for each place; `attention` and `input_feeding` are the GRU's. As there, all can be compiled by TorchScript.
"""

import math

import torch
from torch import Tensor, nn

from helpers.model import Memory, Seq2Seq, State
from helpers.settings import Settings, UserError

HEADS = 4


def attend(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention in several heads: equation 1 and section 3.2.2 of arXiv:1706.03762.
    queries (batch, time, size), keys and values (batch, places, size), visible (batch or 1, time or 1, places): True
    where a query may look. Returns contexts (batch, time, size) and weights (batch, heads, time, places)."""
    batch, time, size = queries.shape
    q, k, v = [x.float().view(batch, -1, heads, size // heads).transpose(1, 2) for x in [queries, keys, values]]
    scores = q @ k.transpose(2, 3) / math.sqrt(size // heads)
    weights = torch.softmax(scores.masked_fill(~visible.unsqueeze(1), float("-inf")), 3)
    return (weights @ v).transpose(1, 2).reshape(batch, time, size).to(queries.dtype), weights


def waves(first: int, places: int, size: int, device: torch.device) -> Tensor:
    """Positions (places, size), the first of them number `first`: a sine and a cosine for each of size/2 rates, from 1
    down to 1/30 (section 3.5 there, whose rates, for longer texts, go down to 1/10,000; and here all sines come before
    all cosines). They have no end, so no line is too long."""
    position = torch.arange(first, first + places, device=device).unsqueeze(1)
    rates = torch.exp(torch.arange(0, size, 2, device=device) * (-math.log(30.0) / size))
    return torch.cat([torch.sin(position * rates), torch.cos(position * rates)], 1)


class Layer(nn.Module):
    """A layer of the encoder: every place looks at others, then thinks for itself. What it finds is added to what it
    had (arXiv:1512.03385), and it reads a normalised copy of that (arXiv:1607.06450; before, not after: 2002.04745)."""

    def __init__(self, size: int, inner: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(size, 3 * size)  # what a place asks, how it is found, and what it tells
        self.merge = nn.Linear(size, size)
        self.network = nn.Sequential(nn.Linear(size, inner), nn.ReLU(), nn.Linear(inner, size))
        self.before_looking, self.before_thinking = nn.LayerNorm(size), nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def look(self, x: Tensor, past: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, time, size), past (2, batch, past time, size): keys and values of the places before these.
        Returns x with what was found, and keys and values (2, batch, past time + time, size) of all places."""
        queries, keys, values = self.project(self.before_looking(x)).chunk(3, 2)
        past = torch.cat([past, torch.stack([keys, values])], 2)
        context, _ = attend(queries, past[0], past[1], visible, self.heads)
        return x + self.dropout(self.merge(context)), past

    def think(self, x: Tensor) -> Tensor:
        """x (batch, time, size), the same network at every place."""
        return x + self.dropout(self.network(self.before_thinking(x)))


class DecoderLayer(Layer):
    """A layer of the decoder, which between the two asks the query's words, as the GRU's states do in Luong's way."""

    def __init__(self, size: int, inner: int, heads: int, dropout: float) -> None:
        super().__init__(size, inner, heads, dropout)
        self.before_asking = nn.LayerNorm(size)
        self.ask, self.learn = nn.Linear(size, size), nn.Linear(size, size)


class Encoder(nn.Module):
    """Layers in which every word of the query sees every other at once."""

    def __init__(self, settings: Settings, heads: int) -> None:
        super().__init__()
        sizes = settings.embedding_size, settings.hidden_size, heads, settings.dropout
        self.layers = nn.ModuleList([Layer(*sizes) for _ in range(settings.layers)])
        self.norm = nn.LayerNorm(settings.embedding_size)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """x (batch, query time, size), padding (batch, query time) to states (batch, query time, size)."""
        nothing = x.new_zeros(2, x.size(0), 0, x.size(2))
        for layer in self.layers:
            x, _ = layer.look(x, nothing, ~padding.unsqueeze(1))
            x = layer.think(x)
        return self.norm(x)


class MemoryAttention(nn.Module):
    """Where the decoder's layers look at the query. `keys` makes all layers' keys and values of the encoder's states,
    once per query, as `LuongAttention.keys` does for its one."""

    def __init__(self, size: int, layers: int, heads: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, 2 * layers
        self.keys = nn.Linear(size, self.parts * size)

    def forward(self, asked: Tensor, layer: int, memory: Memory) -> tuple[Tensor, Tensor]:
        """asked (batch, time, size) by a layer to contexts (batch, time, size) and the heads' mean weights (batch,
        time, query time)."""
        parts = memory.keys.chunk(self.parts, 2)
        visible = ~memory.padding.unsqueeze(1)
        context, weights = attend(asked, parts[2 * layer], parts[2 * layer + 1], visible, self.heads)
        return context, weights.mean(1)


class Decoder(nn.Module):
    """Layers in which every word of the response sees those before it, and the query. What they keep of the words so
    far, keys and values of each layer, is the `State`: one step computes one place."""

    def __init__(self, settings: Settings, heads: int) -> None:
        super().__init__()
        sizes = settings.embedding_size, settings.hidden_size, heads, settings.dropout
        self.layers = nn.ModuleList([DecoderLayer(*sizes) for _ in range(settings.layers)])
        self.attention = MemoryAttention(settings.embedding_size, settings.layers, heads)
        self.norm = nn.LayerNorm(settings.embedding_size)

    def forward(self, x: Tensor, state: State, memory: Memory) -> tuple[Tensor, Tensor, State]:
        """x (batch, time, size), any number of steps. Returns what the words are read off (batch, time, size), weights
        (batch, time, query time), the last layer's, and the state after them."""
        past, time = state.hidden.size(2), x.size(1)
        visible = torch.ones(1, time, past + time, dtype=torch.bool, device=x.device).tril(past)
        kept, seen = [], []
        for number, layer in enumerate(self.layers):
            x, now = layer.look(x, state.hidden[2 * number : 2 * number + 2], visible)
            context, weights = self.attention(layer.ask(layer.before_asking(x)), number, memory)
            x = layer.think(x + layer.dropout(layer.learn(context)))
            kept.append(now)
            seen.append(weights)
        x = self.norm(x)
        return x, seen[-1], State(torch.cat(kept), x[:, -1])


class Transformer(Seq2Seq):
    """A Seq2Seq whose encoder and decoder have no GRU. Embedding, output, `step` and `forward` are Seq2Seq's own.
    Its State's `hidden` is (2 · layers, batch, steps, embedding): of each layer the keys and the values of all words
    so far. Raises UserError for an `embedding_size` that the heads cannot share."""

    def __init__(self, settings: Settings, words: int, heads: int = HEADS) -> None:
        super().__init__(settings, words)
        if settings.embedding_size % (2 * heads):
            raise UserError(f"embedding_size={settings.embedding_size} must be a multiple of {2 * heads}.")
        self.size = settings.embedding_size
        self.encoder, self.decoder = Encoder(settings, heads), Decoder(settings, heads)  # in the GRUs' place

    def place(self, words: Tensor, first: int) -> Tensor:
        """words (batch, time), the first of them at place `first`, to vectors (batch, time, size)."""
        x = self.embedding(words) * math.sqrt(self.size / 2)  # as large as the waves, at first
        return self.dropout(x + waves(first, words.size(1), self.size, words.device).to(x.dtype))

    def encode(self, query: Tensor, lengths: Tensor) -> tuple[Memory, State]:
        """query (batch, query time) and its lengths (batch,), which padding tells already, to what decoding needs."""
        padding = query == self.pad
        states = self.encoder(self.place(query, 0), padding)
        nothing = states.new_zeros(self.decoder.attention.parts, query.size(0), 0, self.size)
        return Memory(states, self.decoder.attention.keys(states), padding), State(nothing, states[:, 0])

    def decode(self, inputs: Tensor, state: State, memory: Memory) -> tuple[Tensor, Tensor, State]:
        """inputs (batch, time), those before them being in the state. As Seq2Seq.decode."""
        return self.decoder(self.place(inputs, state.hidden.size(2)), state, memory)


def new_transformer(settings: Settings, words: int, heads: int = HEADS) -> Transformer:
    """A model with weights drawn by the settings' seed, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return Transformer(settings, words, heads)
