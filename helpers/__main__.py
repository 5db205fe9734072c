"""The series from the command line: python -m helpers train | score | chat | latency | trial"""

import argparse
import json
import os
import sys
from pathlib import Path

from helpers.run import Run, choose_device, display_path, write_json
from helpers.settings import Settings, UserError, load_profile, parse_changes, user_errors
from helpers.tracking import check_mode


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What the user can put right ends in one sentence, not a traceback."""
    try:
        options = _parser().parse_args(arguments)
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


def train(options: argparse.Namespace) -> None:
    """Prepare the corpus and train; with --resume go on from the folder's checkpoint; under torchrun together."""
    import torch.distributed as dist

    from helpers.batches import Prepared
    from helpers.tracking import Tracker
    from helpers.training import checkpoint_to_resume, fit, join_processes, ranks

    run, device, settings = options.run, join_processes(options.device), _settings(options)
    first, together = ranks()[0] == 0, ranks()[1] > 1
    with run.locked(first):
        if run.checkpoint.exists() and not (options.resume or options.fresh):
            ways = "--resume to go on from it, --fresh to start over and keep it under another name"
            raise UserError(f"{display_path(run.checkpoint)} exists. Add {ways}, or choose another --run.")
        if first:
            prepared = _prepare(options, settings)
            if run.checkpoint.exists() and options.resume:
                checkpoint_to_resume(run, prepared, settings)  # before the data that it was trained on are replaced
            prepared.save(run.data)
        if together:
            dist.barrier()
            prepared = Prepared.load(run.data)
        with Tracker(options.wandb if first else "off", run.folder, settings.to_dict()) as tracker:
            fit(run, prepared, settings, device, tracker.log, resume=options.resume)
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
    model, vocabulary, _ = load_model(options.run.checkpoint, options.device)
    print(json.dumps(evaluation.score(model, vocabulary, pairs)))


def chat(options: argparse.Namespace) -> None:
    """Answer each line of the input."""
    from helpers.chat import Chatbot, terminal

    terminal(Chatbot.load(options.run, options.device), options.decoder, options.seed, options.raw)


def latency(options: argparse.Namespace) -> None:
    """Time every way of answering, each shown to agree with eager first; the table goes to the run's latency.csv."""
    from helpers.latency import as_table, report

    result = report(options.run, options.device, [1, 8, 64], 500, 100, full=True)
    print(as_table(result["rows"]).to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    print("\n".join(f"left out: {name}: {reason}" for name, reason in result["left out"].items()))
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    if options.json:
        write_json(options.json, result)


def trial(options: argparse.Namespace) -> None:
    """Train one trial from the sweep's prepared data, in a folder of its own: what a W&B agent calls."""
    from helpers.sweep import agent_trial

    try:
        agent_trial(options.run, parse_changes(options.set), options.wandb, options.device, options.data)
    except Exception as error:
        if "CHATBOT_FAILED" in os.environ:  # the agent of `run_agent`, which passes no status on
            Path(os.environ["CHATBOT_FAILED"]).write_text(str(error), encoding="utf-8")
        raise


def _settings(options: argparse.Namespace) -> Settings:
    return load_profile(options.profile).change(**parse_changes(options.set))


def _prepare(options: argparse.Namespace, settings: Settings):
    from helpers.batches import prepare
    from helpers.corpus import read_corpus

    return prepare(read_corpus(options.corpus), settings)


def _file(text: str) -> Path:
    path = Path(text)
    if not path.name or path.is_dir():
        raise UserError(f"{text!r} is not a file's name.")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    modes = {"type": check_mode, "help": "off, offline or online"}

    def command(function, profile: str = "", run: str | None = None) -> argparse.ArgumentParser:
        name, text = function.__name__.replace("_", "-"), function.__doc__
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        added.add_argument("--run", type=Run, metavar="DIR", default=run, required=not run, help="the run's folder")
        added.add_argument("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
        if profile:
            added.add_argument("--corpus", default="sample", help="sample, cornell, or a zip, folder or jsonl")
            added.add_argument("--profile", default=profile, help="a name in notebooks/profiles, or a YAML file")
            added.add_argument("--set", nargs="*", default=[], metavar="name=value", help="settings to change")
        return added

    training = command(train, "sample")
    training.add_argument("--wandb", default="off", **modes)
    begin = training.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    begin.add_argument("--fresh", action="store_true", help="start over; a checkpoint there is kept under another name")
    one = command(trial, run=os.environ.get("CHATBOT_RUN", "runs/sweep"))
    one.set_defaults(device=os.environ.get("CHATBOT_DEVICE", "auto"))
    one.add_argument("--data", default="", help="the digest of what the sweep trains on")
    one.add_argument("--wandb", default="online", **modes)
    one.add_argument("set", nargs="*", metavar="name=value", help="settings to change")
    command(score).add_argument("pairs", type=Path, metavar="PAIRS.tsv", help="lines of query, tab, response")
    command(latency).add_argument("--json", type=_file, metavar="FILE", help="write the figures here too")
    talking = command(chat)
    talking.add_argument("--decoder", default="", help="mmi (the default where trained for), greedy, beam, sampling")
    talking.add_argument("--seed", type=int, default=0, help="of mmi and sampling")
    talking.add_argument("--raw", action="store_true", help="print the model's own words, not as people spell")
    return parser


if __name__ == "__main__":
    sys.exit(main())
