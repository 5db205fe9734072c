"""The series from the command line: python -m helpers train | score | chat | latency | bench | sweep | …"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from helpers.run import Run, choose_device, shown, write_json
from helpers.settings import Settings, UserError, load_profile, parse_changes, refusing
from helpers.tracking import known_mode


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
    return 0


def train(options: argparse.Namespace) -> None:
    """Prepare the corpus and train; with --resume go on from the folder's checkpoint; under torchrun together."""
    import torch.distributed as dist

    from helpers.batches import Prepared
    from helpers.tracking import Tracker
    from helpers.training import alone, fit, join_ranks, ranks

    run, device, settings = options.run, join_ranks(options.device), _settings(options)
    rank, world = ranks()
    with alone(run):
        if run.checkpoint.exists() and not options.resume:
            raise UserError(f"{shown(run.checkpoint)} exists. Add --resume to go on from it, or choose another --run.")
        if rank == 0:
            prepared = _prepare(options, settings)
        if world > 1:
            dist.barrier()
            prepared = Prepared.load(run.data)
        with Tracker("off" if rank else options.wandb, run.folder, settings.to_dict()) as tracker:
            fit(run, prepared, settings, device, tracker, resume=options.resume)
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return
    progress = run.facts()["progress"]
    print(f"best validation loss {progress['best_loss']:.4f} at update {progress['best_update']}: {shown(run.folder)}")


def score(options: argparse.Namespace) -> None:
    """Print the likelihood of tab-separated query/response pairs as one line of JSON."""
    from helpers import training
    from helpers.checkpoint import load_model

    kinds = (OSError, UnicodeDecodeError)
    with refusing(f"{options.pairs} cannot be read", "Give a UTF-8 file of query, tab, response.", *kinds):
        text = options.pairs.read_text(encoding="utf-8")
    pairs = [line.split("\t") for line in text.removesuffix("\n").split("\n")] if text else []
    for number, fields in enumerate(pairs, 1):
        if len(fields) != 2:
            raise UserError(f"{options.pairs}, line {number}: {len(fields)} fields; expected query, tab, response.")
    if not pairs:
        raise UserError(f"{options.pairs} holds no pair. Give a file of lines of query, tab, response.")
    model, vocabulary, _ = load_model(options.run.checkpoint, options.device)
    print(json.dumps(training.score(model, vocabulary, pairs)))


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


def bench(options: argparse.Namespace) -> None:
    """Measure this project against the textbook's way of doing the same, side by side; some minutes."""
    from helpers.bench import bench

    found = bench(options.device)
    if options.json:
        write_json(options.json, found)


def sweep(options: argparse.Namespace) -> None:
    """Run the trials of a W&B sweep file: by W&B's agents with an account, by Optuna without."""
    from helpers import tracking
    from helpers.sweep import read_sweep, run_sweep

    run, spec = options.run, read_sweep(options.file)
    mode = options.wandb or ("online" if not options.storage and tracking.logged_in() else "offline")
    if mode == "online" and (options.storage or options.trials):
        raise UserError("W&B's server plans an online sweep: give run_cap in its file instead, or add --wandb offline.")
    settings = _settings(options)
    prepared = _prepare(options, settings)
    if mode == "online":
        name = tracking.create_sweep(spec)
        own = f"CORPUS={options.corpus} PROFILE={options.profile}"
        print(f"another machine joins with: make sweep-worker SWEEP={name} {own}", flush=True)
        tracking.run_agent(name, run.folder)
    else:
        trials = options.trials or spec.get("run_cap", 60)
        run_sweep(run, prepared, settings, spec, trials, mode, storage=options.storage, device=options.device)


def sweep_worker(options: argparse.Namespace) -> None:
    """Join a sweep by its id: one in this folder or database, or one of W&B's."""
    from helpers import tracking
    from helpers.sweep import join_sweep

    run = options.run
    here = options.storage or (run.sweep / options.sweep).is_dir()
    if options.wandb == "online" and options.storage:
        raise UserError("W&B's server keeps an online sweep: leave --storage out, or add --wandb offline.")
    if options.wandb == "online" or (not options.wandb and not here and tracking.logged_in()):
        _prepare(options, _settings(options), keep=True)
        tracking.run_agent(options.sweep, run.folder)
    else:
        mode = options.wandb or "offline"
        join_sweep(run, options.sweep, mode, storage=options.storage, device=options.device)


def trial(options: argparse.Namespace) -> None:
    """Train one trial from the run's prepared data, in a folder of its own: what a W&B agent calls."""
    from helpers.sweep import agent_trial

    agent_trial(options.run, parse_changes(options.set), options.wandb, options.device)


def best(options: argparse.Namespace) -> None:
    """Write a sweep's best settings as a profile; with --results also what its trials say, as JSON and CSV."""
    from helpers.importance import report
    from helpers.sweep import open_study, write_profile

    study = open_study(options.run, options.sweep, options.storage)
    target = options.run.folder / "best.yaml"
    write_profile(target, study)
    print(f"{shown(target)}: train it with --profile {shown(target)}")
    if options.results:
        report(study, options.run, options.results, options.seeds, options.device)


def _settings(options: argparse.Namespace) -> Settings:
    return load_profile(options.profile).change(**parse_changes(options.set))


def _prepare(options: argparse.Namespace, settings: Settings, keep: bool = False):
    """The corpus prepared, also in the run's folder; with `keep`, others use what is there: it must be the same."""
    from helpers.batches import Prepared, prepared_data

    prepared, there = prepared_data(options.corpus, settings), options.run.data
    if keep and there.is_file():
        kept = Prepared.load(there)
        if (kept.digest, kept.settings) != (prepared.digest, settings):
            raise UserError(f"{shown(there)} is of another corpus or profile. Give the sweep's own, or another run.")
        return kept
    prepared.save(there)
    return prepared


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{text!r} is not a number from 1 on.")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if not path.name or path.is_dir():
        raise UserError(f"{text!r} is not a file's name.")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(function, **run) -> argparse.ArgumentParser:
        name = function.__name__.replace("_", "-")
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(command=function)
        if function is not bench:
            added.add_argument("--run", type=Run, metavar="DIR", help="the run's folder", **run or {"required": True})
        added.add_argument("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
        return added

    def data(added: argparse.ArgumentParser, profile: str) -> None:
        added.add_argument("--corpus", default="sample", help="sample, cornell, or a zip, folder or jsonl")
        added.add_argument("--profile", default=profile, help="a name in notebooks/profiles, or a YAML file")
        added.add_argument("--set", nargs="*", default=[], metavar="name=value", help="settings to change")

    training = command(train)
    data(training, "sample")
    training.add_argument("--wandb", type=known_mode, default="off", help="off, offline or online")
    training.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    for function in (sweep, sweep_worker):
        added = command(function)
        data(added, "sweep")
        added.add_argument(
            "--wandb", type=known_mode, help="off, offline or online; otherwise online where there is a login"
        )
        added.add_argument("--storage", default="", help="a database's URL, for several machines")
        if function is sweep:
            added.add_argument("file", type=Path, help="a W&B sweep file")
            added.add_argument("--trials", type=_count, help="how many; otherwise the file's run_cap")
        else:
            added.add_argument("sweep", help="the sweep's id")
    added = command(trial, default=os.environ.get("CHATBOT_RUN", "runs/sweep"))
    added.add_argument("--wandb", type=known_mode, default="online", help="off, offline or online")
    added.add_argument("set", nargs="*", metavar="name=value", help="settings to change")
    added = command(best)
    added.add_argument("sweep", help="the sweep's id")
    added.add_argument("--storage", default="", help="a database's URL, for several machines")
    added.add_argument("--results", type=_file, metavar="PATH", help="write PATH.json and PATH.csv")
    added.add_argument("--seeds", type=_count, default=3, help="of the comparison with the starting point")
    command(score).add_argument("pairs", type=Path, metavar="PAIRS.tsv", help="lines of query, tab, response")
    for function in (latency, bench):
        command(function).add_argument("--json", type=_file, metavar="FILE", help="write the figures here too")
    talking = command(chat)
    talking.add_argument("--decoder", default="", help="mmi (the default where trained for), greedy, beam, sampling")
    talking.add_argument("--seed", type=int, default=0, help="of mmi and sampling")
    talking.add_argument("--raw", action="store_true", help="print the model's own words, not as people spell")
    return parser


if __name__ == "__main__":
    sys.exit(main())
