"""A sweep's commands: by W&B's server and its agents with an account, by Optuna without; `make sweep` calls them.

python -m tools.sweeps sweep FILE --run DIR …  |  sweep-worker ID --run DIR …  |  best ID --run DIR  |  trial
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import torch
import wandb
from wandb.sdk.lib import wbauth

from helpers.__main__ import count
from helpers.batches import Prepared, prepare
from helpers.corpus import read_corpus
from helpers.run import Run, choose_device, display_path
from helpers.settings import NAMES, Settings, UserError, command_line, load_profile, parse_changes, user_errors
from helpers.sweep import (
    LOSS,
    OWN_FAILURES,
    join_sweep,
    open_study,
    read_sweep,
    run_sweep,
    train_trial,
    trial_settings,
)
from helpers.tracking import PROJECT, Stopped, Tracker, check_mode
from helpers.training import training_digest

# What an agent calls for each trial, where the sweep's file has no command of its own.
COMMAND = ["${env}", "${interpreter}", "-m", "tools.sweeps", "trial", "${args_no_hyphens}"]
# `wandb agent`, which ends at once when it has ended: while Python shuts down, threads of its own may abort it (0.31).
AGENT = """import os, sys
from wandb.cli.cli import cli
try:
    cli(prog_name="wandb")
except SystemExit as end:
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else bool(end.code))
"""
SAME = "Give the CORPUS and PROFILE that 'make sweep' printed."


def usual_mode() -> str:
    """How a sweep is logged unless told otherwise: online with a W&B login, if WANDB_MODE does not forbid it.
    Raises UserError for a login that cannot be read."""
    settings = wandb.setup().settings
    host, mode = os.environ.get("WANDB_BASE_URL") or settings.base_url, os.environ.get("WANDB_MODE") or settings.mode
    if mode != "online":
        return "off" if mode == "disabled" else "offline"
    # The look-up alone: wandb.login() asks the server, and waits where there is no network.
    with user_errors("The W&B login cannot be used", "Correct it, or add --wandb offline.", wandb.Error, ValueError):
        found = wbauth.authenticate_session(host=host, source="a sweep", prompt=False, update_session=False)
    return "online" if found else "offline"


def create_sweep(spec: dict, data: str) -> str:
    """Register a sweep, whose trials train on the data of this digest or not at all.
    Returns its path, `[entity/]project/id`. Raises UserError if W&B refuses."""
    entity, project = spec.get("entity"), spec.get("project", PROJECT)
    spec = {"program": "tools.sweeps"} | spec | {"command": [*(spec.get("command") or COMMAND), "--data", data]}
    with user_errors("W&B did not take the sweep", "Correct that, or add --wandb offline.", wandb.Error, ValueError):
        return "/".join(filter(None, [entity, project, wandb.sweep(spec, project=project, entity=entity)]))


def find_sweep(name: str):
    """W&B's sweep by its path or its bare id. Raises UserError if it is not there."""
    path = name if "/" in name else f"{PROJECT}/{name}"
    with user_errors(f"W&B does not show the sweep {path}", "Give its path, [entity/]project/id.", Exception):
        return wandb.Api().sweep(path)  # which raises errors of many kinds


def run_agent(sweep: str, folder: Path, device: str) -> None:
    """Work on a W&B sweep until it is done: each trial is the command of the sweep, with the data in `folder`.
    A KeyboardInterrupt, or SIGTERM, ends the trial too. Raises UserError if a trial or the agent fails."""
    command = ["agent", "--forward-signals", "--max-consecutive-failed-runs", "1"]
    with tempfile.TemporaryDirectory() as own:
        python, failed = Path(own, "python"), Path(own, "failed")  # a trial's command says python: this one
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        env = {name: value for name, value in os.environ.items() if name != "WANDB_RUN_ID"} | {
            "PATH": f"{own}:{os.environ['PATH']}", "WANDB_DIR": str(folder.absolute()), "CHATBOT_DEVICE": device,
            "CHATBOT_RUN": str(folder.absolute()), "CHATBOT_FAILED": str(failed),
        }  # fmt: skip
        # In a session of its own it hears of Ctrl-C once, by us, and hands it on to the trial.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        path = sweep if "/" in sweep else f"{PROJECT}/{sweep}"
        agent = subprocess.Popen([sys.executable, "-c", AGENT, *command, path], env=env, start_new_session=True)
        try:
            agent.wait()
        except KeyboardInterrupt:
            agent.send_signal(signal.SIGINT)
            agent.wait()
            raise
        if agent.returncode or failed.is_file():
            said = failed.read_text(encoding="utf-8") if failed.is_file() else "its own message stands above."
            raise UserError(f"The W&B agent of sweep {sweep} has failed: {said}")


def write_online_profile(path: Path, name: str) -> None:
    """The best settings of a sweep at W&B as a profile. Raises UserError if it has no finished trial."""
    from benchmarks.sweep_report import write_settings  # here, since trials need none of what draws reports

    sweep = find_sweep(name)
    best = sweep.best_run()
    if best is None or "validation_loss" not in best.summary:
        raise UserError(f"No trial of the sweep {name} has finished.")
    settings = Settings(**{key: value for key, value in best.config.items() if key in NAMES})
    head = f"{len(sweep.runs)} trials of sweep {name}: {best.name}, {LOSS} {best.summary['validation_loss']:.4f}"
    write_settings(path, settings, sweep.config["parameters"], head)


def mode_of(options: argparse.Namespace, local: bool) -> str:
    """How a sweep is tracked; a `local` one, planned by Optuna, is online only where somebody says so."""
    mode = options.wandb or usual_mode()
    return "offline" if local and mode == "online" and not options.wandb else mode


def is_local(options: argparse.Namespace) -> bool:
    return bool(options.storage) or (options.run.sweep / options.sweep).is_dir()


def plan(options: argparse.Namespace) -> None:
    """Run the trials of a W&B sweep file: by W&B's agents with an account, by Optuna without."""
    run, spec, settings = options.run, read_sweep(options.file), settings_of(options)
    mode = mode_of(options, bool(options.storage))
    if mode == "online" and (options.storage or options.trials):
        raise UserError("W&B's server plans an online sweep: give run_cap in its file instead, or add --wandb offline.")
    prepared = prepare(read_corpus(options.corpus), settings)
    if mode == "online":
        name = create_sweep(spec, training_digest(settings, prepared))
        prepared.save(agent_run(run.folder, name).data)
        data = shlex.join([f"CORPUS={options.corpus}", f"PROFILE={options.profile}"])
        print(f"another machine joins with: make sweep-worker SWEEP={name} {data}", flush=True)
        run_agent(name, run.folder, str(options.device))
    else:
        trials = options.trials or spec.get("run_cap", 60)
        run_sweep(run, prepared, settings, spec, trials, mode, storage=options.storage, device=options.device)


def join(options: argparse.Namespace) -> None:
    """Join a sweep by its id: one in this folder or database, or one of W&B's."""
    run, mode = options.run, mode_of(options, is_local(options))
    if mode == "online" and options.storage:
        raise UserError("W&B's server keeps an online sweep: leave --storage out, or add --wandb offline.")
    if mode == "online":
        command, settings = find_sweep(options.sweep).config.get("command", []), settings_of(options)
        prepared = prepare(read_corpus(options.corpus), settings)
        if training_digest(settings, prepared) not in command:
            raise UserError(f"The sweep {options.sweep} trains on another corpus or profile. {SAME}")
        prepared.save(agent_run(run.folder, options.sweep).data)
        run_agent(options.sweep, run.folder, str(options.device))
    else:
        join_sweep(run, options.sweep, mode, storage=options.storage, device=options.device)


def best(options: argparse.Namespace) -> None:
    """Write a sweep's best settings as a profile, best.yaml in the run's folder."""
    from benchmarks.sweep_report import write_profile

    target = options.run.folder / "best.yaml"
    if not is_local(options) and usual_mode() == "online":
        write_online_profile(target, options.sweep)
    else:
        write_profile(target, open_study(options.run, options.sweep, options.storage))
    print(f"{display_path(target)}: train it with --profile {display_path(target)}")


def agent_run(folder: Path, sweep: str) -> Run:
    """The run within a sweep's folder that holds the data of one W&B sweep; its trials' folders lie beside them."""
    return Run(folder / "online" / sweep.rpartition("/")[2])


def agent_trial(run: Run, changes: dict, tracking: str, device: torch.device, data: str) -> None:
    """One trial of a W&B sweep, on the sweep's prepared data, in a folder named by W&B's run.
    What its own settings bring about fails at W&B and does not end the agent; SIGTERM is the agent's early stop.
    Raises UserError if the data or the settings that it starts from have another digest than the sweep's."""
    here = agent_run(run.folder, os.environ.get("WANDB_SWEEP_ID", "agents"))
    prepared, name = Prepared.load(here.data), os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
    if data and training_digest(prepared.settings, prepared) != data:
        raise UserError(f"{display_path(here.data)} is not what this sweep trains on. {SAME}")
    settings, folder = trial_settings(prepared.settings, changes), Run(here.folder / name)
    try:
        facts = settings.to_dict() | {"corpus": prepared.corpus["name"]}
        with Tracker(tracking, folder.folder, facts) as tracker:
            signal.signal(signal.SIGTERM, tracker.stop)
            said = f"{LOSS} {train_trial(folder, prepared, settings, device, tracker.log):.4f}"
    except (Stopped, *OWN_FAILURES) as error:
        said = str(error)
    print(f"{said}: {display_path(folder.folder)}")


def trial(options: argparse.Namespace) -> None:
    """Train one trial from the sweep's prepared data, in a folder of its own: what a W&B agent calls."""
    try:
        agent_trial(options.run, parse_changes(options.set), options.wandb, options.device, options.data)
    except Exception as error:
        if "CHATBOT_FAILED" in os.environ:  # the agent of `run_agent`, which passes no status on
            Path(os.environ["CHATBOT_FAILED"]).write_text(str(error), encoding="utf-8")
        raise


def settings_of(options: argparse.Namespace) -> Settings:
    return load_profile(options.profile).change(**parse_changes(options.set))


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m tools.sweeps", description=__doc__)
    commands = whole.add_subparsers(required=True, metavar="command")
    for name, function in {"sweep": plan, "sweep-worker": join, "best": best}.items():
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(command=function)
        if function is plan:
            added.add_argument("file", type=Path, help="a W&B sweep file")
            added.add_argument("--trials", type=count, help="how many; otherwise the file's run_cap")
        else:
            added.add_argument("sweep", help="the sweep's id")
        added.add_argument("--run", type=Run, metavar="DIR", required=True, help="the run's folder")
        url = os.environ.get("CHATBOT_STORAGE", "")
        added.add_argument("--storage", default=url, help="a database's URL, better in the variable CHATBOT_STORAGE")
        if function is not best:
            added.add_argument("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
            added.add_argument("--corpus", default="sample", help="sample, cornell, or a path")
            added.add_argument("--profile", default="sweep", help="a name in notebooks/profiles, or a YAML file")
            added.add_argument("--set", nargs="*", default=[], metavar="name=value", help="settings to change")
            modes = "off, offline or online; without it, online where there is a login"
            added.add_argument("--wandb", type=check_mode, help=modes)
    one = commands.add_parser("trial", help=trial.__doc__, description=trial.__doc__)
    one.set_defaults(command=trial, storage="", device=os.environ.get("CHATBOT_DEVICE", "auto"))
    one.add_argument("--run", type=Run, metavar="DIR", default=os.environ.get("CHATBOT_RUN", "runs/sweep"))
    one.add_argument("--device", type=choose_device, default=one.get_default("device"))
    one.add_argument("--data", default="", help="the digest of what the sweep trains on")
    one.add_argument("--wandb", type=check_mode, default="online")
    one.add_argument("set", nargs="*", metavar="name=value", help="settings to change")
    return whole


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    options = parser().parse_args(arguments)
    if options.storage:  # W&B keeps the arguments and uploads them; the URL may hold a password
        sys.argv[:] = [word.replace(options.storage, "...") for word in sys.argv]
    options.command(options)


if __name__ == "__main__":
    sys.exit(main())
