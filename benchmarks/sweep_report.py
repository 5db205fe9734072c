"""What a sweep's trials say, as files: all trials as CSV and the rest as JSON, for notebook 05 and docs/results.md.

python -m benchmarks.sweep_report ID --run runs/sweep --results results/sweep-excerpt
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import torch
import yaml
from scipy import stats

from benchmarks.results import without_place
from helpers import plots
from helpers.batches import Prepared
from helpers.evaluation import evaluate
from helpers.importance import importance, shares_of
from helpers.model import new_model
from helpers.run import Run, choose_device, machine, write_json, write_text
from helpers.settings import Settings, command_line, parse_changes
from helpers.sweep import LOSS, best_settings, open_study, space_of, train_trial, trial_settings, trial_table
from helpers.training import fit


def losses_by_value(table: pd.DataFrame, parameter: str) -> dict[str, pd.Series]:
    """The losses of the trials that had each value of a parameter; more than five different numbers count by thirds."""
    table = table.dropna(subset=[LOSS])
    values = table[parameter]
    if values.nunique() > 5 and pd.api.types.is_numeric_dtype(values):
        thirds = pd.qcut(values, 3, labels=False, duplicates="drop")
        names = values.groupby(thirds).agg(lambda third: f"{third.min():.3g} to {third.max():.3g}")
        values = thirds.map(names).astype(pd.CategoricalDtype(list(dict.fromkeys(names)), ordered=True))
    return {str(value): losses for value, losses in table[LOSS].groupby(values, observed=True)}


def panels_by_value(groups: dict[str, dict[str, pd.Series]]) -> plt.Figure:
    """One panel per parameter: the loss of every trial at the value it had, and a bar at the value's mean."""
    figure, panels = plt.subplots(1, len(groups), figsize=(0.6 + 1.6 * len(groups), 3.6), sharey=True, squeeze=False)
    for axes, (name, by_value) in zip(panels[0], groups.items(), strict=True):
        for place, losses in enumerate(by_value.values()):
            # Side by side in an order by chance: sorted ones would look like a trend.
            losses = np.random.default_rng(0).permutation(losses)
            spread = np.linspace(-0.2, 0.2, len(losses)) if len(losses) > 1 else 0
            axes.plot(place + spread, losses, "o", color=plots.BLUE, markersize=5, alpha=0.6)
            axes.hlines(losses.mean(), place - 0.35, place + 0.35, color=plots.RED, linewidth=2)
        axes.set_xticks(range(len(by_value)), list(by_value), rotation=60)
        axes.set_xlabel(name.replace("_", "\n"))
    panels[0][0].set_ylabel("validation loss")
    return figure


def seeds_table(
    run: Run, prepared: Prepared, choices: dict[str, Settings], seeds: int, device: torch.device
) -> pd.DataFrame:
    """The validation loss of several settings at equal updates, each trained with `seeds` seeds that none of them has:
    with the sweep's own, the best trial would only show once more what it was picked for."""
    rows, first = [], max(settings.seed for settings in choices.values()) + 1
    for seed, (name, settings) in itertools.product(range(first, first + seeds), choices.items()):
        folder = Run(run.sweep / "seeds" / f"{name.replace(' ', '-')}-{seed}")
        loss = train_trial(folder, prepared, settings.change(seed=seed), device, lambda row: None)
        rows.append({"settings": name, "seed": seed, "updates": settings.updates, LOSS: loss})
    return pd.DataFrame(rows)


def on_held_out(run: Run, prepared: Prepared, settings: Settings, device: torch.device) -> dict[str, float]:
    """The loss of settings on validation, which picked them, and on test, which nothing was picked by."""
    folder = Run(run.sweep / "seeds" / "held-out")
    model = fit(folder, prepared, settings, device, resume=False, progress_bar=False)
    return {name: evaluate(model, prepared.splits[name].to(device)).per_token for name in ("validation", "test")}


def importance_intervals(table: pd.DataFrame, spec: dict, draws: int) -> pd.DataFrame:
    """The 5th and 95th percentile of fANOVA's shares when the trials are drawn again with replacement."""
    table, shares = table.dropna(subset=[LOSS]), []
    for draw in range(draws):
        again = table.sample(frac=1, replace=True, random_state=draw)
        measure = optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=draw)
        shares.append(shares_of(again, space_of(spec), measure))
    return pd.DataFrame(shares).fillna(0).quantile([0.05, 0.95]).T.set_axis(["low", "high"], axis=1)


def effects(table: pd.DataFrame, parameters: list[str]) -> pd.DataFrame:
    """For each parameter its best and worst value, by how much their mean losses differ, and how sure that is.
    `n` is how many trials had the rarer of the two values. `low` and `high` bound the difference in 95% of draws of the
    trials with replacement, and are missing where `n` is below 5, since so few draws are too much alike. `p` is the
    share of shufflings of the losses that set the means of all values as far apart as they are: a parameter without any
    effect comes out below 0.05 once in twenty. The two values were picked for being apart, so the difference and its
    bounds err on the large side, which `p` does not. Numbers from a range count by thirds."""
    table, rows = table.dropna(subset=[LOSS]), []
    for name in parameters:
        groups = {value: losses for value, losses in losses_by_value(table, name).items() if len(losses) > 1}
        if len(groups) < 2:
            continue
        best, worst = (pick(groups, key=lambda value: groups[value].mean()) for pick in (min, max))
        pair = (groups[worst].to_numpy(), groups[best].to_numpy())
        bounds, fewest = (math.nan, math.nan), min(map(len, pair))
        if fewest >= 5:  # resampling fewer tells nothing
            apart = lambda a, b, axis: a.mean(axis) - b.mean(axis)  # noqa: E731
            bounds = stats.bootstrap(pair, apart, method="percentile", random_state=0).confidence_interval
        losses = [losses.to_numpy() for losses in groups.values()]
        shuffled = stats.permutation_test(losses, _between, alternative="greater", random_state=0, n_resamples=9999)
        rows.append({
            "parameter": name, "best": best, "worst": worst, "n": fewest,
            "difference": pair[0].mean() - pair[1].mean(), "low": bounds[0], "high": bounds[1], "p": shuffled.pvalue,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _between(*groups, axis=-1):
    """Σ n·mean², which for a fixed total orders shufflings as the F statistic does."""
    return sum(group.shape[axis] * group.mean(axis=axis) ** 2 for group in groups)


def report(study: optuna.Study, run: Run, target: Path, seeds: int, but: dict, device: torch.device) -> None:
    """Write what a sweep showed: all trials to TARGET.csv, and to TARGET.json the rest.

    That is importance by all measures, for all trials and for those of the best trial's optimiser, where trials that
    ended at the very same loss (a clip that never acted leaves such copies) count once; what clip=0 taken literally
    would have made of it; the best settings against the starting point and against themselves with each value of `but`
    in its turn, at equal budgets; and once on held-out data.
    """
    table, spec, base = trial_table(study), study.user_attrs["spec"], Settings(**study.user_attrs["base"])
    prepared = Prepared.load(run.sweep / study.study_name / "data.pt")
    fixed = {name: given["value"] for name, given in spec["parameters"].items() if "value" in given}
    choices = {"starting point": trial_settings(base, fixed), "best of the sweep": best_settings(study)}
    for name, value in but.items():
        choices[f"best, but {name} {value}"] = trial_settings(base, study.best_trial.params | {name: value})
    validation = prepared.splits["validation"].to(device)
    untrained = evaluate(new_model(base, len(prepared.vocabulary)).to(device), validation).per_token
    kind = study.best_trial.params.get("optimizer")
    alone = table[table["optimizer"] == kind].drop_duplicates(LOSS) if kind else table[:0]
    parts = {"all trials": table} | ({f"{kind} alone": alone} if len(alone) >= 10 else {})
    found = {
        "sweep": study.study_name, "spec": spec, "corpus": without_place(prepared.corpus),
        "starting point": choices["starting point"].to_dict(),
        "states": table["state"].value_counts().to_dict(), "workers": table["worker"].nunique(),
        "best": study.best_trial.params,
        "seconds a trial": {"median": table["seconds"].median(), "longest": table["seconds"].max()},
        "importance": {name: _records(importance(part, spec)) for name, part in parts.items()},
        "fANOVA interval": {name: _records(importance_intervals(part, spec, 50)) for name, part in parts.items()},
        "effects": {name: _records(effects(part, list(spec["parameters"]))) for name, part in parts.items()},
        "untrained loss": untrained,
        "seeds": _records(seeds_table(run, prepared, choices, seeds, device)),
        "held out": on_held_out(run, prepared, choices["best of the sweep"], device),
        "machine": machine(device),
    }  # fmt: skip
    if "clip" in table and (table["clip"] == 0).any():
        # As if 0 were handed to `clip_grad_norm_`: every gradient 0, and a model that stays untrained.
        frozen = table.assign(**{LOSS: table[LOSS].mask(table["clip"] == 0, untrained)})
        found["importance if clip=0 froze the model"] = _records(importance(frozen, spec))
    write_text(target.with_suffix(".csv"), table.to_csv(index=False))
    write_json(target.with_suffix(".json"), found)


def _records(table: pd.DataFrame) -> list[dict]:
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index(names="parameter")
    return json.loads(table.to_json(orient="records", double_precision=6))


def write_profile(path: Path, study: optuna.Study) -> None:
    """The best settings as a profile, to train with `--profile PATH`."""
    settings, best = best_settings(study), study.best_trial
    head = f"{len(trial_table(study))} trials of sweep {study.study_name}: trial {best.number}"
    write_settings(path, settings, best.params, f"{head}, {LOSS} {best.value:.4f}")


def write_settings(path: Path, best: Settings, chosen: Iterable[str], what: str) -> None:
    """A profile of what is `chosen` or no default, with a word of what it is the best of."""
    settings, defaults = best.to_dict(), Settings().to_dict()
    settings = {name: value for name, value in settings.items() if name in chosen or value != defaults[name]}
    write_text(path, f"# The best of {what}.\n{yaml.safe_dump(settings, sort_keys=False)}")


@command_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="the sweep's id")
    parser.add_argument("--run", type=Path, required=True, help="the folder of its run")
    parser.add_argument("--results", type=Path, required=True, metavar="PATH", help="write PATH.json and PATH.csv")
    parser.add_argument("--storage", default="", help="a database's URL, if it is not in the run's folder")
    parser.add_argument("--seeds", type=int, default=3, help="of the comparison with the starting point")
    parser.add_argument(
        "--but", nargs="+", default=[], metavar="NAME=VALUE", help="values in the place of the best ones, in turn"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    study = open_study(Run(options.run), options.sweep, options.storage)
    but = parse_changes(options.but)
    report(study, Run(options.run), options.results, options.seeds, but, choose_device(options.device))


if __name__ == "__main__":
    sys.exit(main())
