"""What a sweep's trials say: which parameters moved the loss, by several measures, and how sure that is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import optuna
import pandas as pd
import torch
from scipy import stats
from sklearn.ensemble import RandomForestRegressor

from helpers import plots
from helpers.batches import Prepared
from helpers.run import Run, machine, write_json, write_text
from helpers.settings import Settings
from helpers.sweep import LOSS, best_settings, seeds_table, space_of, trial_table
from helpers.training import evaluate, new_model

FEWEST = 5  # trials with one value, below which resampling them tells nothing


def importance(table: pd.DataFrame, spec: dict, seed: int = 0) -> pd.DataFrame:
    """How much each parameter that varies moved the loss, by four measures; rows by falling fANOVA.

    `fANOVA` and `PED-ANOVA` are Optuna's (Hutter et al., ICML 2014; arXiv:2304.10255). `forest` and `correlation` are
    what W&B's importance panel shows: how much the splits of a random forest's trees on the parameter gain, and the
    linear correlation with the loss. A setting in words is one column a word: their importances are summed, and the
    correlation is the last word's.
    """
    table = table.dropna(subset=[LOSS])
    space = _varying(table, spec)
    inputs = pd.get_dummies(table[list(space)], prefix_sep="=").astype(float)
    owner = [column.partition("=")[0] for column in inputs]
    forest = RandomForestRegressor(100, random_state=seed).fit(inputs, table[LOSS])
    shares = {
        "fANOVA": _shares(table, space, optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=seed)),
        "PED-ANOVA": _shares(table, space, optuna.importance.PedAnovaImportanceEvaluator()),
        "forest": pd.Series(forest.feature_importances_).groupby(owner).sum(),
        "correlation": pd.Series(inputs.corrwith(table[LOSS]).to_numpy()).groupby(owner).last(),
    }
    return pd.DataFrame(shares).sort_values("fANOVA", ascending=False)


def _varying(table: pd.DataFrame, spec: dict) -> dict[str, optuna.distributions.BaseDistribution]:
    return {name: d for name, d in space_of(spec).items() if table[name].nunique() > 1}


def _shares(table: pd.DataFrame, space: dict, measure) -> dict[str, float]:
    study = optuna.create_study()
    for row in table[[*space, LOSS]].to_dict("records"):
        value = row.pop(LOSS)
        study.add_trial(optuna.create_trial(params=row, distributions=space, value=value))
    try:
        return optuna.importance.get_param_importances(study, evaluator=measure)
    except RuntimeError:  # of fANOVA, where no split tells the trials apart: nothing has a share
        return dict.fromkeys(space, 0.0)


def importance_intervals(table: pd.DataFrame, spec: dict, draws: int) -> pd.DataFrame:
    """The 5th and 95th percentile of fANOVA's shares when the trials are drawn again with replacement."""
    table, shares = table.dropna(subset=[LOSS]), []
    for draw in range(draws):
        again = table.sample(frac=1, replace=True, random_state=draw)
        measure = optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=draw)
        shares.append(_shares(again, _varying(again, spec), measure))
    return pd.DataFrame(shares).fillna(0).quantile([0.05, 0.95]).T.set_axis(["low", "high"], axis=1)


def effects(table: pd.DataFrame, parameters: list[str]) -> pd.DataFrame:
    """For each parameter its best and worst value, by how much their mean losses differ, and how sure that is.

    `n` is how many trials had the rarer of the two values. `low` and `high` bound the difference in 95% of draws of the
    trials with replacement, and are missing where `n` is below 5, since so few draws are too much alike. `p` is the
    share of shufflings of the losses that set the means of all values as far apart as they are: a parameter without
    any effect comes out below 0.05 once in twenty. The two values were picked for being apart, so the difference and
    its bounds err on the large side, which `p` does not. Numbers from a range count by thirds.
    """
    table, rows = table.dropna(subset=[LOSS]), []
    for name in parameters:
        grouped = table[LOSS].groupby(plots.in_thirds(table[name]), observed=True)
        groups = {value: losses for value, losses in grouped if len(losses) > 1}
        if len(groups) < 2:
            continue
        best, worst = (pick(groups, key=lambda value: groups[value].mean()) for pick in (min, max))
        pair = (groups[worst].to_numpy(), groups[best].to_numpy())
        bounds, fewest = (math.nan, math.nan), min(map(len, pair))
        if fewest >= FEWEST:
            bounds = stats.bootstrap(pair, _difference, method="percentile", random_state=0).confidence_interval
        shuffled = stats.permutation_test(
            [losses.to_numpy() for losses in groups.values()], _between, alternative="greater", random_state=0,
            n_resamples=9999,
        )  # fmt: skip
        rows.append({
            "parameter": name, "best": str(best), "worst": str(worst), "n": fewest,
            "difference": _difference(*pair), "low": bounds[0], "high": bounds[1], "p": shuffled.pvalue,
        })  # fmt: skip
    return pd.DataFrame(rows)


def zeroed_clip(table: pd.DataFrame, untrained: float) -> pd.DataFrame:
    """The table as it were if clip=0 were handed to `clip_grad_norm_`: every gradient 0, and a model that stays
    untrained, whose validation loss is given."""
    return table.assign(**{LOSS: table[LOSS].mask(table["clip"] == 0, untrained)})


def report(study: optuna.Study, run: Run, target: Path, seeds: int, device: torch.device) -> None:
    """Write what a sweep showed: all trials to TARGET.csv, and to TARGET.json the rest.

    That is importance by all measures, for all trials and for those of the best trial's optimiser, where trials that
    ended at the very same loss (a clip that never acted leaves such copies) count once; what clip=0 taken literally
    would have made of it; and the best settings against the starting point at equal updates.
    """
    table, spec, base = trial_table(study), study.user_attrs["spec"], Settings(**study.user_attrs["base"])
    prepared = Prepared.load(run.sweep / study.study_name / "data.pt")
    choices = {"starting point": base, "best of the sweep": best_settings(study)}
    validation = prepared.splits["validation"].to(device)
    untrained = evaluate(new_model(base, len(prepared.vocabulary)).to(device), validation).per_token
    kind = study.best_trial.params.get("optimizer")
    alone = table[table["optimizer"] == kind].drop_duplicates(LOSS) if kind else table[:0]
    parts = {"all trials": table} | ({f"{kind} alone": alone} if len(alone) >= 10 else {})
    overhead = table["seconds"] - table["updating"]
    told = {
        "sweep": study.study_name, "spec": spec, "starting point": base.to_dict(), "corpus": prepared.corpus,
        "states": table["state"].value_counts().to_dict(), "workers": table["worker"].nunique(),
        "best": study.best_trial.params,
        "seconds a trial": {"median": table["seconds"].median(), "longest": table["seconds"].max()},
        "of which outside updates": {"median": overhead.median(), "longest": overhead.max()},
        "importance": {name: _records(importance(part, spec)) for name, part in parts.items()},
        "fANOVA interval": {name: _records(importance_intervals(part, spec, 50)) for name, part in parts.items()},
        "effects": {name: _records(effects(part, list(spec["parameters"]))) for name, part in parts.items()},
        "untrained loss": untrained,
        "seeds": _records(seeds_table(run, prepared, choices, seeds, device)),
        "machine": machine(device),
    }  # fmt: skip
    if "clip" in table and (table["clip"] == 0).any():
        told["importance if clip=0 froze the model"] = _records(importance(zeroed_clip(table, untrained), spec))
    write_text(target.with_suffix(".csv"), table.to_csv(index=False))
    write_json(target.with_suffix(".json"), told)


def _records(table: pd.DataFrame) -> list[dict]:
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index(names="parameter")
    return json.loads(table.to_json(orient="records", double_precision=6))


def _difference(a, b, axis=-1):
    return a.mean(axis=axis) - b.mean(axis=axis)


def _between(*groups, axis=-1):
    """Σ n·mean², which for a fixed total orders shufflings as the F statistic does."""
    return sum(group.shape[axis] * group.mean(axis=axis) ** 2 for group in groups)
