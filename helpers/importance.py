"""What a sweep's trials say: which parameters moved the loss, by several measures."""

import optuna
import pandas as pd
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
        "fANOVA": shares_of(table, space, optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=seed)),
        "PED-ANOVA": shares_of(table, space, optuna.importance.PedAnovaImportanceEvaluator()),
        "forest": pd.Series(forest.feature_importances_).groupby(owner).sum(),
        "correlation": pd.Series(inputs.corrwith(table[LOSS]).to_numpy()).groupby(owner).last(),
    }
    return pd.DataFrame(shares).sort_values("fANOVA", ascending=False)


def shares_of(table: pd.DataFrame, space: dict, measure) -> dict[str, float]:
    """One of Optuna's measures for the parameters of `space` that vary in these trials."""
    space = {name: values for name, values in space.items() if table[name].nunique() > 1}
    study = optuna.create_study()
    for row in table[[*space, LOSS]].to_dict("records"):
        value = row.pop(LOSS)
        study.add_trial(optuna.create_trial(params=row, distributions=space, value=value))
    try:
        return optuna.importance.get_param_importances(study, evaluator=measure)
    except RuntimeError:  # of fANOVA, where no split tells the trials apart: nothing has a share
        return dict.fromkeys(space, 0.0)
