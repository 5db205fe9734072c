"""Hyperparameter sweeps: one W&B sweep file, served by W&B's agents with an account and by Optuna without."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from helpers.batches import Prepared
from helpers.run import Run, digest, need, shown, training_digest, write_text
from helpers.settings import DATA_SETTINGS, NAMES, Settings, UserError, read_yaml, refusing
from helpers.tracking import Tracker
from helpers.training import NotFiniteError, fit, read_metrics

LOSS = "validation loss"
METHODS = ("random", "grid", "bayes")
KEYS = (
    "name", "description", "project", "entity", "method", "metric", "parameters", "early_terminate", "run_cap",
    "program", "command",
)  # fmt: skip
HEARTBEAT = 10  # seconds between the signs of life of a trial in a database; six missed, and it is dead
# What a trial's own settings bring about, and would again; any other error is nobody's result and ends the worker.
OWN_FAILURES = (NotFiniteError, torch.OutOfMemoryError)
DISTRIBUTIONS = ("uniform", "q_uniform", "log_uniform_values", "int_uniform", "categorical", "constant")
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the heartbeat's


def read_sweep(path: Path) -> dict:
    """A W&B sweep file, checked against what can be served here and what the settings have. Raises UserError."""
    with refusing(f"The sweep file {shown(path)} cannot be read", "Give a file that can be.", OSError):
        text = path.read_bytes()
    spec = read_yaml(text, f"The sweep file {shown(path)}")
    if not isinstance(spec, dict) or not isinstance(spec.get("parameters"), dict) or not spec["parameters"]:
        raise UserError(f"{shown(path)} must hold 'method', 'metric' and 'parameters', as a W&B sweep does.")
    try:
        _known(spec, KEYS, "the file")
        if spec.get("method") not in METHODS:
            raise UserError(f"method {spec.get('method')!r} is not one of {', '.join(METHODS)}.")
        if spec.get("metric") not in ({"name": "validation_loss", "goal": "minimize"}, {"name": "validation_loss"}):
            raise UserError("the metric must be validation_loss, goal minimize, which is what every trial logs.")
        if type(spec.get("run_cap", 1)) is not int or spec.get("run_cap", 1) < 1:
            raise UserError(f"run_cap {spec['run_cap']!r} must be a number of trials.")
        for name, parameter in spec["parameters"].items():
            distribution(name, parameter)
        pruner(spec)
        planned(spec, 1, 0)
    except UserError as error:
        raise UserError(f"{shown(path)}: {error}") from None
    return spec


def distribution(name: str, parameter: dict) -> optuna.distributions.BaseDistribution:
    """A parameter of the file as Optuna's distribution. Raises UserError for one that can't be served here."""
    if name not in NAMES or (name in DATA_SETTINGS and name != "seed"):
        there_are = ", ".join(["seed", *(n for n in NAMES if n not in DATA_SETTINGS)])
        raise UserError(f"parameter {name!r} is not a setting of model or training. There are: {there_are}.")
    if not isinstance(parameter, dict):
        raise UserError(f"parameter {name} must hold 'values', 'value', or 'min' and 'max', not {parameter!r}.")
    _known(parameter, ("distribution", "value", "values", "min", "max", "q"), f"parameter {name}")
    low, high = parameter.get("min"), parameter.get("max")
    values = [parameter["value"]] if "value" in parameter else parameter.get("values", [low, high])
    if not isinstance(values, list) or not values:
        raise UserError(f"parameter {name}: values must be a list, not {values!r}.")
    try:  # the settings' own check of every value, and of both ends of a range
        values = [getattr(Settings().change(**{name: value}), name) for value in values]
    except UserError as error:
        raise UserError(f"parameter {name}: {error}") from None
    kind = "constant" if "value" in parameter else "categorical" if "values" in parameter else None
    kind = parameter.get("distribution", kind or ("int_uniform" if type(low) is type(high) is int else "uniform"))
    if kind not in DISTRIBUTIONS:
        raise UserError(f"parameter {name}: distribution {kind!r} cannot be served; use {', '.join(DISTRIBUTIONS)}.")
    if kind in ("constant", "categorical"):
        return CategoricalDistribution(values)
    if type(values[0]) is int and kind != "int_uniform":
        raise UserError(f"parameter {name} takes whole numbers: use int_uniform or values, not {kind}.")
    try:
        if kind == "int_uniform":
            return IntDistribution(int(low), int(high))
        step = parameter.get("q", 1) if kind == "q_uniform" else None
        return FloatDistribution(*values, log=kind == "log_uniform_values", step=step)
    except (TypeError, ValueError) as error:
        raise UserError(f"parameter {name}: min {low!r} and max {high!r} do not fit ({error}).") from None


def space_of(spec: dict) -> dict[str, optuna.distributions.BaseDistribution]:
    """All parameters of the file as distributions."""
    return {name: distribution(name, parameter) for name, parameter in spec["parameters"].items()}


def pruner(spec: dict) -> optuna.pruners.BasePruner:
    """`early_terminate: {type: hyperband, min_iter, eta}` as W&B means it: an iteration is one validation, and at
    min_iter, min_iter·eta, … only the best 1/eta of the trials that came so far go on (arXiv:1810.05934)."""
    wanted = spec.get("early_terminate")
    if wanted is None:
        return optuna.pruners.NopPruner()
    if not isinstance(wanted, dict) or wanted.get("type") != "hyperband":
        raise UserError(f"early_terminate must be of type hyperband, not {wanted!r}.")
    _known(wanted, ("type", "min_iter", "max_iter", "s", "eta", "strict"), "early_terminate")
    try:
        eta = int(wanted.get("eta", 3))
        first = int(wanted["min_iter"] if "min_iter" in wanted else wanted["max_iter"] / eta ** wanted["s"])
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(first, 1), reduction_factor=eta)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"early_terminate needs min_iter, or max_iter and s, as whole numbers ({error}).") from None


def planned(spec: dict, trials: int, seed: int) -> list[dict]:
    """The parameters of each trial as far as they are known beforehand: two workers never draw, they only take.

    Random search tries nothing twice; a space with fewer combinations than `trials` gives them all. For `bayes`
    the plan is a list of empty places.
    """
    space = space_of(spec)
    if spec["method"] == "bayes":
        return [{}] * trials
    if spec["method"] == "grid":
        if not all(isinstance(d, CategoricalDistribution) for d in space.values()):
            raise UserError("a grid takes parameters with 'values' or 'value' only.")
        combinations = itertools.product(*(d.choices for d in space.values()))
        return [dict(zip(space, values, strict=True)) for values in itertools.islice(combinations, trials)]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    drawn: dict[str, dict] = {}
    for _ in range(100 * trials):
        params = study.ask(space).params
        drawn.setdefault(json.dumps(params), params)
        if len(drawn) == trials:
            break
    return list(drawn.values())


class JournalLock:
    """The journal's lock, free again when its holder dies, and which mends what that one left.

    A worker killed while it wrote leaves half a line at the end; the next one's line would be glued to it and spoil
    the whole study. Whoever holds the lock cuts the half line off first: it was never acted on.
    """

    def __init__(self, journal: Path) -> None:
        self.journal, self.lock = journal, FileLock(journal.with_suffix(".lock"))

    def acquire(self) -> bool:
        self.lock.acquire(poll_interval=0.01)
        with open(self.journal, "rb+") as journal:
            end = journal.seek(0, os.SEEK_END)
            journal.seek(max(end - 1, 0))
            if end and journal.read() != b"\n":
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def check(self) -> None:
        """Raises UserError if a line is no JSON, which no crash leaves behind."""
        self.acquire()
        try:
            for number, line in enumerate(self.journal.read_bytes().splitlines(), 1):  # noqa: B007
                json.loads(line)
        except ValueError:
            where = f"{shown(self.journal)}, line {number}"
            raise UserError(f"{where}: not a line of JSON. Delete the line to keep the other trials.") from None
        finally:
            self.release()

    def release(self) -> None:
        self.lock.release()


def open_study(run: Run, name: str, storage: str = "", create: bool = False) -> optuna.Study:
    """A sweep by its id: in the run's journal, or in a database by its URL (`postgresql://…`, `mysql://…`).

    With `create` it is made if it is not there. Raises UserError if it cannot be opened, and for a spoilt journal.
    """
    where = _place(storage) if storage else shown(run.sweep)
    kinds = (ImportError, OSError, ValueError, SQLAlchemyError, optuna.exceptions.StorageInternalError)
    with refusing(f"The sweep's storage {where} cannot be opened", "Mend that, or use another one.", *kinds):
        if storage:  # several machines: Optuna's heartbeat tells which trials lost their worker
            backend = optuna.storages.RDBStorage(storage, heartbeat_interval=HEARTBEAT, grace_period=6 * HEARTBEAT)
        else:
            journal = run.sweep / "journal.log"
            if not create:
                need(journal, "'make sweep'")
            run.sweep.mkdir(parents=True, exist_ok=True)
            journal.touch()
            lock = JournalLock(journal)
            lock.check()
            file = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=lock)
            backend = optuna.storages.JournalStorage(file)
        names = optuna.get_all_study_names(backend)
        if not create and name not in names:
            raise UserError(f"There is no sweep {name!r} in {where}; there are: {', '.join(names) or 'none'}.")
        return optuna.create_study(study_name=name, storage=backend, direction="minimize", load_if_exists=True)


def _place(storage: str) -> str:
    """A database's URL without what may be secret in it."""
    try:
        url = make_url(storage)
    except (SQLAlchemyError, ValueError):
        return "(the URL is not one of a database)"
    host = (url.host or "").rpartition("@")[2] or None  # of a password with an @ in it the end is taken for the host
    return URL.create(url.drivername, host=host, port=url.port, database=url.database).render_as_string()


def run_sweep(
    run: Run,
    prepared: Prepared,
    base: Settings,
    spec: dict,
    trials: int,
    tracking: str = "offline",
    *,
    storage: str = "",
    device: torch.device = torch.device("cpu"),  # noqa: B008, a constant
) -> optuna.Study:
    """Run the sweep of a file until `trials` trials are done, and return its study.

    The sweep's id is its name and a digest of all that its losses depend on: file, settings, data, code. So the same
    call goes on where an earlier one stopped, joins one that is still running, here or on another machine that uses
    the same `storage`, and trials that cannot be compared never meet.
    """
    inputs = json.dumps({key: spec.get(key) for key in ("method", "parameters", "early_terminate")})
    name = f"{spec.get('name', 'sweep')}-{digest(inputs, training_digest(base, prepared.digest))[:6]}"
    study = open_study(run, name, storage, create=True)
    trials = max(trials, study.user_attrs.get("trials", 0))
    for key, value in {"spec": spec, "base": base.to_dict(), "trials": trials}.items():
        study.set_user_attr(key, value)
    if not (run.sweep / name / "data.pt").is_file():
        prepared.save(run.sweep / name / "data.pt")
    where = "" if run.folder.name == "sweep" else f" RUN={run.folder.name}"
    print(f"Sweep {name}, {trials} trials; another worker joins by: make sweep-worker SWEEP={name}{where}", flush=True)
    _work(study, run, prepared, tracking, bool(storage), device)
    return study


def join_sweep(run: Run, name: str, tracking: str, *, storage: str = "", device: torch.device) -> optuna.Study:
    """Work on a sweep that another process has started, until none of its trials is left."""
    study = open_study(run, name, storage)
    if "trials" not in study.user_attrs:
        raise UserError(f"The sweep {name} has not been planned yet. Start the worker once 'make sweep' shows a trial.")
    data = run.sweep / name / "data.pt"
    need(data, "'make sweep'")
    _work(study, run, Prepared.load(data), tracking, bool(storage), device)
    return study


def _work(study: optuna.Study, run: Run, prepared: Prepared, tracking: str, database: bool, device) -> None:
    """Take trials until all are done; wait for those that others run, and repeat those whose worker died."""
    spec, base, lost = study.user_attrs["spec"], Settings(**study.user_attrs["base"]), []
    study.pruner, space, plan = pruner(spec), space_of(spec), planned(spec, study.user_attrs["trials"], base.seed)

    def objective(trial: optuna.Trial) -> float:
        if database:  # Optuna's thread sends the first one a moment later: whoever died in between was never missed
            trial.storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("worker", worker)
        place, started = trial.user_attrs.get("place"), time.perf_counter()
        others = study.get_trials(deepcopy=False)
        if place is None or any(other.number < trial.number and _stands(other, place) for other in others):
            trial.set_user_attr("surplus", True)  # workers on two machines had both replaced a dead trial
            raise _SurplusError
        # Trials of a plan are not drawn; those of Bayes's method must not be drawn alike by two workers.
        study.sampler = optuna.samplers.TPESampler(seed=base.seed * 1_000_003 + place)
        params = {name: _suggest(trial, name, space[name]) for name in space}
        said = "interrupted"
        try:
            loss = _train(trial, run, prepared, base.change(**params), study.study_name, tracking, device)
            said = f"{LOSS} {loss:.3f}"
            return loss
        except optuna.TrialPruned:
            said = "stopped early"
            raise
        except OWN_FAILURES as error:
            trial.set_user_attr("error", str(error))
            said = f"failed ({error})"
            raise
        finally:
            print(f"trial {trial.number}: {said} with {params}", flush=True)
            try:
                trial.set_user_attr("seconds", round(time.perf_counter() - started, 2))
            except optuna.exceptions.UpdateFinishedTrialError:  # it was slow, and taken for dead
                lost.append(trial.number)

    worker, workers = f"{os.getpid()}-{uuid.uuid4().hex[:8]}", run.sweep / "workers"
    with FileLock(workers / worker):  # free again when this process dies, however it does, and others see that
        while True:
            with FileLock(run.sweep / "plan.lock"):
                _bury(study, workers, database)
                trials = study.get_trials(deepcopy=False)
                for place, params in enumerate(plan):
                    if not any(_stands(trial, place) for trial in trials):
                        study.enqueue_trial(params, user_attrs={"place": place})
            states = {trial.state for trial in study.get_trials(deepcopy=False)}
            if TrialState.WAITING in states:
                try:
                    study.optimize(objective, n_trials=1, catch=(*OWN_FAILURES, _SurplusError))
                except ValueError:  # another has closed the trial; what became of it is no longer ours to tell
                    if not lost:
                        raise
                    lost.clear()
            elif TrialState.RUNNING in states:
                time.sleep(0.5)
            else:
                break
        (workers / worker).unlink()


def _train(
    trial: optuna.Trial, run: Run, prepared: Prepared, settings: Settings, name: str, tracking: str, device
) -> float:
    """One trial in a folder of its own: the best validation loss. Raises NotFiniteError if it diverges."""
    folder = Run(run.sweep / name / f"trial-{trial.number:03d}")
    label = f"{name}-{trial.number:03d}"
    with Tracker(tracking, folder.folder, settings.to_dict(), name=label, group=name) as tracker:
        loss = train_trial(folder, prepared, settings, device, Reporting(tracker, trial))
    trial.set_user_attr("updating", round(sum(row.get("seconds", 0) for row in read_metrics(folder)), 2))
    return loss


def train_trial(
    run: Run, prepared: Prepared, settings: Settings, device: torch.device, tracker: Tracker | Reporting
) -> float:
    """Train and return the best validation loss, teacher-forced whatever the trial trains with."""
    fit(run, prepared, settings, device, tracker, progress_bar=False)
    loss = run.facts()["progress"]["best_loss"]
    if not math.isfinite(loss):
        raise UserError("the trial has no update, and so no validation loss.")
    tracker.summary(validation_loss=loss)  # what W&B compares trials by
    run.checkpoint.unlink()  # sixty of them would fill a disk; the best settings are trained anew
    return loss


def agent_trial(run: Run, changes: dict, tracking: str, device: torch.device) -> None:
    """One trial of a W&B sweep, from the run's prepared data, in a folder named by the sweep and by W&B's run."""
    need(run.data, "'make sweep'")
    prepared = Prepared.load(run.data)
    settings = prepared.settings.change(**changes)
    name = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
    folder = Run(run.sweep / os.environ.get("WANDB_SWEEP_ID", "agents") / name)
    with Tracker(tracking, folder.folder, settings.to_dict()) as tracker:
        print(f"{LOSS} {train_trial(folder, prepared, settings, device, tracker):.4f}: {shown(folder.folder)}")


class _SurplusError(Exception):
    """This trial's place is filled already."""


class Reporting:
    """A tracker that also tells the trial each validation loss, and ends it where it is to stop early."""

    def __init__(self, tracker: Tracker, trial: optuna.Trial) -> None:
        self.tracker, self.trial, self.validations = tracker, trial, 0
        self.summary = tracker.summary

    def log(self, values: dict, update: int) -> None:
        self.tracker.log(values, update)
        if "validation_loss" in values:
            self.validations += 1
            self.trial.report(values["validation_loss"], self.validations)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def _known(given: dict, allowed: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in allowed:
            raise UserError(f"{where} has an unknown key {key!r}; there are: {', '.join(allowed)}.")


def _suggest(trial: optuna.Trial, name: str, space: optuna.distributions.BaseDistribution):
    if isinstance(space, CategoricalDistribution):
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space, IntDistribution):
        return trial.suggest_int(name, space.low, space.high)
    return trial.suggest_float(name, space.low, space.high, log=space.log, step=space.step)


def _stands(trial: optuna.trial.FrozenTrial, place: int) -> bool:
    """Whether this trial fills a place of the plan: waiting, running, finished or failed by itself."""
    attributes = trial.user_attrs
    died = trial.state == TrialState.FAIL and "error" not in attributes
    return attributes.get("place") == place and not died and "surplus" not in attributes


def _bury(study: optuna.Study, workers: Path, database: bool) -> None:
    """Fail the running trials whose process is dead; their places in the plan are then free again."""
    if database:
        optuna.storages.fail_stale_trials(study)  # by heartbeat, which a journal has not
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker")
        if worker is None:  # died between taking the trial and signing it, unless it is at that very point
            dead = time.time() - trial.datetime_start.timestamp() > 60
        else:
            dead = not database and not _alive(workers / worker)
        if dead:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _alive(worker: Path) -> bool:
    try:
        with FileLock(worker, blocking=False):
            return False
    except Timeout:
        return True


def trial_table(study: optuna.Study) -> pd.DataFrame:
    """One row a trial: number, settings, loss, seconds (of them in updates), worker, state; the best first.

    Raises UserError if none has finished.
    """
    rows = [
        {
            "trial": trial.number, **trial.params, LOSS: trial.value,
            **{name: trial.user_attrs.get(name) for name in ("seconds", "updating", "worker")},
            "state": trial.state.name.lower(),
        }
        for trial in study.trials
        if "surplus" not in trial.user_attrs
    ]  # fmt: skip
    if not any(row["state"] == "complete" for row in rows):
        raise UserError("No trial of this sweep has finished; look at the messages above for the reason.")
    table = pd.DataFrame(rows)
    table.loc[table["state"] != "complete", LOSS] = np.nan  # of a trial stopped early it is not the final one
    return table.sort_values(LOSS, ignore_index=True)


def best_settings(study: optuna.Study) -> Settings:
    """The sweep's starting point with the parameters of its best trial."""
    trial_table(study)  # says so if there is none
    return Settings(**study.user_attrs["base"]).change(**study.best_trial.params)


def write_profile(path: Path, study: optuna.Study) -> None:
    """The best settings as a profile, to train with `--profile PATH`: what the trial chose, and what is no default."""
    settings, best = best_settings(study).to_dict(), study.best_trial
    settings = {k: v for k, v in settings.items() if k in best.params or v != getattr(Settings, k)}
    head = f"# The best of {len(trial_table(study))} trials of sweep {study.study_name}: trial {best.number}, "
    write_text(path, f"{head}{LOSS} {best.value:.4f}.\n{yaml.safe_dump(settings, sort_keys=False)}")


def seeds_table(
    run: Run, prepared: Prepared, choices: dict[str, Settings], seeds: int, device: torch.device
) -> pd.DataFrame:
    """The validation loss of several settings at equal updates, each trained with `seeds` seeds that none of them has:
    with the sweep's own, the best trial would only show once more what it was picked for."""
    rows, first = [], max(settings.seed for settings in choices.values()) + 1
    for seed, (name, settings) in itertools.product(range(first, first + seeds), choices.items()):
        folder = Run(run.sweep / "seeds" / f"{name.replace(' ', '-')}-{seed}")
        settings = settings.change(seed=seed)
        rows.append({
            "settings": name, "seed": seed, "updates": settings.updates,
            LOSS: train_trial(folder, prepared, settings, device, Tracker("off", folder.folder, {})),
        })  # fmt: skip
    return pd.DataFrame(rows)
