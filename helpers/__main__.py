"""The series from the command line: python -m helpers train | score | chat | latency."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from helpers.settings import UserError, load_profile, parse_changes


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What the user can put right ends in one sentence, not a traceback."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: a normal end for a filter
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def train(options: argparse.Namespace) -> None:
    """Prepare the corpus and train; with --resume go on from the folder's checkpoint."""
    from helpers.batches import prepare
    from helpers.corpus import read_corpus
    from helpers.run import Run, choose_device, shown
    from helpers.tracking import Tracker
    from helpers.training import fit

    run = Run(options.run)
    device = choose_device(options.device)
    settings = load_profile(options.profile).change(**parse_changes(options.set))
    with run.locked():
        if run.checkpoint.exists() and not options.resume:
            raise UserError(f"{shown(run.checkpoint)} exists. Add --resume to go on from it, or choose another --run.")
        prepared = prepare(read_corpus(options.corpus), settings)
        prepared.save(run.data)
        with Tracker(options.wandb, run.wandb, settings.to_dict()) as tracker:
            fit(run, prepared, settings, device, tracker, resume=options.resume)
    progress = run.facts()["progress"]
    print(f"best validation loss {progress['best_loss']:.4f} at update {progress['best_update']}: {shown(run.folder)}")


def score(options: argparse.Namespace) -> None:
    """Print the likelihood of tab-separated query/response pairs as one line of JSON."""
    from helpers import training
    from helpers.checkpoint import load_model
    from helpers.run import Run, choose_device

    texts = []
    try:
        with open(options.pairs, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{options.pairs} cannot be read ({error}). Give a UTF-8 file of query, tab, response."
        ) from None
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) != 2:
            raise UserError(f"{options.pairs}, line {number}: {len(fields)} fields; expected query, tab, response.")
        texts.append((fields[0], fields[1]))
    if not texts:
        raise UserError(f"{options.pairs} holds no pair. Give a file of lines of query, tab, response.")
    model, vocabulary, _ = load_model(Run(options.run).checkpoint, choose_device(options.device))
    print(json.dumps(training.score(model, vocabulary, texts)))


def chat(options: argparse.Namespace) -> None:
    """Answer each line of the input."""
    from helpers.chat import Chatbot, terminal
    from helpers.run import Run, choose_device

    bot = Chatbot.load(Run(options.run), choose_device(options.device))
    terminal(bot, options.decoder, options.seed, options.raw)


def latency(options: argparse.Namespace) -> None:
    """Time every way of answering, each shown to agree with eager first; the table goes to the run's latency.csv."""
    from helpers.latency import as_table, keep, report
    from helpers.run import Run, choose_device

    result = report(Run(options.run), choose_device(options.device), [1, 8, 64], 500, 200, full=True)
    print(as_table(result["rows"]).to_string(index=False, float_format="{:.2f}".format))
    print("\n".join(f"left out: {name}: {reason}" for name, reason in result["left out"].items()))
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    if options.json:
        keep(Path(options.json), result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(function) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        added.set_defaults(command=function)
        added.add_argument("--run", required=True, metavar="DIR", help="the run's folder")
        added.add_argument("--device", default="auto", help="auto, cpu or cuda")
        return added

    training = command(train)
    training.add_argument("--corpus", default="sample", help="sample, cornell, or a zip, folder or jsonl")
    training.add_argument("--profile", default="sample", help="sample, cornell, classic, or a YAML file")
    training.add_argument("--set", nargs="*", default=[], metavar="name=value", help="settings to change")
    training.add_argument("--wandb", default="off", help="off, offline or online")
    training.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    command(score).add_argument("pairs", metavar="PAIRS.tsv", help="lines of query, tab, response")
    command(latency).add_argument("--json", metavar="FILE", help="write the rows and the machine here too")
    talking = command(chat)
    talking.add_argument("--decoder", default="", help="mmi (the default where trained for), greedy, beam, sampling")
    talking.add_argument("--seed", type=int, default=0, help="of mmi and sampling")
    talking.add_argument("--raw", action="store_true", help="print the model's own words, not as people spell")
    return parser


if __name__ == "__main__":
    sys.exit(main())
