"""The classic tutorial's way, one decoding step at a time: the yardstick of bench, and used for nothing else.

It is what a competent reader of the classic chatbot tutorial writes: dictionaries of lines, batches made of word
lists, a Python loop over decoding steps with softmax, gather and log, a loss read back at every step, two optimisers.
It keeps the tutorial's mistakes (attention over padding, the wrong half of the encoder's state, one embedding in two
optimisers), since they are part of how that way is written; notebooks 02 and 03 show what is wrong with them.
Nothing here is slow on purpose.
"""

from __future__ import annotations

import ast
import itertools
import re
import unicodedata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from helpers.model import Seq2Seq
from helpers.text import EOS, PAD, SOS, SPECIAL, UNK

Pair = list[str]  # a query and its response, as normalised text
LAYERS, DROPOUT, CLIP, DECODER_LEARNING_RATIO = 2, 0.1, 50.0, 5.0  # the tutorial's, and teacher forcing always


def normalised(text: str) -> str:
    """Lower case, accents off, `.!?` apart, everything else that is no letter a blank."""
    letters = (c for c in unicodedata.normalize("NFD", text.lower().strip()) if unicodedata.category(c) != "Mn")
    text = re.sub(r"([.!?])", r" \1", "".join(letters))
    text = re.sub(r"[^a-zA-Z.!?]+", r" ", text)
    return re.sub(r"\s+", r" ", text).strip()


def read_pairs(folder: Path, max_words: int, min_count: int) -> tuple[list[Pair], dict[str, int]]:
    """The short pairs of common words in a folder with Cornell's two files, and the words' ids."""
    lines, pairs = {}, []
    with open(folder / "movie_lines.txt", encoding="iso-8859-1") as file:
        for line in file:
            values = line.split(" +++$+++ ")
            lines[values[0]] = {"movie": values[2], "character": values[1], "text": values[4]}
    with open(folder / "movie_conversations.txt", encoding="iso-8859-1") as file:
        for line in file:
            conversation = [lines[name]["text"] for name in ast.literal_eval(line.split(" +++$+++ ")[3])]
            for i in range(len(conversation) - 1):
                query, response = conversation[i].strip(), conversation[i + 1].strip()
                if query and response:
                    pairs.append([normalised(query), normalised(response)])
    pairs = [pair for pair in pairs if all(len(text.split(" ")) <= max_words for text in pair)]
    counts: dict[str, int] = {}
    for pair in pairs:
        for text in pair:
            for word in text.split(" "):
                counts[word] = counts.get(word, 0) + 1
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    for word, count in counts.items():
        if count >= min_count:
            ids[word] = len(ids)
    kept = []
    for pair in pairs:
        if all(word in ids for text in pair for word in text.split(" ")):
            kept.append(pair)
    return kept, ids


class StepwiseEncoder(nn.Module):
    """A bidirectional GRU, time first."""

    def __init__(self, embedding: nn.Embedding, hidden_size: int) -> None:
        super().__init__()
        self.embedding, self.hidden_size = embedding, hidden_size
        self.gru = nn.GRU(hidden_size, hidden_size, LAYERS, dropout=DROPOUT, bidirectional=True)

    def forward(self, query: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """query (time, batch), lengths falling: outputs (time, batch, hidden), state (2 layers, batch, hidden)."""
        packed = pack_padded_sequence(self.embedding(query), lengths)
        outputs, hidden = self.gru(packed)
        outputs, _ = pad_packed_sequence(outputs)
        return outputs[:, :, : self.hidden_size] + outputs[:, :, self.hidden_size :], hidden


class StepwiseDecoder(nn.Module):
    """One step: GRU, dot attention over everything, padding too, and a softmax over the vocabulary."""

    def __init__(self, embedding: nn.Embedding, hidden_size: int, words: int) -> None:
        super().__init__()
        self.embedding, self.dropout = embedding, nn.Dropout(DROPOUT)
        self.gru = nn.GRU(hidden_size, hidden_size, LAYERS, dropout=DROPOUT)
        self.concat = nn.Linear(2 * hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, words)

    def forward(self, words: Tensor, hidden: Tensor, encoder_outputs: Tensor) -> tuple[Tensor, Tensor]:
        """words (1, batch), hidden (layers, batch, hidden): probabilities (batch, vocabulary) and the state."""
        output, hidden = self.gru(self.dropout(self.embedding(words)), hidden)
        weights = torch.softmax(torch.sum(output * encoder_outputs, dim=2).t(), dim=1).unsqueeze(1)
        context = weights.bmm(encoder_outputs.transpose(0, 1)).squeeze(1)
        combined = torch.tanh(self.concat(torch.cat((output.squeeze(0), context), 1)))
        return torch.softmax(self.out(combined), dim=1), hidden


class StepwiseTrainer:
    """Encoder, decoder and their two optimisers: batches of word lists in, mean losses out."""

    def __init__(
        self, ids: dict[str, int], device: torch.device, hidden_size: int = 500, learning_rate: float = 1e-4
    ) -> None:
        self.ids, self.device = ids, device
        embedding = nn.Embedding(len(ids), hidden_size)
        self.encoder = StepwiseEncoder(embedding, hidden_size).to(device)
        self.decoder = StepwiseDecoder(embedding, hidden_size, len(ids)).to(device)
        self.optimizers = [
            torch.optim.Adam(self.encoder.parameters(), lr=learning_rate),
            torch.optim.Adam(self.decoder.parameters(), lr=learning_rate * DECODER_LEARNING_RATIO),
        ]

    def tensors(self, pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query (time, batch), its lengths, response (time, batch) and its mask, longest query first."""
        pairs = sorted(pairs, key=lambda pair: len(pair[0].split(" ")), reverse=True)
        queries = [[self.ids[word] for word in query.split(" ")] + [EOS] for query, _ in pairs]
        responses = [[self.ids[word] for word in response.split(" ")] + [EOS] for _, response in pairs]
        lengths = torch.tensor([len(query) for query in queries])
        query = torch.LongTensor(list(itertools.zip_longest(*queries, fillvalue=PAD)))
        padded = list(itertools.zip_longest(*responses, fillvalue=PAD))
        mask = torch.BoolTensor([[word != PAD for word in row] for row in padded])
        return query.to(self.device), lengths, torch.LongTensor(padded).to(self.device), mask.to(self.device)

    def train(self, pairs: list[Pair]) -> tuple[float, int]:
        """One update on a batch of pairs: the mean loss per token, and the number of target tokens."""
        query, lengths, response, mask = self.tensors(pairs)
        self.encoder.train()
        self.decoder.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss, losses, tokens = 0, [], 0
        for step_loss, count in self.steps(query, lengths, response, mask):
            loss = loss + step_loss
            losses.append(step_loss.item() * count)
            tokens += count
        loss.backward()
        nn.utils.clip_grad_norm_(self.encoder.parameters(), CLIP)
        nn.utils.clip_grad_norm_(self.decoder.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        return sum(losses) / tokens, tokens

    @torch.no_grad()
    def evaluate(self, batches: list[list[Pair]]) -> float:
        """The exact mean loss per token, in nats."""
        self.encoder.eval()
        self.decoder.eval()
        total, tokens = 0.0, 0
        for pairs in batches:
            for step_loss, count in self.steps(*self.tensors(pairs)):
                total, tokens = total + step_loss.item() * count, tokens + count
        return total / tokens

    def steps(self, query: Tensor, lengths: Tensor, response: Tensor, mask: Tensor):
        """Each decoding step's mean loss over the rows that still have a word there, and their number."""
        encoder_outputs, encoder_hidden = self.encoder(query, lengths)
        hidden = encoder_hidden[:LAYERS]
        words = torch.full((1, query.size(1)), SOS, device=self.device)
        for step in range(len(response)):
            probabilities, hidden = self.decoder(words, hidden, encoder_outputs)
            cross_entropy = -torch.log(torch.gather(probabilities, 1, response[step].view(-1, 1)).squeeze(1))
            yield cross_entropy.masked_select(mask[step]).mean(), mask[step].sum().item()
            words = response[step].view(1, -1)


@torch.no_grad()
def textbook_greedy(model: Seq2Seq, query: Tensor, lengths: Tensor, max_words: int) -> Tensor:
    """The classic tutorial's greedy search on this project's model, so that both can be timed with equal weights.
    One query at a time, `max_words` steps whether or not the reply has ended, the attention's keys and a softmax over
    the vocabulary at each of them. Takes and returns what `greedy` does, except that a row goes on after its EOS."""
    rows, decoder = [], model.decoder
    for row, length in zip(query, lengths, strict=True):
        states, hidden = model.encoder(model.embedding(row[None, : int(length)]), length.view(1))
        words, reply = query.new_full((1, 1), SOS), query.new_zeros(0)
        for _ in range(max_words):
            output, hidden = decoder.recur(model.embedding(words), hidden)
            weights = torch.softmax(decoder.attention.scores(output, decoder.attention.keys(states)), dim=2)
            combined = torch.tanh(decoder.combine(torch.cat([weights @ states, output], 2)))
            probabilities = torch.softmax(model.output(combined.squeeze(1)), dim=1)
            probabilities[:, [PAD, SOS, UNK]] = 0
            _, word = torch.max(probabilities, dim=1)
            reply, words = torch.cat((reply, word)), word.unsqueeze(0)
        rows.append(reply)
    return torch.stack(rows)
