"""Hyperparameter sweeps: the W&B file `sweep.yaml`, run here without an account by Optuna."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pandas as pd
import yaml

from helpers.batches import Prepared
from helpers.run import Run, shown
from helpers.settings import NAMES, Settings, UserError
from helpers.tracking import Tracker
from helpers.training import fit, read_metrics

METHODS = ("random", "grid", "bayes")
DISTRIBUTIONS = ("uniform", "log_uniform_values", "int_uniform", "categorical", "constant")


def read_sweep(path: Path) -> dict:
    """A W&B sweep file, checked: method, metric, and parameters that the settings have. Raises UserError."""
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"The sweep file {shown(path)} cannot be read: {error}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("parameters"), dict):
        raise UserError(f"{shown(path)} must hold 'method', 'metric' and 'parameters', as a W&B sweep does.")
    if spec.get("method") not in METHODS:
        raise UserError(f"{shown(path)}: method {spec.get('method')!r} is not one of {', '.join(METHODS)}.")
    if (spec.get("metric") or {}).get("name") != "validation_loss":
        raise UserError(f"{shown(path)}: the metric must be validation_loss, which is what every trial logs.")
    for name, parameter in spec["parameters"].items():
        if name not in NAMES:
            raise UserError(f"{shown(path)}: parameter {name!r} is not a setting. There are: {', '.join(NAMES)}.")
        distribution(name, parameter)
    return spec


def distribution(name: str, parameter: dict) -> optuna.distributions.BaseDistribution:
    """A parameter of the file as Optuna's distribution. Raises UserError for one that can't be served here."""
    low, high = parameter.get("min"), parameter.get("max")
    if "value" in parameter:
        return optuna.distributions.CategoricalDistribution([parameter["value"]])
    if "values" in parameter:
        return optuna.distributions.CategoricalDistribution(parameter["values"])
    kind = parameter.get("distribution", "int_uniform" if isinstance(low, int) else "uniform")
    try:
        if kind == "int_uniform":
            return optuna.distributions.IntDistribution(low, high)
        if kind in ("uniform", "log_uniform_values"):
            return optuna.distributions.FloatDistribution(low, high, log=kind == "log_uniform_values")
    except (TypeError, ValueError) as error:
        raise UserError(f"Sweep parameter {name}: min {low!r} and max {high!r} do not fit ({error}).") from None
    raise UserError(f"Sweep parameter {name}: distribution {kind!r} is not one of {', '.join(DISTRIBUTIONS)}.")


def run_sweep(
    run: Run, prepared: Prepared, base: Settings, spec: dict, trials: int, tracking: str = "offline", show=print
) -> optuna.Study:
    """Run trials until there are `trials` of them; those of an earlier call count, so a sweep goes on where it stopped.

    Each trial trains from the prepared data in a folder of its own, inside a W&B run grouped under the sweep's name.
    A trial whose loss is not finite is recorded as failed and the sweep goes on.
    """
    run.sweep.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(run.sweep / "journal.log")))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = spec.get("name", "sweep")
    study = optuna.create_study(study_name=name, storage=storage, direction="minimize", load_if_exists=True)
    space = {name: distribution(name, parameter) for name, parameter in spec["parameters"].items()}
    if spec["method"] == "grid" and not study.trials:
        choices = [space[name].choices for name in space]
        for values in itertools.product(*choices):
            study.enqueue_trial(dict(zip(space, values, strict=True)))
    while sum(trial.state.is_finished() for trial in study.trials) < trials:
        number = len(study.trials)
        kind = optuna.samplers.TPESampler if spec["method"] == "bayes" else optuna.samplers.RandomSampler
        study.sampler = kind(seed=base.seed * 1000 + number)
        trial = study.ask(space)
        started = time.perf_counter()
        try:
            loss = _train_trial(run, prepared, base.change(**trial.params), name, trial.number, tracking)
        except UserError as error:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            show(f"trial {trial.number}: failed: {error}")
        else:
            trial.set_user_attr("seconds", round(time.perf_counter() - started, 2))
            study.tell(trial, loss)
            show(f"trial {trial.number}: validation loss {loss:.3f} with {trial.params}")
    return study


def _train_trial(run: Run, prepared: Prepared, settings: Settings, name: str, number: int, tracking: str) -> float:
    import torch

    folder = Run(run.sweep / f"trial-{number:03d}")
    label = f"{name}-{number:03d}"
    with Tracker(tracking, folder.folder, settings.to_dict(), name=label, group=name) as tracker:
        fit(folder, prepared, settings, torch.device("cpu"), tracker, progress_bar=False)
    return min(row["validation_loss"] for row in read_metrics(folder) if "validation_loss" in row)


def trial_table(study: optuna.Study) -> pd.DataFrame:
    """One row a finished trial: its parameters and validation loss, the best first."""
    rows = [
        {"trial": trial.number, **trial.params, "validation loss": trial.value}
        for trial in study.trials
        if trial.state == optuna.trial.TrialState.COMPLETE
    ]
    if not rows:
        raise UserError("No trial of this sweep has finished; look at the messages above for the reason.")
    return pd.DataFrame(rows).sort_values("validation loss", ignore_index=True)


def importance(study: optuna.Study, evaluator: Callable | None = None) -> dict[str, float]:
    """The share of each parameter in the variation of the loss, by PED-ANOVA unless told otherwise."""
    evaluator = evaluator or optuna.importance.PedAnovaImportanceEvaluator()
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
