"""The series from the command line: python -m helpers train | score | chat | latency | page"""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from helpers.run import Run, choose_device, display_path, write_json, write_text
from helpers.settings import Settings, UserError, command_line, load_profile, parse_changes, user_errors
from helpers.tracking import check_mode


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    options = _parser().parse_args(arguments)
    options.command(options)


def train(options: argparse.Namespace) -> None:
    """Prepare the corpus and train; with --resume go on from the folder's checkpoint; under torchrun together."""
    import torch.distributed as dist

    from helpers.batches import Prepared, prepare
    from helpers.corpus import read_corpus
    from helpers.tracking import Tracker
    from helpers.training import Checkpoint, checkpoint_to_resume, fit, join_processes, ranks

    run, device, start = options.run, join_processes(options.device), None
    first, together = ranks()[0] == 0, ranks()[1] > 1
    with run.locked(first):
        if run.checkpoint.exists() and not (options.resume or options.fresh):
            ways = "--resume to go on from it, --fresh to start over and keep it under another name"
            raise UserError(f"{display_path(run.checkpoint)} exists. Add {ways}, or choose another --run.")
        corpus, state = read_corpus(options.corpus), None
        settings = load_profile(options.profile or corpus.profile)
        if options.resume and run.checkpoint.exists():
            state = Checkpoint.load(run.checkpoint)
            settings = settings if options.profile else Settings(**state.settings)
        elif options.start_from:
            state = start = Checkpoint.load(options.start_from.checkpoint)
            settings = state.shaped(settings)
        settings = settings.change(**parse_changes(options.set))
        prepared = prepare(corpus, settings, state and state.words())
        if options.resume and state:
            checkpoint_to_resume(run, prepared, settings)  # before the data that it was trained on are replaced
        if first:
            print(prepared.account() + f"; profile {corpus.profile}" * (not options.profile and not state), flush=True)
            prepared.save(run.data)
        if together:
            dist.barrier()
            prepared = Prepared.load(run.data)
        with Tracker(options.wandb if first else "off", run.folder, settings.to_dict()) as tracker:
            fit(run, prepared, settings, device, tracker.log, resume=options.resume, start=start)
            progress = run.facts()["progress"] if first else {}
            tracker.summary(**progress)
    if together:
        dist.destroy_process_group()
    if first:
        best = f"best validation loss {progress['best_loss']:.4f} at update {progress['best_update']}"
        print(f"{best}: {display_path(run.folder)}")


def score(options: argparse.Namespace) -> None:
    """Print the likelihood of tab-separated query/response pairs as one line of JSON."""
    from helpers import evaluation
    from helpers.training import load_model

    remedy = "Give a UTF-8 file of lines of query, tab, response."
    with user_errors(f"{options.pairs} cannot be read", remedy, OSError, UnicodeDecodeError):
        lines = options.pairs.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    pairs = [line.split("\t") for line in lines]
    if lines == [""]:
        raise UserError(f"{options.pairs} holds no pair. {remedy}")
    for number, fields in enumerate(pairs, 1):
        if len(fields) != 2:
            raise UserError(f"{options.pairs}, line {number}: {len(fields)} fields; expected query, tab, response.")
    model, vocabulary, *_ = load_model(options.run.checkpoint, options.device)
    print(json.dumps(evaluation.score(model, vocabulary, pairs)))


def chat(options: argparse.Namespace) -> None:
    """Answer each line of the input, in a terminal or in a pipe."""
    from helpers.chat import LONGEST_LINE, Chatbot

    bot, lines = Chatbot.load(options.run, options.device), _bounded(sys.stdin, LONGEST_LINE)
    bot.search(options.decoder)  # a wrong name is refused before the first line is read
    sys.stdin.reconfigure(errors="replace", newline="\n")  # a lone carriage return ends no line
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # a Python without it has no history, and else works
            import readline  # noqa: F401, gives input() arrow keys and a history
        print("Talk to the bot. /help shows what to ask, /attention what it looked at last; /quit or Ctrl-D ends.")
        lines = iter(functools.partial(input, "> "), None)
    choices = {name: getattr(options, name) for name in ("decoder", "seed", "raw", "min_words")}
    with contextlib.suppress(EOFError):
        converse(bot, lines, sys.stdout, count=options.replies, **choices)


def converse(bot, lines: Iterable[str], out: TextIO, seed: int = 0, raw: bool = False, **choices) -> None:
    """A line in, a reply out (of several, a tab between two), until the lines end or one of them is /quit;
    /attention shows what the last reply looked at, /help what to ask. `choices` are those of `Chatbot.replies`."""
    last = None
    for number, line in enumerate(lines):
        if line.strip() == "/quit":
            break
        if line.strip() in ("/attention", "/help"):
            print("\n".join(bot.examples) if "help" in line else heat_map(bot, last), file=out, flush=True)
            continue
        replies = bot.replies(line, seed=seed + number, before=last, **choices)
        print("\t".join(" ".join(reply.words) if raw else reply.text for reply in replies), file=out, flush=True)
        last = replies[0]


def heat_map(bot, reply) -> str:
    """The attention weights of a reply in percent: a line per word of the reply, a column per word of the query."""
    if reply is None or not reply.query:
        return "There is no reply with words to look at yet."
    import pandas as pd  # here, since only this takes it

    query, words, weights = bot.attention(reply)
    return pd.DataFrame((100 * weights).round().int().numpy(), words, query).to_string()


def _bounded(file: TextIO, longest: int) -> Iterable[str]:
    """The lines of a file, of a very long one its end, in constant memory."""
    while line := file.readline(longest):
        while not line.endswith("\n") and (more := file.readline(longest)):
            line = (line + more)[-longest:]
        yield line


def latency(options: argparse.Namespace) -> None:
    """Time every way of answering, each shown to agree with eager first; the table goes to the run's latency.csv."""
    from helpers.latency import as_table, report

    result = report(options.run, options.device, [1, 8, 64], 500, 100, full=True)
    print(as_table(result["rows"]).to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    print("\n".join(f"left out: {name}: {reason}" for name, reason in result["left out"].items()))
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    if options.json:
        write_json(options.json, result)


def page(options: argparse.Namespace) -> None:
    """Write DIR/bot.html, one file with the bot in it that answers in any browser."""
    from helpers.deploy import page as filled

    write_text(options.run.page, filled(options.run, options.precision))
    print(f"{display_path(options.run.page)}: {options.run.page.stat().st_size / 1e6:.1f} MB")


def count(text: str, least: int = 1) -> int:
    if not (text.isdecimal() and len(text) <= 10 and least <= int(text) <= 10**9):
        raise UserError(f"{text[:40]!r} is not a number from {least} to 1,000,000,000.")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if not path.name or path.is_dir():
        raise UserError(f"{text!r} is not a file's name.")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(function, profile: str | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        added.set_defaults(command=function)
        added.add_argument("--run", type=Run, metavar="DIR", required=True, help="the run's folder")
        added.add_argument("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
        if profile is not None:
            added.add_argument("--corpus", default="sample", help="sample, cornell, or a path (docs/own_dialogue.md)")
            added.add_argument("--profile", default=profile, help="a name in notebooks/profiles, or a YAML file")
            added.add_argument("--set", nargs="*", default=[], metavar="name=value", help="settings to change")
        return added

    training = command(train, "")  # the one meant for the corpus
    training.add_argument("--wandb", default="off", type=check_mode, help="off, offline or online")
    training.add_argument("--start-from", type=Run, metavar="DIR", help="a run whose weights and words to start from")
    begin = training.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    begin.add_argument("--fresh", action="store_true", help="start over; a checkpoint there is kept under another name")
    command(score).add_argument("pairs", type=Path, metavar="PAIRS.tsv", help="lines of query, tab, response")
    command(latency).add_argument("--json", type=_file, metavar="FILE", help="write the figures here too")
    command(page).add_argument("--precision", choices=["half", "int8"], default="half", help="of the weights in it")
    talking, number = command(chat), functools.partial(count, least=0)
    talking.add_argument("--decoder", default="", help="mmi (the default where trained for), greedy, beam, sampling")
    talking.add_argument("--seed", type=number, default=0, metavar="N", help="of mmi and sampling")
    talking.add_argument("--replies", type=count, default=1, metavar="N", help="how many at most, a tab between two")
    talking.add_argument("--min-words", type=number, default=0, metavar="N", help="that a reply has at least")
    talking.add_argument("--raw", action="store_true", help="print the model's own words, not as people spell")
    return parser


if __name__ == "__main__":
    sys.exit(main())
