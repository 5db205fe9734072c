"""The classic recipe and ours, trained on one corpus and held to the same movies: everything into one JSON file.

    python -m benchmarks.compare --corpus PATH             # to results/compare-NAME.json
    python -m benchmarks.compare --corpus PATH --context   # does the line before help? to results/context-NAME.json

Trains into runs/compare-NAME-PROFILE (what is there already is gone on from), so a second call only measures again.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.replies import commonest_reply, replies_of, reply_metrics
from benchmarks.results import without_place
from helpers.batches import Pairs, Prepared, prepare
from helpers.chat import Chatbot
from helpers.corpus import read_corpus
from helpers.decoding import mutual_information
from helpers.evaluation import evaluate, log_probability, score
from helpers.run import ROOT, Run, choose_device, machine, write_json
from helpers.settings import command_line, load_profile
from helpers.text import EOS
from helpers.training import fit

PROFILES = ("classic", "cornell")
SHORT = 9  # words at most, on both sides: what the classic recipe trains on
QUERIES = 500  # held-out queries that every decoder answers
OURS = """Hello.|How are you?|What is your name?|Where are you going?|I love you.|Do you want a drink?|Who killed him?|
Are you crazy?|I need some money.|What time is it?|Why did you leave me?|Can I ask you a question?|
I don't believe you.|Where is my wife?|Get out of my house!|Did you see the doctor?|I'm sorry.|
You look beautiful tonight.|What do you want from me?|Are you married?|Give me the gun.|Do you like music?|
How old are you?|I'm hungry.|Who are you talking about?|We have to go now.|Is he dead?|Tell me a story.|
What are you afraid of?|Good night."""


def unigram_perplexity(training: Counter[str], responses: list[list[str]]) -> float:
    """Perplexity of a model that knows only how often each word (EOS included) occurs; counts + 1 for new ones.
    `training` counts response words with their EOS; `responses` carry their EOS too. Learning must beat this."""
    types, total = len(training) + 1, sum(training.values())
    words = [word for response in responses for word in response]
    nll = -sum(math.log((training[word] + 1) / (total + types)) for word in words)
    return math.exp(nll / len(words))


@torch.no_grad()
def choice_accuracy(score: Callable[[Tensor, Tensor, Tensor], Tensor], pairs: Pairs, others: int = 9) -> float:
    """How often score(query, lengths, replies) ranks the true response above `others` taken from other queries.
    The others are drawn by a fixed seed; guessing gives 1 / (1 + others)."""
    randomness, right = torch.Generator().manual_seed(0), 0
    for rows in torch.arange(len(pairs)).split(64):
        shifts = torch.randint(1, len(pairs), (len(rows), others), generator=randomness)
        chosen = torch.cat([rows.unsqueeze(1), (rows.unsqueeze(1) + shifts) % len(pairs)], 1).flatten()
        replies = pairs.responses[chosen.to(pairs.responses.device)].long()
        batch = pairs.batch(rows.repeat_interleave(1 + others))
        scores = score(batch.query, batch.query_lengths, replies).view(len(rows), -1)
        right += int((scores[:, 0] >= scores.max(1).values).sum())
    return right / len(pairs)


def train(profile: str, corpus, name: str, device: torch.device) -> tuple[Run, Prepared, Chatbot]:
    """The profile's bot for this corpus, trained or taken up where it was left."""
    run, settings = Run.named(f"compare-{name}-{profile}"), load_profile(profile)
    data = prepare(corpus, settings)
    data.save(run.data)
    fit(run, data, settings, device)
    return run, data, Chatbot.load(run, device)


def known(words: list[str], bots: list[Chatbot]) -> bool:
    return all(word in bot.vocabulary for word in words for bot in bots)


def measure(name: str, corpus, device: torch.device) -> dict:
    """Likelihood on the same test exchanges, every decoder's figures, the curves, and replies to our own queries."""
    trained = {profile: train(profile, corpus, name, device) for profile in PROFILES}
    bots = [bot for _, _, bot in trained.values()]
    texts = trained["cornell"][1].texts["test"]
    words = [(query.split(), response.split()) for query, response in texts]
    short = [pair for pair in words if max(map(len, pair)) <= SHORT and known([*pair[0], *pair[1]], bots)]
    result = {"corpus": without_place(trained["cornell"][1].corpus), "machine": machine(device)}
    result |= {"short test exchanges": len(short), "test exchanges": len(texts), "queries": QUERIES, "models": {}}
    for profile, (run, _, bot) in trained.items():
        likelihood = evaluate(bot.model, Pairs.from_words(short, bot.vocabulary).to(device))
        rows = run.read_metrics()
        manifest = json.loads(run.manifest.read_text())
        entry = {
            "parameters": manifest["parameters"],
            "precision": manifest["precision"],
            "words": len(bot.vocabulary),
            "best update": manifest["progress"]["best_update"],
            "training minutes": round(sum(row.get("seconds", 0) for row in rows) / 60, 1),
            "short": {"perplexity": likelihood.perplexity, "nats per response": likelihood.per_response},
            "all": score(bot.model, bot.vocabulary, texts),
            "validation curve": [(row["update"], row["validation_loss"]) for row in rows if "validation_loss" in row],
            "training curve": [
                (row["update"], row["loss"]) for row in rows if "loss" in row and row["update"] % 20 == 0
            ],
            "settings": bot.settings.to_dict(),
        }
        pairs = Pairs.from_words(words[:QUERIES], bot.vocabulary).to(device)
        references = [response for _, response in words[:QUERIES]]
        entry["choice of ten"] = {"likelihood": choice_accuracy(partial(log_probability, bot.model), pairs)}
        if "mmi" in bot.decoders():
            entry["choice of ten"]["mmi"] = choice_accuracy(partial(mutual_information, bot.model), pairs)
        entry["decoders"] = {}
        for decoder, search in bot.decoders().items():
            replies = replies_of(bot.model, pairs, bot.vocabulary, bot.settings.max_response_words + 1, search)
            entry["decoders"][decoder] = reply_metrics(replies, references) | {"commonest": commonest_reply(replies)[0]}
        entry["replies"] = {
            query: {decoder: bot.reply(query, decoder).text for decoder in bot.decoders()}
            for query in (line.strip() for line in OURS.replace("\n", "").split("|"))
        }
        result["models"][profile] = entry
    return result


def measure_context(name: str, corpus, device: torch.device) -> dict:
    """A smaller, shorter form of our recipe with and without the line before, on the same test exchanges."""
    small = {"embedding_size": 256, "hidden_size": 256, "dropout": 0.4, "updates": 2500, "validate_every": 250}
    result = {"models": {}}
    for words in (20, 0):
        run, settings = (
            Run.named(f"context-{name}-{words}"),
            load_profile("cornell").change(context_words=words, **small),
        )
        data = prepare(corpus, settings)
        model = fit(run, data, settings, device)
        test = data.splits["test"]
        if words:
            follow_ups = ((test.queries == EOS).any(1) & (test.queries[:, 0] != EOS)).nonzero()[:, 0]
        part = Pairs(*(getattr(test, field.name)[follow_ups] for field in dataclasses.fields(Pairs)))
        result["models"][f"{words} words of context"] = {
            "all": evaluate(model, test.to(device)).perplexity,
            "follow-ups": evaluate(model, part.to(device)).perplexity,
        }
    result |= {"corpus": without_place(data.corpus), "machine": machine(device), "settings": settings.to_dict()}
    return result | {"test exchanges": len(test), "follow-ups": len(part)}


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="sample, cornell, or a path")
    parser.add_argument("--context", action="store_true", help="measure what the line before is worth instead")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    name = Path(options.corpus).stem
    kind, measured = ("context", measure_context) if options.context else ("compare", measure)
    result = measured(name, read_corpus(options.corpus), choose_device(options.device))
    write_json(ROOT / "results" / f"{kind}-{name}.json", result)
    for model, entry in result["models"].items():
        print(model)
        for figure in ("short", "all", "follow-ups", "choice of ten", "decoders"):
            if figure in entry:
                print(f"    {figure}: {entry[figure]}")


if __name__ == "__main__":
    sys.exit(main())
