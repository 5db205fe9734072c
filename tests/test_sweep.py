import pytest

from helpers.run import ROOT, Run
from helpers.settings import Settings, UserError
from helpers.sweep import importance, read_sweep, run_sweep, trial_table
from tests.conftest import TINY

HEAD = "method: random\nmetric: {name: validation_loss, goal: minimize}\nparameters:\n"


def spec_of(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read_sweep(path)


def test_the_series_own_file_is_valid_and_has_the_classic_space():
    spec = read_sweep(ROOT / "notebooks" / "sweep.yaml")
    values = {name: parameter["values"] for name, parameter in spec["parameters"].items()}
    assert values == {
        "learning_rate": [1e-4, 2.5e-4, 5e-4, 1e-3],
        "optimizer": ["adam", "sgd"],
        "clip": [0, 25, 50, 100],
        "teacher_forcing_ratio": [0, 0.5, 1],
        "decoder_learning_ratio": [1, 3, 5, 10],
    }
    for name, choices in values.items():
        for value in choices:
            Settings().change(**{name: value})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "parameters"),
        ("a: [", "cannot be read"),
        (HEAD.replace("random", "magic") + "  clip: {values: [1]}", "magic"),
        (HEAD.replace("validation_loss", "accuracy") + "  clip: {values: [1]}", "validation_loss"),
        (HEAD + "  clipp: {values: [1]}", "clipp"),
        (HEAD + "  dropout: {distribution: normal, mu: 0, sigma: 1}", "normal"),
        (HEAD + "  dropout: {min: 1.0, max: 0.0}", "dropout"),
    ],
)
def test_a_sweep_that_cannot_be_served_is_refused(tmp_path, text, word):
    with pytest.raises(UserError, match=word):
        spec_of(tmp_path, text)


@pytest.fixture(scope="module")
def base():
    return TINY.change(updates=4, validate_every=4)


def test_trials_are_logged_offline_go_on_and_are_ranked(tmp_path, prepared, base):
    spec = spec_of(tmp_path, HEAD + "  learning_rate: {values: [0.001, 0.01]}\n  dropout: {min: 0.0, max: 0.5}\n")
    run, said = Run(tmp_path / "run"), []
    run_sweep(run, prepared, base, spec, 2, "offline", said.append)
    study = run_sweep(run, prepared, base, spec, 4, "off", said.append)
    table = trial_table(study)
    assert len(table) == len(said) == 4
    assert table["validation loss"].is_monotonic_increasing
    assert len(list(run.sweep.glob("trial-*/wandb/offline-run-*/*.wandb"))) == 2
    assert set(importance(study)) == {"learning_rate", "dropout"}


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(tmp_path, prepared, base, monkeypatch):
    import helpers.sweep

    real, calls = helpers.sweep.fit, []

    def fit(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise UserError("the loss is nan")
        return real(*arguments, **options)

    monkeypatch.setattr(helpers.sweep, "fit", fit)
    spec = spec_of(tmp_path, HEAD + "  learning_rate: {values: [0.001, 0.01]}\n")
    said = []
    study = run_sweep(Run(tmp_path / "run"), prepared, base, spec, 2, "off", said.append)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert "nan" in said[0]


def test_a_grid_tries_every_combination_once(tmp_path, prepared, base):
    spec = spec_of(
        tmp_path, HEAD.replace("random", "grid") + "  clip: {values: [0, 1]}\n  dropout: {values: [0.0, 0.2]}\n"
    )
    table = trial_table(run_sweep(Run(tmp_path / "run"), prepared, base, spec, 4, "off", lambda _: None))
    assert len(table[["clip", "dropout"]].drop_duplicates()) == 4


def test_a_sweep_without_a_finished_trial_says_so(tmp_path, prepared, base):
    spec = spec_of(tmp_path, HEAD + "  clip: {values: [0, 1]}\n")
    with pytest.raises(UserError, match="No trial"):
        trial_table(run_sweep(Run(tmp_path / "run"), prepared, base, spec, 0, "off"))
