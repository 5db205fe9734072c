"""The race treats both models alike, keeps what it has run, and runs nothing twice."""

import itertools
import json
import statistics

import pytest

from benchmarks import race
from helpers.model import parameter_count
from helpers.run import ROOT
from helpers.settings import load_profile
from tests.conftest import CPU, TINY

SMALL = race.COPY.change(embedding_size=16, hidden_size=16, updates=12, batch_size=16)


@pytest.fixture
def short(monkeypatch):
    """Races of a moment."""
    monkeypatch.setattr(race, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(race, "DROPOUTS", (0.0,))
    monkeypatch.setattr(race, "SEEDS", 2)
    return race.copying(SMALL, count=20)


@pytest.mark.parametrize("name", list(race.MODELS))
@pytest.mark.parametrize("layers", race.LAYERS)
def test_models_are_of_equal_size(name, layers):
    for profile, words in (("sample", 376), ("quick", 6000)):
        settings = load_profile(profile)
        wanted = parameter_count(race.new_model(settings, words))
        found = race.sized(name, settings.change(layers=layers), words, wanted)
        assert parameter_count(race.MODELS[name](found, words)) == pytest.approx(wanted, rel=0.02)
        if (name, layers) == ("GRU", settings.layers):
            assert found == settings


def test_both_run_the_same_sweep_and_what_is_there_is_not_run_again(short, monkeypatch):
    found = {"tasks": {}, "runs": [], "latency": []}
    saved = []
    models = race.race("copy", short, found, lambda: saved.append(len(found["runs"])), CPU)
    assert list(models) == list(race.MODELS)
    assert saved == list(range(1, 2 * (2 * 2 + 2) + 1))
    for trial in (True, False):
        tried = [
            [(run["layers"], run["learning_rate"], run["seed"], run["updates"]) for run in found["runs"]
             if run["model"] == model and run["trial"] == trial] for model in race.MODELS
        ]  # fmt: skip
        assert len(tried[0]) == len(tried[1]) == (4 if trial else 2)
        assert tried[0] == tried[1] or not trial
    for model in race.MODELS:
        own = [run for run in found["runs"] if run["model"] == model]
        best = min((run for run in own if run["trial"]), key=lambda run: run["best"])
        for run in own:
            assert run["trial"] or (run["layers"], run["learning_rate"]) == (best["layers"], best["learning_rate"])
            assert run["curve"][-1][:2] == [pytest.approx(run["curve"][-1][0]), run["updates"]]
    kept = json.loads(json.dumps(found))
    monkeypatch.setattr(race, "trained", lambda *_: pytest.fail("it was there"))
    assert race.race("copy", short, kept, lambda: None, CPU) == {}
    table = race.summary(kept).set_index("model")
    assert list(table.index) == list(race.MODELS)
    assert (table["seeds"] == 2).all()
    assert table["nats"].between(0, 40).all()


def test_lines_to_copy_are_others_in_each_part_and_longer_than_any_trained_on(short):
    rows = [
        {
            tuple(row)
            for row, length in zip(part.queries.tolist(), part.query_lengths.tolist(), strict=True)
            if length > 4
        }
        for part in short.data.splits.values()
    ]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert max(int(part.query_lengths.max()) for part in short.data.splits.values()) == race.COPIED[-1] < race.LONGEST
    figures = short.figures(race.new_transformer(SMALL, len(short.data.vocabulary)).eval(), short.data)
    assert list(figures["exact by length"]) == list(range(2, race.LONGEST + 1))


def test_nothing_loses_less_than_the_least_that_is_possible():
    task = race.talking("sample", load_profile("sample").change(embedding_size=8, hidden_size=8))
    figures = task.figures(race.new_model(task.data.settings, len(task.data.vocabulary)).eval(), task.data)
    assert 0.5 < figures["least"] < figures["test"]


def test_an_answer_is_waited_for_by_turns(prepared):
    models = {name: new(TINY, len(prepared.vocabulary)).eval() for name, new in race.MODELS.items()}
    rows = race.waiting(models, prepared, CPU, replies=2)
    assert len(rows) == len(race.MODELS) * 2 * len(race.SIZES)
    assert all(0 < row["p50 ms"] <= row["p95 ms"] for row in rows)


def test_a_quick_look_does_not_become_a_result(capsys):
    assert race.main(["--updates", "3"]) == 1
    assert "--json" in capsys.readouterr().err
    assert race.main(["--only", "excerpt", "--json", "nowhere.json"]) == 1
    assert "--corpus PATH" in capsys.readouterr().err


def test_a_file_of_other_settings_is_refused(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(race, "copying", lambda: short)
    monkeypatch.setattr(race, "race", lambda *_: {})
    monkeypatch.setattr(race, "summary", lambda found: race.pd.DataFrame())
    file = tmp_path / "race.json"
    file.write_text(json.dumps({"tasks": {"copy": {"digest": "other"}}, "runs": [], "latency": []}))
    assert race.main(["--only", "copy", "--json", str(file), "--device", "cpu"]) == 1
    assert "move it away" in capsys.readouterr().err
    file.unlink()
    assert race.main(["--only", "copy", "--json", str(file), "--device", "cpu"]) == 0


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("transformer-*.json")), ids=lambda file: file.stem)
def test_notebook_08_says_what_was_measured(file):
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found["tasks"]) == {"copy", "world", "excerpt"}
    runs: dict[tuple, list[dict]] = {}
    for run in found["runs"]:
        if not run["trial"]:
            runs.setdefault((run["task"], run["model"]), []).append(run)
    assert set(runs) == set(itertools.product(found["tasks"], race.MODELS))
    assert {len(own) for own in runs.values()} == {race.SEEDS}
    for own in runs.values():
        wanted = found["tasks"][own[0]["task"]]["parameters"]
        assert all(run["parameters"] == pytest.approx(wanted, rel=0.02) for run in own)
    for model in race.MODELS:
        for run in runs["copy", model]:
            right = run["exact by length"]
            assert min(right[str(length)] for length in race.COPIED) > 0.95 > 0.1 > right["13"]
        for run in runs["world", model]:
            assert run["least"] < run["test"] < 1.5 * run["least"]
            share = run["facts"]["colour"]
            assert share > 0.9 if model == "GRU" else 0.4 < share < 0.6  # one of two colours, by guess
    best = {key: [run["best"] for run in own] for key, own in runs.items()}
    for task, gap in (("world", 0.02), ("excerpt", 2)):
        assert min(best[task, "Transformer"]) - max(best[task, "GRU"]) > gap
    for task in found["tasks"]:
        slow, fast = (max(run["tokens/s"] for run in runs[task, model]) for model in ("Transformer", "GRU"))
        assert slow < fast
    for task, layers in itertools.product(("world", "excerpt"), race.LAYERS):  # of equal depth, about equally fast
        slow, fast = (
            statistics.median(run["tokens/s"] for run in found["runs"] if run["trial"]
                              and (run["task"], run["model"], run["layers"]) == (task, model, layers))
            for model in ("Transformer", "GRU")
        )  # fmt: skip
        assert slow == pytest.approx(fast, rel=0.1)
    messages = [run["facts"]["message"] for run in runs["world", "GRU"]]
    assert [share > 0.9 for share in sorted(messages)] == [False, True, True]
    speeds = {(row["model"], row["variant"], row["batch"]): row["p50 ms"] for row in found["latency"]}
    assert all(ms < speeds["Transformer", *how] for (model, *how), ms in speeds.items() if model == "GRU")
