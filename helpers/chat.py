"""Talking to the bot: text in, reply out; one function behind the terminal's and the notebook's face."""

import contextlib
import dataclasses
import functools
import html
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

import torch

from helpers.batches import with_context
from helpers.decoding import attention_weights, beam_search, greedy, mmi, sample
from helpers.model import Seq2Seq
from helpers.run import Run
from helpers.settings import Settings, UserError
from helpers.text import EOS, UNK, Vocabulary, spell, tokenise
from helpers.training import load_model

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


@dataclasses.dataclass(frozen=True)
class Chatbot:
    """A trained model with its vocabulary."""

    model: Seq2Seq
    vocabulary: Vocabulary
    settings: Settings

    @classmethod
    def load(cls, run: Run, device: torch.device) -> "Chatbot":
        """The bot of a run's checkpoint. Raises UserError if there is none."""
        return cls(*load_model(run.checkpoint, device))

    def reply(self, text: str, decoder: str = "", seed: int = 0, temperature: float = 0.8, before: str = "") -> Reply:
        """Answer any text; what holds no word gets a kind one. Without a decoder's name the recommended one is used.
        `before` is the line before it, the bot's last reply, which a model trained with `context_words` reads too.
        `seed` counts for mmi and sampling, `temperature` for sampling. Raises UserError for a decoder that is not
        known, or that needs what the model was not trained for, and for a temperature below 0."""
        query = tokenise(text[-LONGEST_LINE:])[-self.settings.max_query_words :]
        search = self.search(decoder, seed, temperature)
        if not query:
            return Reply(NO_WORDS if text.strip() else NOTHING_SAID, [], [])
        query = with_context(tokenise(before), query, self.settings.context_words)
        ids = search(self.model, *self._encode(query), self.settings.max_response_words + 1)
        words = self.vocabulary.decode(ids[0].tolist())
        return Reply(spell(words) or NO_ANSWER, words, query)

    def decoders(self, seed: int = 0, temperature: float = 0.8) -> dict[str, Callable[..., torch.Tensor]]:
        """This model's decoders, the recommended one first: functions of model, query, lengths and max_words."""
        searches = {
            "mmi": functools.partial(mmi, seed=seed),
            "greedy": greedy,
            "beam": functools.partial(beam_search, beam=5),
            "sampling": functools.partial(sample, temperature=temperature, top_p=0.9, seed=seed),
        }
        if self.settings.query_dropout == 0:  # it has not learnt how likely a reply is by itself
            del searches["mmi"]
        return searches

    def search(self, decoder: str, seed: int = 0, temperature: float = 0.8) -> Callable[..., torch.Tensor]:
        """The decoder of that name, or the recommended one for an empty name. Raises UserError if there is none."""
        searches = self.decoders(seed, temperature)
        if decoder and decoder not in searches:
            hint = " It must know how likely a reply is by itself: train with query_dropout=0.1." * (decoder == "mmi")
            raise UserError(f"There is no decoder {decoder!r} here; there are {', '.join(searches)}.{hint}")
        return searches[decoder or next(iter(searches))]

    def attention(self, reply: Reply) -> tuple[list[str], list[str], torch.Tensor]:
        """Query words, reply words with EOS, and the weights (reply words, query words) between them."""
        ids, lengths = self._encode(reply.query)
        spoken = torch.tensor([[*self.vocabulary.encode(reply.words), EOS]], device=ids.device)
        weights = attention_weights(self.model, ids, lengths, spoken)[0].cpu()
        query = [word if word in self.vocabulary else self.vocabulary.words[UNK] for word in reply.query]
        return query, [*reply.words, self.vocabulary.words[EOS]], weights

    def _encode(self, query: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.model.embedding.weight.device
        return torch.tensor([self.vocabulary.encode(query)], device=device), torch.tensor([len(query)])


def converse(bot: Chatbot, lines: Iterable[str], out: TextIO, decoder: str = "", seed: int = 0, raw=False) -> None:
    """A line in, a reply out, until the lines end or one of them is /quit; /attention shows what the last looked at."""
    reply = None
    for number, line in enumerate(lines):
        if line.strip() == "/quit":
            break
        if line.strip() == "/attention":
            print(heat_map(bot, reply), file=out, flush=True)
            continue
        reply = bot.reply(line, decoder, seed + number, before=reply.text if reply else "")
        print(" ".join(reply.words) if raw else reply.text, file=out, flush=True)


def heat_map(bot: Chatbot, reply: Reply | None) -> str:
    """The attention weights of a reply in percent: a line a word of the reply, a column a word of the query."""
    if reply is None or not reply.query:
        return "There is no reply with words to look at yet."
    import pandas as pd  # here, since only this takes it

    query, words, weights = bot.attention(reply)
    return pd.DataFrame((100 * weights).round().int().numpy(), words, query).to_string()


def terminal(bot: Chatbot, decoder: str = "", seed: int = 0, raw: bool = False) -> None:
    """Talk in a terminal, or in a pipe when the input is none."""
    bot.search(decoder)  # a wrong name is refused before the first line is read
    sys.stdin.reconfigure(errors="replace", newline="\n")  # a lone carriage return ends no line
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # a Python without it has no history, and else works
            import readline  # noqa: F401, gives input() arrow keys and a history
        print("Talk to the bot. /attention shows what its last reply looked at; /quit or Ctrl-D ends.")
    lines = iter(functools.partial(input, "> "), None) if sys.stdin.isatty() else _bounded(sys.stdin)
    with contextlib.suppress(EOFError):
        converse(bot, lines, sys.stdout, decoder, seed, raw)


def _bounded(file: TextIO) -> Iterable[str]:
    """The lines of a file, of a very long one its end, in constant memory."""
    while line := file.readline(LONGEST_LINE):
        while not line.endswith("\n") and (more := file.readline(LONGEST_LINE)):
            line = (line + more)[-LONGEST_LINE:]
        yield line


def chat_box(bot: Chatbot):
    """The same in JupyterLab: a line to type in, a choice of decoder, the conversation, and its attention on demand."""
    import ipywidgets as widgets

    from helpers import plots

    history = widgets.HTML()
    line = widgets.Text(placeholder="Say something and press Enter", continuous_update=False)
    line.layout.width = "36em"
    decoder = widgets.Dropdown(options=list(bot.decoders()), layout=widgets.Layout(width="8em"))
    temperature = widgets.FloatSlider(0.8, min=0, max=1.5, step=0.1, description="temperature", disabled=True)
    temperature.style.description_width = "initial"
    look = widgets.Button(description="Show attention", disabled=True)
    restart = widgets.Button(description="New conversation")
    picture = widgets.Image(layout=widgets.Layout(display="none", width="32em"))
    replies: list[Reply] = []

    def answer(change) -> None:
        if not change["new"]:  # our own emptying of the line
            return
        before = replies[-1].text if replies else ""
        replies.append(bot.reply(line.value, decoder.value, len(replies), temperature.value, before))
        you, reply = html.escape(line.value[:500]), html.escape(replies[-1].text)
        history.value += f"<div><b>you</b> {you}</div><div class='chat-bot'><b>bot</b> {reply}</div>"
        line.value, look.disabled, picture.layout.display = "", not replies[-1].query, "none"

    def show_attention(_) -> None:
        query, words, weights = bot.attention(replies[-1])
        picture.value = plots.png(plots.attention(query, words, weights.numpy()).figure)
        picture.layout.display = "block"

    def start_over(_) -> None:
        replies.clear()
        history.value, look.disabled, picture.layout.display = "", True, "none"

    line.observe(answer, "value")
    decoder.observe(lambda change: setattr(temperature, "disabled", change["new"] != "sampling"), "value")
    look.on_click(show_attention)
    restart.on_click(start_over)
    return widgets.VBox([history, line, widgets.HBox([decoder, temperature, look, restart]), picture])
