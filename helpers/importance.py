"""What a sweep's trials say: which parameters moved the loss, by several measures, and how sure that is."""

import math

import optuna
import pandas as pd
from scipy import stats
from sklearn.ensemble import RandomForestRegressor

from helpers.sweep import LOSS, space_of


def importance(table: pd.DataFrame, spec: dict, seed: int = 0) -> pd.DataFrame:
    """How much each parameter that varies moved the loss, by four measures; rows by falling fANOVA.
    `fANOVA` and `PED-ANOVA` are Optuna's (Hutter et al., ICML 2014; arXiv:2304.10255).
    `forest` and `correlation` are what W&B's importance panel shows: how much the splits of a random forest's trees on
    the parameter gain, and the linear correlation with the loss.
    A setting in words is one column a word: their importances are summed, and the correlation is the last word's."""
    table = table.dropna(subset=[LOSS])
    space = {name: values for name, values in space_of(spec).items() if table[name].nunique() > 1}
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


def _shares(table: pd.DataFrame, space: dict, measure) -> dict[str, float]:
    space = {name: values for name, values in space.items() if table[name].nunique() > 1}
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
        shares.append(_shares(again, space_of(spec), measure))
    return pd.DataFrame(shares).fillna(0).quantile([0.05, 0.95]).T.set_axis(["low", "high"], axis=1)


def losses_by_value(table: pd.DataFrame, parameter: str) -> dict[str, pd.Series]:
    """The losses of the trials that had each value of a parameter; more than five different numbers count by thirds."""
    table = table.dropna(subset=[LOSS])
    values = table[parameter]
    if values.nunique() > 5 and pd.api.types.is_numeric_dtype(values):
        thirds = pd.qcut(values, 3, labels=False, duplicates="drop")
        names = values.groupby(thirds).agg(lambda third: f"{third.min():.3g} to {third.max():.3g}")
        values = thirds.map(names).astype(pd.CategoricalDtype(list(dict.fromkeys(names)), ordered=True))
    return {str(value): losses for value, losses in table[LOSS].groupby(values, observed=True)}


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
            bounds = stats.bootstrap(pair, _difference, method="percentile", random_state=0).confidence_interval
        shuffled = stats.permutation_test(
            [losses.to_numpy() for losses in groups.values()], _between, alternative="greater", random_state=0,
            n_resamples=9999,
        )  # fmt: skip
        rows.append({
            "parameter": name, "best": best, "worst": worst, "n": fewest,
            "difference": _difference(*pair), "low": bounds[0], "high": bounds[1], "p": shuffled.pvalue,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _difference(a, b, axis=-1):
    return a.mean(axis=axis) - b.mean(axis=axis)


def _between(*groups, axis=-1):
    """Σ n·mean², which for a fixed total orders shufflings as the F statistic does."""
    return sum(group.shape[axis] * group.mean(axis=axis) ** 2 for group in groups)
