"""Talking to the bot: text in, reply out; one function behind the terminal's and the notebook's face."""

from __future__ import annotations

import dataclasses
import html
import sys
from collections.abc import Iterable
from typing import TextIO

import torch

from helpers.checkpoint import load_model
from helpers.decoding import attention_weights, beam_search, greedy, sample
from helpers.model import Seq2Seq
from helpers.run import Run
from helpers.settings import Settings, UserError
from helpers.text import EOS, UNK, Vocabulary, spell, tokenise

DECODERS = ("greedy", "beam", "sampling")
LONGEST_LINE = 10_000  # characters of a line that are read, from its end
NOTHING_SAID = "Say something, and I will answer."
NO_WORDS = "I understand words in Latin letters only. Try a sentence?"
NO_ANSWER = "I have no words for that."


@dataclasses.dataclass(frozen=True)
class Reply:
    """What was understood and what was answered."""

    text: str
    words: list[str]
    query: list[str]
    unknown: list[str]  # words of the query that the vocabulary lacks


@dataclasses.dataclass(frozen=True)
class Chatbot:
    """A trained model with its vocabulary."""

    model: Seq2Seq
    vocabulary: Vocabulary
    settings: Settings

    @classmethod
    def load(cls, run: Run, device: torch.device) -> Chatbot:
        """The bot of a run's checkpoint. Raises UserError if there is none."""
        return cls(*load_model(run.checkpoint, device))

    def reply(self, text: str, decoder: str = "greedy", seed: int = 0) -> Reply:
        """Answer any text; what holds no word gets a kind one. Raises UserError for a decoder that is not known."""
        if decoder not in DECODERS:
            raise UserError(f"There is no decoder {decoder!r}; there are {', '.join(DECODERS)}.")
        query = tokenise(text[-LONGEST_LINE:])[-self.settings.max_query_words :]
        if not query:
            return Reply(NO_WORDS if text.strip() else NOTHING_SAID, [], [], [])
        ids, lengths = self._encode(query)
        longest = self.settings.max_response_words + 1
        if decoder == "greedy":
            said = greedy(self.model, ids, lengths, longest)
        elif decoder == "beam":
            said = beam_search(self.model, ids, lengths, longest, beam=5)
        else:
            said = sample(self.model, ids, lengths, longest, temperature=0.8, top_p=0.9, seed=seed)
        words = self.vocabulary.decode(said[0].tolist())
        unknown = [word for word in query if word not in self.vocabulary]
        return Reply(spell(words) or NO_ANSWER, words, query, unknown)

    def attention(self, reply: Reply) -> tuple[list[str], list[str], torch.Tensor]:
        """Query words, reply words with EOS, and the weights (reply words, query words) between them."""
        ids, lengths = self._encode(reply.query)
        said = torch.tensor([[*self.vocabulary.encode(reply.words), EOS]], device=ids.device)
        weights = attention_weights(self.model, ids, lengths, said)[0].cpu()
        query = [word if word in self.vocabulary else self.vocabulary.words[UNK] for word in reply.query]
        return query, [*reply.words, self.vocabulary.words[EOS]], weights

    def _encode(self, query: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.model.embedding.weight.device
        return torch.tensor([self.vocabulary.encode(query)], device=device), torch.tensor([len(query)])


def converse(bot: Chatbot, lines: Iterable[str], out: TextIO, decoder: str = "greedy", seed: int = 0) -> None:
    """A line in, a reply out, until the lines end or one of them is /quit."""
    for number, line in enumerate(lines):
        if line.strip() == "/quit":
            break
        print(bot.reply(line, decoder, seed + number).text, file=out, flush=True)


def terminal(bot: Chatbot, decoder: str = "greedy", seed: int = 0) -> None:
    """Talk in a terminal, or in a pipe when the input is none."""
    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("Talk to the bot; an empty line is fine, /quit or Ctrl-D ends.")
        converse(bot, _prompted(), sys.stdout, decoder, seed)
    else:
        converse(bot, sys.stdin, sys.stdout, decoder, seed)


def _prompted() -> Iterable[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def chat_box(bot: Chatbot):
    """The same in JupyterLab: a box to type in, a choice of decoder, and the conversation so far."""
    import ipywidgets as widgets

    history = widgets.HTML()
    line = widgets.Text(placeholder="Say something and press Enter", continuous_update=False)
    line.layout.width = "32em"
    decoder = widgets.Dropdown(options=DECODERS, layout=widgets.Layout(width="9em"))
    said: list[str] = []

    def answer(change) -> None:
        if not change["new"]:  # our own emptying of the line
            return
        reply = bot.reply(line.value, decoder.value, seed=len(said)).text
        said.append(f"<b>you</b> {html.escape(line.value[:500])}<br><b>bot</b> {html.escape(reply)}")
        history.value, line.value = "<br>".join(said[-20:]), ""

    line.observe(answer, "value")
    return widgets.VBox([history, widgets.HBox([line, decoder])])
