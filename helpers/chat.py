"""Talking to the bot: text in, reply out; one function behind the faces of the terminal and the notebook."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from helpers.batches import with_context
from helpers.decoding import attention_weights, beam_search, greedy, mmi, sample
from helpers.evaluation import log_probability
from helpers.model import Seq2Seq
from helpers.run import Run
from helpers.settings import Settings, UserError
from helpers.text import EOS, UNK, Vocabulary, spell
from helpers.training import load_model

Search = Callable[..., torch.Tensor]  # (model, query, lengths, max_words, min_words) to ids
LONGEST_LINE = 10_000  # characters of a line that are read, from its end
NOTHING_SAID = "Say something, and I will answer."
NO_WORDS = "I see no word in that. Try a sentence?"
NO_ANSWER = "I have no words for that."
NOT_KNOWN = "I don't know that; I can answer, for example: "


@dataclasses.dataclass(frozen=True)
class Reply:
    """What was understood and what was answered."""

    text: str
    words: list[str]  # none where the bot has not understood, and says so
    query: list[str]


@dataclasses.dataclass(frozen=True)
class Chatbot:
    """A trained model with its vocabulary."""

    model: Seq2Seq
    vocabulary: Vocabulary
    settings: Settings
    examples: list[str]  # queries that it was trained on

    @classmethod
    def load(cls, run: Run, device: torch.device) -> "Chatbot":
        """The bot of a run's checkpoint. Raises UserError if there is none."""
        return cls(*load_model(run.checkpoint, device))

    def reply(self, *asked, **choices) -> Reply:
        """The first of `replies`."""
        return self.replies(*asked, **choices)[0]

    def replies(
        self, text: str, decoder: str = "", seed: int = 0, temperature: float = 0.8, before: Reply | None = None,
        *, count: int = 1, min_words: int = 0,
    ) -> list[Reply]:  # fmt: skip
        """At most `count` different answers to any text, the best first; what holds no word gets a kind one.
        `decoder` is one of `decoders`, or empty for the recommended one; `before` the bot's last reply, which a model
        trained with `context_words` reads too. `seed` counts for mmi and sampling, `temperature` for sampling. Where
        the best reply is less probable than the setting `decline_below`, the bot says that it does not know.
        Raises UserError for a decoder that is not there, and for a temperature below 0."""
        query = self.vocabulary.tokenise(text[-LONGEST_LINE:])[-self.settings.max_query_words :]
        search = self.search(decoder, seed, temperature, count)
        if not query:
            return [Reply(NO_WORDS if text.strip() else NOTHING_SAID, [], [])]
        query = with_context(before.words if before else [], query, self.settings.context_words)
        least, readings = self.settings.decline_below, [query]
        marks = [mark for mark in self.vocabulary.marks if mark in self.vocabulary]
        bare = query[:-1] if query[-1] in marks else query
        if least and bare:  # a mark more or less at the end makes no other question
            readings += [bare, *([*bare, mark] for mark in marks)]
        for words in readings:
            asked = self.encode(words)
            ids = search(self.model, *asked, self.settings.max_response_words + 1, min_words)
            found = list(dict.fromkeys(tuple(self.vocabulary.decode(row)) for row in ids.tolist()))
            if least == 0 or (found[0] and log_probability(self.model, *asked, ids[:1]).exp().item() >= least):
                replies = [Reply(spell(said, self.vocabulary.spelling), list(said), words) for said in found if said]
                return replies[:count] or [Reply(NO_ANSWER, [], query)]
        return [Reply(NOT_KNOWN + " ".join(f"“{example}”" for example in self.examples[:3]), [], query)]

    def decoders(self, seed: int = 0, temperature: float = 0.8, count: int = 1) -> dict[str, Search]:
        """This model's decoders, the recommended one first."""
        tries = min(4 * count, 64) if count > 1 else 1  # some of which are the same
        searches = {
            "mmi": functools.partial(mmi, seed=seed, count=tries),
            "greedy": greedy if count == 1 else functools.partial(beam_search, beam=tries, count=tries),
            "beam": functools.partial(beam_search, beam=max(5, tries), count=tries),
            "sampling": functools.partial(sample, temperature=temperature, top_p=0.9, seed=seed, count=tries),
        }
        if self.settings.query_dropout == 0:  # it has not learnt how likely a reply is by itself
            del searches["mmi"]
        return searches

    def search(self, decoder: str, seed: int = 0, temperature: float = 0.8, count: int = 1) -> Search:
        """The decoder of that name, or the recommended one for an empty name. Raises UserError if there is none."""
        searches = self.decoders(seed, temperature, count)
        if decoder and decoder not in searches:
            hint = " It must know how likely a reply is by itself: train with query_dropout=0.1." * (decoder == "mmi")
            raise UserError(f"There is no decoder {decoder!r} here; there are {', '.join(searches)}.{hint}")
        return searches[decoder or next(iter(searches))]

    def attention(self, reply: Reply) -> tuple[list[str], list[str], torch.Tensor]:
        """Query words, reply words with EOS, and the weights (reply words, query words) between them."""
        ids, lengths = self.encode(reply.query)
        spoken = torch.tensor([[*self.vocabulary.encode(reply.words), EOS]], device=ids.device)
        weights = attention_weights(self.model, ids, lengths, spoken)[0].cpu()
        query = [word if word in self.vocabulary else self.vocabulary.words[UNK] for word in reply.query]
        return query, [*reply.words, self.vocabulary.words[EOS]], weights

    def encode(self, query: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (1, query time) of the words, and their number, as decoders take them."""
        device = self.model.embedding.weight.device
        return torch.tensor([self.vocabulary.encode(query)], device=device), torch.tensor([len(query)])
