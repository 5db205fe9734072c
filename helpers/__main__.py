"""The series from the command line: python -m helpers train | score | chat | latency | sweep | sweep-worker | best."""

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
    """Prepare the corpus and train; with --resume go on from the folder's checkpoint; under torchrun together."""
    import torch.distributed as dist

    from helpers.batches import Prepared, prepared_data
    from helpers.run import Run, choose_device, shown
    from helpers.tracking import Tracker
    from helpers.training import alone, fit, join_ranks, ranks

    run = Run(options.run)
    device = join_ranks(choose_device(options.device))
    rank, world = ranks()
    settings = load_profile(options.profile).change(**parse_changes(options.set))
    with alone(run):
        if run.checkpoint.exists() and not options.resume:
            raise UserError(f"{shown(run.checkpoint)} exists. Add --resume to go on from it, or choose another --run.")
        if rank == 0:
            prepared = prepared_data(options.corpus, settings)
            prepared.save(run.data)
        if world > 1:
            dist.barrier()
            prepared = Prepared.load(run.data)
        with Tracker("off" if rank else options.wandb, run.wandb, settings.to_dict()) as tracker:
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


def bench(options: argparse.Namespace) -> None:
    """Measure this project against the textbook's way of doing the same, side by side; some minutes."""
    from helpers.bench import bench
    from helpers.run import choose_device

    bench(choose_device(options.device), Path(options.json) if options.json else None)


def sweep(options: argparse.Namespace) -> None:
    """Run the trials of a W&B sweep file: by W&B's agents with an account, by Optuna without."""
    from helpers import tracking
    from helpers.run import Run, choose_device
    from helpers.sweep import read_sweep, run_sweep

    run, device, spec = Run(options.run), choose_device(options.device), read_sweep(Path(options.file))
    prepared = _prepare(options, run)
    mode = options.wandb or ("online" if tracking.logged_in() else "offline")
    if mode == "online":
        name = tracking.create_sweep(spec)
        print(f"another machine joins with: make sweep-worker SWEEP={name}", flush=True)
        tracking.run_agent(name, run.folder)
    else:
        trials = options.trials or spec.get("run_cap", 60)
        run_sweep(run, prepared, prepared.settings, spec, trials, mode, storage=options.storage, device=device)


def sweep_worker(options: argparse.Namespace) -> None:
    """Join a sweep by its id: one in this folder or database, or one of W&B's."""
    from helpers import tracking
    from helpers.run import Run, choose_device
    from helpers.sweep import join_sweep

    run, device = Run(options.run), choose_device(options.device)
    here = options.storage or (run.sweep / options.sweep).is_dir()
    if options.wandb == "online" or (not options.wandb and not here and tracking.logged_in()):
        _prepare(options, run)
        tracking.run_agent(options.sweep, run.folder)
    else:
        join_sweep(run, options.sweep, options.wandb or "offline", storage=options.storage, device=device)


def trial(options: argparse.Namespace) -> None:
    """Train one trial from the run's prepared data, in a folder of its own: what a W&B agent calls."""
    from helpers.run import Run, choose_device
    from helpers.sweep import agent_trial

    agent_trial(Run(options.run), parse_changes(options.set), options.wandb, choose_device(options.device))


def best(options: argparse.Namespace) -> None:
    """Write a sweep's best settings as a profile; with --results also what its trials say, as JSON and CSV."""
    from helpers.importance import report
    from helpers.run import Run, choose_device, shown
    from helpers.sweep import open_study, write_profile

    run = Run(options.run)
    study = open_study(run, options.sweep, options.storage)
    target = Path(options.to or run.folder / "best.yaml")
    write_profile(target, study)
    print(f"{shown(target)}: train it with --profile {shown(target)}")
    if options.results:
        report(study, run, Path(options.results), options.seeds, choose_device(options.device))


def _prepare(options: argparse.Namespace, run):
    from helpers.batches import prepared_data

    settings = load_profile(options.profile).change(**parse_changes(options.set))
    prepared = prepared_data(options.corpus, settings)
    prepared.save(run.data)
    return prepared


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(function, run: str | None = None) -> argparse.ArgumentParser:
        name = function.__name__.replace("_", "-")
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(command=function)
        added.add_argument("--run", required=not run, default=run, metavar="DIR", help="the run's folder")
        added.add_argument("--device", default="auto", help="auto, cpu or cuda")
        return added

    def data(added: argparse.ArgumentParser, profile: str) -> None:
        added.add_argument("--corpus", default="sample", help="sample, cornell, or a zip, folder or jsonl")
        added.add_argument("--profile", default=profile, help="a name in notebooks/profiles, or a YAML file")
        added.add_argument("--set", nargs="*", default=[], metavar="name=value", help="settings to change")

    training = command(train)
    data(training, "sample")
    training.add_argument("--wandb", default="off", help="off, offline or online")
    training.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    for function, name, help in [(sweep, "file", "a W&B sweep file"), (sweep_worker, "sweep", "the sweep's id")]:
        added = command(function)
        added.add_argument(name, help=help)
        data(added, "sweep")
        added.add_argument("--wandb", help="off, offline or online; otherwise online where there is a login")
        added.add_argument("--storage", default="", help="a database's URL, for several machines")
        if function is sweep:
            added.add_argument("--trials", type=int, help="how many; otherwise the file's run_cap")
    added = command(trial, run=os.environ.get("CHATBOT_RUN", "runs/sweep"))
    added.add_argument("--wandb", default="online", help="off, offline or online")
    added.add_argument("set", nargs="*", metavar="name=value", help="settings to change")
    added = command(best)
    added.add_argument("sweep", help="the sweep's id")
    added.add_argument("--storage", default="", help="a database's URL, for several machines")
    added.add_argument("--to", metavar="PROFILE.yaml", help="otherwise best.yaml in the run's folder")
    added.add_argument("--results", metavar="PATH", help="write PATH.json and PATH.csv")
    added.add_argument("--seeds", type=int, default=3, help="of the comparison with the starting point")
    command(score).add_argument("pairs", metavar="PAIRS.tsv", help="lines of query, tab, response")
    command(latency).add_argument("--json", metavar="FILE", help="write the rows and the machine here too")
    talking = command(chat)
    talking.add_argument("--decoder", default="", help="mmi (the default where trained for), greedy, beam, sampling")
    talking.add_argument("--seed", type=int, default=0, help="of mmi and sampling")
    talking.add_argument("--raw", action="store_true", help="print the model's own words, not as people spell")
    measuring = commands.add_parser("bench", help=bench.__doc__, description=bench.__doc__)
    measuring.set_defaults(command=bench)
    measuring.add_argument("--device", default="auto", help="auto, cpu or cuda")
    measuring.add_argument("--json", metavar="FILE", help="where to write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
