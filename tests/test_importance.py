import itertools

import numpy as np
import pandas as pd

from benchmarks.sweep_report import effects, importance_intervals, losses_by_value
from helpers.importance import importance
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


def test_thirds_are_named_by_the_numbers_in_them():
    rates = [1e-4, 2e-4, 3e-4, 4e-4, 5e-3, 6e-3, 7e-3, 8e-3, 2e-2]
    trials = pd.DataFrame({"x": rates, "k": list("abcdefghi"), "few": [1, 2, 3] * 3, "validation loss": range(9)})
    thirds = losses_by_value(trials.sample(frac=1, random_state=0), "x")
    assert list(thirds) == ["0.0001 to 0.0003", "0.0004 to 0.006", "0.007 to 0.02"]
    assert [sorted(losses) for losses in thirds.values()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert list(losses_by_value(trials, "k")) == list("abcdefghi")  # words are no range
    assert {value: list(losses) for value, losses in losses_by_value(trials, "few").items()} == {
        "1": [0, 3, 6], "2": [1, 4, 7], "3": [2, 5, 8],
    }  # fmt: skip
    skewed = pd.DataFrame({"x": [0.1] * 20 + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "validation loss": range(26)})
    parts = losses_by_value(skewed, "x")
    assert len(parts) <= 2
    assert sum(map(len, parts.values())) == 26
    unfinished = pd.concat([trials, trials.tail(1).assign(**{"validation loss": np.nan, "few": 9})])
    assert losses_by_value(unfinished, "few").keys() == {"1", "2", "3"}


def test_a_range_counts_by_terciles():
    trials = table().assign(dropout=np.linspace(0, 0.5, 60))
    trials["validation loss"] = trials["dropout"]
    told = effects(trials, ["dropout"]).iloc[0]
    assert told["p"] < 0.01
    assert 0.2 < told["difference"] < 0.5


def test_clip_0_taken_literally_makes_clip_look_decisive():
    trials = table()
    assert importance(trials, SPEC)["fANOVA"]["clip"] < 0.1
    untrained = trials["validation loss"].mask(trials["clip"] == 0, 12.0)  # every gradient 0: nothing is learnt
    frozen = importance(trials.assign(**{"validation loss": untrained}), SPEC)["fANOVA"]
    assert frozen.idxmax() == "clip"
