import itertools

import numpy as np
import pandas as pd

from helpers.importance import effects, importance, importance_intervals, zeroed_clip
from helpers.run import ROOT
from helpers.sweep import read_sweep

SPEC = read_sweep(ROOT / "notebooks" / "sweep.yaml")


def table(count=60, seed=0):
    """Trials whose loss is known: the optimiser moves it by 3, the rate by 1 in all, the others not at all."""
    space = {name: parameter["values"] for name, parameter in SPEC["parameters"].items()}
    random = np.random.default_rng(seed)
    chosen = random.permutation(list(itertools.product(*space.values())))[:count]
    trials = pd.DataFrame(chosen, columns=list(space))
    for name in set(space) - {"optimizer"}:
        trials[name] = trials[name].astype(float)
    rate = np.log10(trials["learning_rate"] / 1e-3)
    trials["validation loss"] = 4 + 3.0 * (trials["optimizer"] == "sgd") - rate + random.normal(0, 0.05, count)
    return trials


def test_every_measure_but_ped_anova_ranks_what_moved_the_loss_first():
    shares = importance(table(), SPEC)
    for measure in ("fANOVA", "forest"):
        assert list(shares[measure].sort_values(ascending=False).index[:2]) == ["optimizer", "learning_rate"]
        assert abs(shares[measure].sum() - 1) < 1e-6
    assert shares["correlation"]["optimizer"] > 0.7  # sgd, the last word, has the higher loss
    assert shares["correlation"]["learning_rate"] < 0
    assert set(shares.index) == set(SPEC["parameters"])


def test_a_parameter_that_did_not_vary_is_left_out():
    trials = table()
    shares = importance(trials[trials["optimizer"] == "adam"], SPEC)
    assert "optimizer" not in shares.index
    assert shares["fANOVA"].idxmax() == "learning_rate"


def test_intervals_hold_the_share_and_are_narrow_for_a_clear_case():
    trials = table()
    interval = importance_intervals(trials, SPEC, 8)
    low, high = interval.loc["optimizer"]
    assert 0.5 < low <= high <= 1


def test_effects_are_sure_of_what_is_there_and_not_of_what_is_not():
    told = effects(table(), list(SPEC["parameters"])).set_index("parameter")
    assert told.loc["optimizer", "p"] < 0.01
    assert told.loc["optimizer", "best"] == "adam"
    assert 2 < told.loc["optimizer", "low"] < told.loc["optimizer", "high"] < 4
    assert told.loc["clip", "p"] > 0.05
    assert told.loc["clip", "low"] < told.loc["clip", "difference"] < told.loc["clip", "high"]


def test_too_few_trials_have_no_bounds():
    trials = table()
    few = pd.concat([trials[trials["clip"] == 25][:4], trials[trials["clip"] == 50]])
    told = effects(few, ["clip", "optimizer"]).set_index("parameter")
    assert told.loc["clip", "n"] == 4
    assert np.isnan(told.loc["clip", ["low", "high"]].astype(float)).all()
    assert 0 < told.loc["clip", "p"] <= 1
    assert told.loc["optimizer", "n"] >= 5
    assert told.loc["optimizer", "low"] < told.loc["optimizer", "high"]


def test_a_range_counts_by_terciles():
    trials = table().assign(dropout=np.linspace(0, 0.5, 60))
    trials["validation loss"] = trials["dropout"]
    told = effects(trials, ["dropout"]).iloc[0]
    assert told["p"] < 0.01
    assert 0.2 < told["difference"] < 0.5


def test_clip_0_taken_literally_makes_clip_look_decisive():
    trials = table()
    assert importance(trials, SPEC)["fANOVA"]["clip"] < 0.1
    frozen = importance(zeroed_clip(trials, 12.0), SPEC)["fANOVA"]
    assert frozen.idxmax() == "clip"
