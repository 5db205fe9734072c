"""Hyperparameter sweeps: one W&B sweep file, served by W&B's agents with an account and by Optuna without."""

import contextlib
import itertools
import json
import os
import random
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import optuna
import pandas as pd
import torch
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import TrialState
from pydantic import BaseModel, Field
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from wandb.sdk.sweeps.scheduler.optuna import sweep_parameter_to_distribution

from helpers.batches import Prepared
from helpers.run import ROOT, Run, digest, display_path, require
from helpers.settings import DATA_SETTINGS, NAMES, Settings, UserError, number, read_yaml, user_errors, valid
from helpers.tracking import Stopped, Tracker
from helpers.training import NotFiniteError, fit, training_digest

LOSS = "validation loss"
HEARTBEAT = 5  # seconds between a running trial's signs of life; six missed, and its worker is dead
CPU = torch.device("cpu")
# What a trial's own settings bring about, and would again; any other error is nobody's result and ends the worker.
OWN_FAILURES = (NotFiniteError, torch.OutOfMemoryError)
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", "Heartbeat of storage|.*experimental")  # it is sent here without Study.optimize


class EarlyTerminate(BaseModel, extra="forbid"):
    """W&B's hyperband: an iteration is one validation, and at min_iter, min_iter·eta, … only the best 1/eta of the
    trials that came so far go on (arXiv:1810.05934)."""

    type: Literal["hyperband"]
    min_iter: Annotated[int, Field(ge=1)]
    eta: Annotated[int, Field(ge=2)] = 3


class Sweep(BaseModel, extra="forbid"):
    """A W&B sweep file, as far as it can be served here."""

    name: Annotated[str, Field(pattern="^[^/]+$")] = "sweep"  # of a folder, too
    description: str = ""
    project: str = ""
    entity: str = ""
    method: Literal["random", "grid", "bayes"]
    metric: dict[str, str]
    parameters: Annotated[dict[str, dict], Field(min_length=1)]
    early_terminate: EarlyTerminate | None = None
    run_cap: Annotated[int, Field(ge=1)] = 60
    program: str = ""
    command: list[str] = []


def read_sweep(path: Path) -> dict:
    """A W&B sweep file, checked against what can be served here and what the settings have. Raises UserError."""
    path = path if path.is_file() else ROOT / "notebooks" / path  # for papermill by hand, from whatever folder
    spec = read_yaml(path, f"The sweep file {display_path(path)}")
    try:
        if not isinstance(spec, dict):
            raise UserError("it must hold 'method', 'metric' and 'parameters', as a W&B sweep does.")
        with valid("key", list(Sweep.model_fields)):
            Sweep.model_validate(spec)
        if spec["metric"] not in ({"name": "validation_loss"}, {"name": "validation_loss", "goal": "minimize"}):
            raise UserError("the metric must be validation_loss, goal minimize, which is what every trial logs.")
        planned(spec, 1, 0)
        pruner(spec)
    except UserError as error:
        raise UserError(f"{display_path(path)}: {error}") from None
    return spec


def distribution(name: str, parameter: dict) -> BaseDistribution:
    """A parameter of the file as Optuna's distribution. Raises UserError for one that the setting does not take."""
    choices = ["seed", *(name for name in NAMES if name not in DATA_SETTINGS)]
    if name not in choices:
        raise UserError(f"parameter {name!r} is not a setting of model or training. There are: {', '.join(choices)}.")
    keys = ("distribution", "value", "values", "min", "max", "q")
    if unknown := sorted(parameter.keys() - set(keys)):
        raise UserError(f"parameter {name} has an unknown key {unknown[0]!r}; there are: {', '.join(keys)}.")
    with user_errors(f"parameter {name} cannot be served", "", ValueError, TypeError, KeyError):
        given = {key: number(value) for key, value in parameter.items()}
        if given.get("distribution") == "q_uniform":  # W&B's are multiples of q, Optuna's count from min
            q = given.get("q", 1)
            given |= {end: round(given[end] / q) * q for end in ("min", "max")}
        found = sweep_parameter_to_distribution(given)
    values = found.choices if isinstance(found, CategoricalDistribution) else (found.low, found.high)
    values = [getattr(Settings().change(**{name: value}), name) for value in values]  # the settings' own check of each
    return CategoricalDistribution(values) if isinstance(found, CategoricalDistribution) else found


def space_of(spec: dict) -> dict[str, BaseDistribution]:
    """All parameters of the file as distributions."""
    return {name: distribution(name, parameter) for name, parameter in spec["parameters"].items()}


def pruner(spec: dict) -> optuna.pruners.BasePruner:
    """What ends trials early, if the file asks for it."""
    if not spec.get("early_terminate"):
        return optuna.pruners.NopPruner()
    wanted = EarlyTerminate(**spec["early_terminate"])
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=wanted.min_iter, reduction_factor=wanted.eta)


def planned(spec: dict, trials: int, seed: int) -> list[dict]:
    """The parameters of each trial as far as they are known beforehand: two workers never draw, they only take.
    Random search tries nothing twice; a space with fewer combinations than `trials` gives them all.
    For `bayes` the plan is a list of empty places."""
    space = space_of(spec)
    if spec["method"] == "bayes":
        return [{}] * trials
    if spec["method"] == "grid":
        if not all(isinstance(values, CategoricalDistribution) for values in space.values()):
            raise UserError("a grid takes parameters with 'values' or 'value' only.")
        combinations = itertools.product(*(values.choices for values in space.values()))
        return [dict(zip(space, chosen, strict=True)) for chosen in itertools.islice(combinations, trials)]
    study, drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)), {}
    for _ in range(100 * trials):
        params = study.ask(space).params
        drawn.setdefault(json.dumps(params), params)
        if len(drawn) == trials:
            break
    return list(drawn.values())


def open_study(run: Run, name: str, storage: str = "", create: bool = False) -> optuna.Study:
    """A sweep by its id, in the SQLite file of the run's folder or in a database by its URL (`postgresql://…`).
    With `create` it is made if it is not there.
    Raises UserError, which shows nothing of a URL that may be secret, if it cannot be opened."""
    file = run.sweep / "sweep.db"
    if not storage and not create:
        require(file, "'make sweep'")
    run.sweep.mkdir(parents=True, exist_ok=True)
    url = storage or URL.create("sqlite", database=str(file.absolute())).render_as_string()
    where = f"(a {url.partition('://')[0]} database)" if "://" in storage else display_path(file)
    kinds = (ImportError, OSError, ValueError, SQLAlchemyError, optuna.exceptions.StorageInternalError)
    with (
        user_errors(f"The sweep's storage {where} cannot be opened", "Correct that, or use another one.", *kinds),
        FileLock(run.sweep / "opening.lock"),  # the tables of a fresh database must not be made twice
    ):
        for attempt in range(3):  # machines that start on a fresh database at once make its tables twice
            with contextlib.suppress(*kinds if attempt < 2 else ()):
                backend = optuna.storages.RDBStorage(
                    url, heartbeat_interval=HEARTBEAT, grace_period=6 * HEARTBEAT,
                    heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
                    engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {},
                )  # fmt: skip
                break
            time.sleep(0.5 + random.random())
        names = optuna.get_all_study_names(backend)
        if not create and name not in names:
            raise UserError(f"There is no sweep {name!r} in {where}; there are: {', '.join(names) or 'none'}.")
        return optuna.create_study(study_name=name, storage=backend, direction="minimize", load_if_exists=True)


def run_sweep(
    run: Run, prepared: Prepared, base: Settings, spec: dict, trials: int, tracking: str = "offline",
    *, storage: str = "", device: torch.device = CPU,
) -> optuna.Study:  # fmt: skip
    """Run the sweep of a file until `trials` trials are done, and return its study.
    The sweep's id is its name and a digest of all that its losses depend on: file, settings, data.
    So the same call goes on where an earlier one stopped, joins one that is still running, here or on another machine
    that uses the same `storage`, and trials that cannot be compared never meet."""
    inputs = json.dumps({key: spec.get(key) for key in ("method", "parameters", "early_terminate")})
    name = f"{spec.get('name', 'sweep')}-{digest(inputs, training_digest(base, prepared))[:6]}"
    study, data = open_study(run, name, storage, create=True), Run(run.sweep / name).data
    with FileLock(run.sweep / "plan.lock"):
        if not data.is_file():
            prepared.save(data)
        trials = max(trials, study.user_attrs.get("trials", 0))
        for key, value in {"spec": spec, "base": base.to_dict(), "trials": trials}.items():
            study.set_user_attr(key, value)
        places = [trial.user_attrs.get("place") for trial in study.get_trials(deepcopy=False)]
        plan = planned(spec, trials, base.seed)
        for place, params in enumerate(plan):
            if place not in places:
                study.enqueue_trial(params, user_attrs={"place": place})
    more = (f" RUN={run.folder.name}" if run.folder.name != "sweep" else "") + (" STORAGE=…" if storage else "")
    print(f"Sweep {name}, {len(plan)} trials; another worker joins: make sweep-worker SWEEP={name}{more}", flush=True)
    return join_sweep(run, name, tracking, storage=storage, device=device)


def join_sweep(run: Run, name: str, tracking: str, *, storage: str = "", device: torch.device = CPU) -> optuna.Study:
    """Work on a sweep that has been planned, until none of its trials is left."""
    study, prepared = open_study(run, name, storage), Prepared.load(Run(run.sweep / name).data)
    if "trials" not in study.user_attrs:
        raise UserError(f"The sweep {name} has not been planned yet. Start the worker once 'make sweep' shows a trial.")
    Worker(study, run, prepared, tracking, device).work()
    return study


class Worker:
    """A process that takes trials until all are done; it waits for those that others run, and repeats the dead's."""

    def __init__(self, study: optuna.Study, run: Run, prepared: Prepared, tracking: str, device: torch.device) -> None:
        self.study, self.run, self.prepared, self.tracking, self.device = study, run, prepared, tracking, device
        spec, self.base = study.user_attrs["spec"], Settings(**study.user_attrs["base"])
        study.pruner, self.space, self.id = pruner(spec), space_of(spec), f"{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def work(self) -> None:
        study = self.study
        while True:
            optuna.storages.fail_stale_trials(study)
            states = {trial.state for trial in study.get_trials(deepcopy=False)}
            if TrialState.WAITING in states:
                trial = study.ask()
                study._storage.record_heartbeat(trial._trial_id)  # the thread's first one comes a moment later
                with (
                    get_heartbeat_thread(trial._trial_id, study._storage),
                    contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError),  # it was slow, and taken for dead
                ):
                    place = trial.user_attrs.get("place")  # none, if another worker took the last one that was waiting
                    others = study.get_trials(deepcopy=False)[: trial.number]
                    if place in (None, *(t.user_attrs.get("place") for t in others if t.state != TrialState.FAIL)):
                        study.tell(trial, state=TrialState.FAIL)  # the same plan, by two machines at the same moment
                    else:
                        self.train(trial)
            elif TrialState.RUNNING in states:
                time.sleep(0.5)
            else:
                break

    def train(self, trial: optuna.Trial) -> None:
        """Run one trial, in a folder of its own, and tell the study what came of it."""
        study, place, started = self.study, trial.user_attrs["place"], time.perf_counter()
        trial.set_user_attr("worker", self.id)
        # Trials of a plan are not drawn; those of Bayes's method must not be drawn alike by two workers.
        study.sampler = optuna.samplers.TPESampler(seed=self.base.seed * 1_000_003 + place)
        params = {name: trial._suggest(name, values) for name, values in self.space.items()}
        settings, label = trial_settings(self.base, params), f"{study.study_name}-{trial.number:03d}"
        folder, validations = Run(self.run.sweep / study.study_name / f"trial-{trial.number:03d}"), itertools.count(1)

        def report(row: dict) -> None:
            tracker.log(row)
            if "validation_loss" in row:
                trial.report(row["validation_loss"], next(validations))
                if trial.should_prune():
                    raise Stopped

        state, value, what = TrialState.FAIL, None, "interrupted"
        try:
            facts = settings.to_dict() | {"corpus": self.prepared.corpus["name"]}
            with Tracker(self.tracking, folder.folder, facts, label, study.study_name) as tracker:
                loss = train_trial(folder, self.prepared, settings, self.device, report)
            state, value, what = TrialState.COMPLETE, loss, f"{LOSS} {loss:.3f}"
        except Stopped:
            state, what = TrialState.PRUNED, "stopped early"
        except OWN_FAILURES as error:
            what = f"failed ({error})"
            trial.set_user_attr("error", str(error))
        except optuna.exceptions.UpdateFinishedTrialError:
            what = "taken over by another worker"
            raise
        except BaseException:  # no result of these settings: their place in the plan is free again
            study.enqueue_trial(params, user_attrs={"place": place})
            raise
        finally:
            print(f"trial {trial.number}: {what} with {params}", flush=True)
            trial.set_user_attr("seconds", round(time.perf_counter() - started, 2))
            study.tell(trial, value, state, skip_if_finished=True)


def trial_settings(base: Settings, params: dict) -> Settings:
    """The starting point with a trial's parameters. `updates` and `validate_every` are meant for the starting point's
    `batch_size`; a trial with another one makes so many more or fewer that all see equally many examples."""
    settings = base.change(**params)
    budget = {name: getattr(settings, name) * base.batch_size for name in ("updates", "validate_every")}
    return settings.change(**{name: -(-examples // settings.batch_size) for name, examples in budget.items()})


def train_trial(run: Run, prepared: Prepared, settings: Settings, device: torch.device, callback: Callable) -> float:
    """Train from the start and return the best validation loss, teacher-forced whatever the trial trains with."""
    run.checkpoint.unlink(missing_ok=True)  # of one that was interrupted
    try:
        fit(run, prepared, settings, device, callback, progress_bar=False)
    finally:
        run.checkpoint.unlink(missing_ok=True)  # sixty would fill a disk; the best settings are trained again
    return run.facts()["progress"]["best_loss"]


def trial_table(study: optuna.Study) -> pd.DataFrame:
    """One row per trial: number, settings, loss, seconds, worker, state; the best first.
    Raises UserError if none has finished."""
    trials = [trial for trial in study.trials if "worker" in trial.user_attrs]
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        raise UserError("No trial of this sweep has finished; look at the messages above for the reason.")
    rows = [
        {"trial": trial.number, **trial.params,
         LOSS: trial.value if trial.state == TrialState.COMPLETE else None,  # not the final one where it was stopped
         "seconds": trial.user_attrs.get("seconds"), "worker": trial.user_attrs.get("worker"),
         "state": trial.state.name.lower()} for trial in trials
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({LOSS: float}).sort_values(LOSS, ignore_index=True)


def best_settings(study: optuna.Study) -> Settings:
    """The sweep's starting point with the parameters of its best trial."""
    trial_table(study)  # says so if there is none
    return trial_settings(Settings(**study.user_attrs["base"]), study.best_trial.params)
