import json
import os
import re
import signal
import subprocess
import sys
import time

import optuna
import pandas as pd
import pytest
import sqlalchemy
import yaml
from wandb.sdk.launch.sweeps import utils as agent

import helpers.sweep
from benchmarks import sweep_report
from benchmarks.sweep_report import seeds_table, write_profile
from helpers.__main__ import main as helpers_main
from helpers.run import ROOT, Run
from helpers.settings import Settings, UserError, load_profile
from helpers.sweep import (
    LOSS,
    best_settings,
    join_sweep,
    open_study,
    planned,
    read_sweep,
    run_sweep,
    trial_settings,
    trial_table,
)
from tests.conftest import CPU, TINY
from tools.sweeps import agent_run, main

HEAD = "method: random\nmetric: {name: validation_loss, goal: minimize}\nparameters:\n"
RATES = HEAD + "  learning_rate: {values: [0.001, 0.01]}\n"
BASE = TINY.change(updates=4, validate_every=4)


def spec_of(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read_sweep(path)


def completed(study):
    """The places of the plan that have a result."""
    return sorted(t.user_attrs["place"] for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE)


def test_the_series_own_files_are_valid_and_have_the_classic_space():
    spec = read_sweep(ROOT / "notebooks" / "sweep.yaml")
    values = {name: parameter["values"] for name, parameter in spec["parameters"].items()}
    assert values == {
        "learning_rate": [1e-4, 2.5e-4, 5e-4, 1e-3],
        "optimizer": ["adam", "sgd"],
        "clip": [0, 25, 50, 100],
        "teacher_forcing_ratio": [0, 0.5, 1],
        "decoder_learning_ratio": [1, 3, 5, 10],
    }
    wide = read_sweep(ROOT / "notebooks" / "sweep_wide.yaml")
    assert {"dropout", "hidden_size", "attention"} < set(wide["parameters"])
    start = load_profile("sweep")
    for params in planned(spec, 20, 1):
        start.change(**params)
    recipe = read_sweep(ROOT / "notebooks" / "sweep_recipe.yaml")
    assert {"learning_rate", "batch_size", "average"} < set(recipe["parameters"])


@pytest.mark.parametrize("size", [16, 48, 64, 200])
def test_all_trials_see_equally_many_examples_and_are_validated_equally_often(size):
    base = load_profile("sweep")
    params = {"batch_size": size, "updates": 800, "validate_every": 100, "warmup_updates": 20}
    settings = trial_settings(base, params)
    assert 800 * base.batch_size <= settings.updates * size < 800 * base.batch_size + size
    assert -(-settings.updates // settings.validate_every) == 8
    assert settings.warmup_updates == 20  # it is a choice, not the budget
    assert trial_settings(base, {"clip": 1.0}) == base.change(clip=1.0)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "parameters"),
        ("a: [", "cannot be read as YAML"),
        (RATES.replace("random", "magic"), "magic"),
        (RATES.replace("validation_loss", "accuracy"), "validation_loss"),
        (RATES.replace("minimize", "maximize"), "minimize"),
        ("methods: random\n" + RATES, "no key 'methods'"),
        ("run_cap: many\n" + RATES, "run_cap"),
        ("name: ../../x\n" + RATES, "name"),
        (HEAD + "  clipp: {values: [1]}", "clipp"),
        (HEAD + "  min_count: {values: [1, 2]}", "min_count"),
        (HEAD + "  clip: [1, 2]", "clip"),
        (HEAD + "  clip: {values: 3}", "clip cannot be served"),
        (HEAD + "  clip: {values: [-1]}", "greater than or equal to 0"),
        (HEAD + "  clip: {min: 1}", "clip"),
        (HEAD + "  clip: {vals: [1]}", "unknown key 'vals'"),
        (HEAD + "  optimizer: {values: [adagrad]}", "adagrad"),
        (HEAD + "  dropout: {distribution: normal, min: 0.0, max: 0.5}", "normal"),
        (HEAD + "  dropout: {min: 0.5, max: 0.0}", "dropout"),
        (HEAD + "  hidden_size: {min: 8, max: 16, distribution: uniform}", "valid integer"),
        (HEAD.replace("random", "grid") + "  dropout: {min: 0.0, max: 0.5}", "grid"),
        (HEAD + "  dropout: {min: 0.1, max: 0.2, step: 0.1}", "unknown key 'step'"),
        ("early_terminate: {type: median}\n" + RATES, "hyperband"),
        ("early_terminate: {type: hyperband}\n" + RATES, "min_iter"),
        ("early_terminate: {type: hyperband, max_iter: 9, s: 2, eta: 0}\n" + RATES, "eta"),
    ],
)
def test_a_sweep_that_cannot_be_served_is_refused(tmp_path, text, word):
    with pytest.raises(UserError, match=word):
        spec_of(tmp_path, text)


def test_a_plan_tries_nothing_twice_and_a_longer_one_begins_alike(tmp_path):
    spec = spec_of(tmp_path, HEAD + "  clip: {values: [0, 1, 2, 3]}\n  optimizer: {values: [adam, sgd]}\n")
    plan = planned(spec, 6, 1)
    assert len({json.dumps(params) for params in plan}) == 6
    assert planned(spec, 4, 1) == plan[:4]
    assert len(planned(spec, 50, 1)) == 8
    assert planned(spec, 6, 2) != plan


def test_steps_are_multiples_of_q_as_they_are_at_wandb(tmp_path):
    spec = spec_of(tmp_path, HEAD + "  clip: {distribution: q_uniform, min: 3, max: 52, q: 10}\n")
    assert {params["clip"] for params in planned(spec, 50, 1)} == {0, 10, 20, 30, 40, 50}


def test_trials_are_logged_offline_go_on_and_are_ranked(tmp_path, prepared, capsys):
    spec = spec_of(tmp_path, RATES + "  dropout: {min: 0.0, max: 0.5}\n")
    run = Run(tmp_path / "run")
    run_sweep(run, prepared, BASE, spec, 2)
    study = run_sweep(run, prepared, BASE, spec, 4, "off")
    table = trial_table(study)
    said = capsys.readouterr().out.splitlines()
    assert len(table) == sum("validation loss" in line for line in said) == 4
    assert said[0].endswith(f"make sweep-worker SWEEP={study.study_name} RUN=run")
    assert table["validation loss"].is_monotonic_increasing
    offline = list(run.sweep.glob("*/trial-*/wandb/offline-run-*/*.wandb"))
    assert len(offline) == 2
    assert study.study_name.encode() in offline[0].read_bytes()  # the group that they will be shown under
    assert not list(run.sweep.glob("*/trial-*/checkpoint*"))


def test_another_budget_is_another_sweep(tmp_path, prepared):
    spec, run = spec_of(tmp_path, RATES), Run(tmp_path / "run")
    first = run_sweep(run, prepared, BASE, spec, 1, "off")
    second = run_sweep(run, prepared, BASE.change(updates=8), spec, 1, "off")
    assert first.study_name != second.study_name
    assert len(first.trials) == len(second.trials) == 1


def test_a_trial_that_diverges_is_recorded_and_the_sweep_goes_on(tmp_path, prepared, capsys):
    spec = spec_of(tmp_path, HEAD.replace("random", "grid") + "  learning_rate: {values: [10.0, 0.01]}\n")
    base = BASE.change(optimizer="sgd", weight_decay=10.0, updates=30)  # weights grow 99-fold an update
    run = Run(tmp_path / "run")
    study = run_sweep(run, prepared, base, spec, 2, "off")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert "loss is" in study.trials[0].user_attrs["error"]
    assert "loss is" in capsys.readouterr().out
    assert len(run_sweep(run, prepared, base, spec, 2, "off").trials) == 2  # it is not tried again


def test_an_error_that_is_no_trial_s_fault_ends_the_sweep_and_uses_up_nothing(tmp_path, prepared):
    spec, run = spec_of(tmp_path, RATES), Run(tmp_path / "run")
    with pytest.raises(UserError, match="sometimes"):
        run_sweep(run, prepared, BASE, spec, 2, "sometimes")
    study = run_sweep(run, prepared, BASE, spec, 2, "off")
    assert completed(study) == [0, 1]


def test_a_grid_tries_every_combination_once(tmp_path, prepared):
    grid = HEAD.replace("random", "grid") + "  clip: {values: [0, 1]}\n  dropout: {values: [0.0, 0.2]}\n"
    table = trial_table(run_sweep(Run(tmp_path / "run"), prepared, BASE, spec_of(tmp_path, grid), 9, "off"))
    assert len(table) == len(table[["clip", "dropout"]].drop_duplicates()) == 4


def test_bayes_draws_each_place_differently_and_each_sweep_alike(tmp_path, prepared):
    spec = spec_of(tmp_path, HEAD.replace("random", "bayes") + "  dropout: {min: 0.0, max: 0.5}\n")
    drawn = [
        [t.params for t in run_sweep(Run(tmp_path / name), prepared, BASE, spec, 3, "off").trials]
        for name in ("a", "b")
    ]
    assert drawn[0] == drawn[1]
    assert len({params["dropout"] for params in drawn[0]}) == 3


def test_hyperband_stops_a_trial_that_is_behind(tmp_path, prepared):
    text = "early_terminate: {type: hyperband, min_iter: 1, eta: 2}\n" + HEAD.replace("random", "grid")
    spec = spec_of(tmp_path, text + "  learning_rate: {values: [0.01, 0.0]}\n")
    base = BASE.change(updates=12)
    study = run_sweep(Run(tmp_path / "run"), prepared, base, spec, 2, "off")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert not list((tmp_path / "run").rglob("checkpoint*"))
    assert trial_table(study)["validation loss"].notna().sum() == 1


def test_the_best_is_trained_anew_with_seeds_that_the_sweep_did_not_have(tmp_path, prepared):
    run, spec = Run(tmp_path / "run"), spec_of(tmp_path, HEAD + "  clip: {value: 50.0}\n")
    study = run_sweep(run, prepared, BASE, spec, 1, "off")
    write_profile(tmp_path / "best.yaml", study)
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["clip"] == 50.0  # though it may be the default
    found = seeds_table(run, prepared, {"start": BASE, "best": best_settings(study)}, 2, CPU)
    assert sorted(found["seed"]) == [BASE.seed + 1] * 2 + [BASE.seed + 2] * 2
    assert found["validation loss"].nunique() == 2  # here both are the same settings


def test_machines_that_make_a_fresh_database_s_tables_at_once_both_live(tmp_path, monkeypatch):
    """One of them finds the tables half made by the other; their locks are on their own disks."""
    storage, failures = optuna.storages.RDBStorage, [sqlalchemy.exc.OperationalError("CREATE", {}, Exception("exists"))]
    real = storage.__init__

    def racing(self, *arguments, **options):
        if failures:
            raise failures.pop()
        real(self, *arguments, **options)

    monkeypatch.setattr(storage, "__init__", racing)
    url = f"sqlite:///{tmp_path}/shared.db"
    assert open_study(Run(tmp_path / "one"), "s", url, create=True).study_name == "s"
    failures.extend([ValueError("never")] * 5)
    with pytest.raises(UserError, match=r"cannot be opened \(never\)"):
        open_study(Run(tmp_path / "two"), "s", url)


def test_a_sweep_without_a_finished_trial_says_so(tmp_path, prepared):
    run, spec = Run(tmp_path / "run"), spec_of(tmp_path, RATES)
    study = run_sweep(run, prepared, BASE, spec, 0, "off")
    with pytest.raises(UserError, match="No trial"):
        trial_table(study)
    with pytest.raises(UserError, match="No trial"):
        write_profile(tmp_path / "best.yaml", study)
    with pytest.raises(UserError, match="no sweep 'other'"):
        open_study(run, "other")
    with pytest.raises(UserError, match="make sweep"):
        open_study(Run(tmp_path / "nowhere"), "other")
    with pytest.raises(UserError, match="cannot be opened"):
        open_study(run, "other", "nonesuch://host/base")


def test_a_spoilt_database_is_named(tmp_path, prepared):
    run, spec = Run(tmp_path / "run"), spec_of(tmp_path, RATES)
    study = run_sweep(run, prepared, BASE, spec, 1, "off")
    (run.sweep / "sweep.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"sweep\.db cannot be opened"):
        open_study(run, study.study_name)


def test_a_trial_taken_for_dead_leaves_its_end_to_the_others(tmp_path, prepared, monkeypatch, capsys):
    spec, run, real, calls = spec_of(tmp_path, RATES), Run(tmp_path / "run"), helpers.sweep.fit, []

    def slow(folder, *arguments, **options):
        calls.append(folder)
        if len(calls) == 1:  # what a worker does that misses the heartbeat
            study = open_study(run, folder.folder.parent.name)
            study.tell(0, state=optuna.trial.TrialState.FAIL)
            optuna.storages.RetryHeartbeatStaleTrialCallback()(study, study.trials[0])
        return real(folder, *arguments, **options)

    monkeypatch.setattr(helpers.sweep, "fit", slow)
    study = run_sweep(run, prepared, BASE, spec, 1, "off")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert completed(study) == [0]
    assert "trial 0: taken over by another worker" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_a_mistake_in_the_code_and_ctrl_c_end_the_worker_and_use_up_no_trial(tmp_path, prepared, monkeypatch, error):
    run, spec = Run(tmp_path / "run"), spec_of(tmp_path, RATES)

    def broken(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(helpers.sweep, "fit", broken)
        with pytest.raises(type(error)):
            run_sweep(run, prepared, BASE, spec, 2, "off")
    study = run_sweep(run, prepared, BASE, spec, 2, "off")
    assert completed(study) == [0, 1]
    assert [trial.state.name for trial in study.trials].count("FAIL") == 1


def test_an_interrupted_seed_is_trained_from_its_start(tmp_path, prepared):
    run = Run(tmp_path)
    folder = Run(run.sweep / "seeds" / f"start-{BASE.seed + 1}")
    folder.folder.mkdir(parents=True)
    folder.checkpoint.write_bytes(b"left by an interrupted training")
    assert len(seeds_table(run, prepared, {"start": BASE}, 1, CPU)) == 1


# A worker whose death others notice within seconds.
WORKER = "import sys, helpers.sweep; helpers.sweep.HEARTBEAT = 1; from tools.sweeps import main; sys.exit(main())"


def worker(*arguments, said):
    command = [sys.executable, "-c", WORKER, *map(str, arguments), "--wandb", "off", "--device", "cpu"]
    return subprocess.Popen(command, stdout=said, stderr=said)


@pytest.mark.parametrize("where", ["the run's folder", "a database's URL"])
def test_workers_that_start_at_once_all_live_and_a_killed_one_s_trial_runs_again(
    tmp_path, corpus_folder, where, monkeypatch
):
    """Three processes on a database that does not exist yet; one is killed in the midst of a trial."""
    monkeypatch.setattr(helpers.sweep, "HEARTBEAT", 1)
    text = HEAD + "  clip: {values: [0, 1, 2]}\n  learning_rate: {values: [0.001, 0.003, 0.01]}\n"
    (tmp_path / "sweep.yaml").write_text(text)
    storage = ["--storage", f"sqlite:///{tmp_path}/elsewhere.db"] if where == "a database's URL" else []
    run = Run(tmp_path / "run")
    small = ["updates=150", "validate_every=50", "hidden_size=24", "embedding_size=24", "held_out_share=0.15"]
    sweep = ["sweep", tmp_path / "sweep.yaml", "--run", run.folder, "--corpus", corpus_folder, "--trials", 6, *storage]
    with open(tmp_path / "said", "w") as said:
        workers = [worker(*sweep, "--set", *small, said=said) for _ in range(3)]
        deadline, study = time.time() + 90, None
        while time.time() < deadline:
            assert [process.poll() for process in workers] == [None] * 3, (tmp_path / "said").read_text()
            if study is None and "Sweep " in (printed := (tmp_path / "said").read_text()):
                study = open_study(run, printed.split()[1].strip(","), *storage[1:])
            running = [t for t in study.trials if t.state.name == "RUNNING"] if study else []
            if f"{workers[0].pid}" in {t.user_attrs.get("worker", "").split("-")[0] for t in running}:
                break
            time.sleep(0.02)
        workers[0].send_signal(signal.SIGKILL)
        assert [process.wait(90) for process in workers] == [-signal.SIGKILL, 0, 0], (tmp_path / "said").read_text()
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert completed(study) == list(range(6))
    failed = [trial for trial in study.trials if trial.state.name == "FAIL" and "place" in trial.user_attrs]
    assert [trial.user_attrs["worker"].split("-")[0] for trial in failed] == [str(workers[0].pid)]
    table = trial_table(study).dropna(subset=["validation loss"])
    assert len(table[["clip", "learning_rate"]].drop_duplicates()) == 6
    assert table["worker"].nunique() >= 2


def test_a_worker_joins_a_sweep_by_its_id(tmp_path, prepared):
    run, spec = Run(tmp_path / "run"), spec_of(tmp_path, RATES)
    study = run_sweep(run, prepared, BASE, spec, 1, "off")
    study.enqueue_trial({"learning_rate": 0.001}, user_attrs={"place": 1})
    again = join_sweep(run, study.study_name, "off", device=CPU)
    assert completed(again) == [0, 1]


def test_two_agents_of_the_file_s_command_do_not_collide(tmp_path, prepared):
    """The command as W&B's own agent expands it, twice at once, logging offline since there is no account here."""
    run = Run(tmp_path / "run")
    prepared.save(agent_run(run.folder, "p/s1").data)
    spec = read_sweep(ROOT / "notebooks" / "sweep.yaml")
    processes = []
    for name in ("aaaa", "bbbb"):
        arguments = {"learning_rate": {"value": 0.01}, "optimizer": {"value": "adam"}}
        known = agent.create_sweep_command_args({"args": arguments})
        known |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [spec["program"]]}
        command = []
        for word in agent.create_sweep_command(spec["command"]):
            command += known[word[2:-1]] if word.startswith("${") else [word]
        own = {"CHATBOT_RUN": str(run.folder), "WANDB_RUN_ID": name, "WANDB_SWEEP_ID": "s1"}
        processes.append(subprocess.Popen([*command, "--wandb", "offline"], env=os.environ | own, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    for process in processes:
        output = process.communicate(timeout=100)[0]
        assert process.returncode == 0, output
    for name in ("aaaa", "bbbb"):
        assert len(list((run.folder / "online" / "s1" / name / "wandb").glob(f"offline-run-*-{name}"))) == 1


def test_the_best_settings_become_a_profile_and_a_report(tmp_path, prepared, capsys):
    choices = "  learning_rate: {values: [0.0001, 0.01]}\n  optimizer: {values: [adam, sgd]}\n"
    run, spec = Run(tmp_path / "run"), spec_of(tmp_path, HEAD + choices + "  clip: {values: [0, 1e4, 2e4, 3e4, 4e4]}\n")
    study = run_sweep(run, prepared, BASE, spec, 20, "off")
    target = tmp_path / "results" / "sweep"
    profile = str(run.folder / "best.yaml")
    assert main(["best", study.study_name, "--run", str(run.folder)]) == 0
    assert load_profile(profile) == BASE.change(**study.best_trial.params)
    assert profile in capsys.readouterr().out
    arguments = ["--run", str(run.folder), "--results", str(target), "--seeds", "1", "--device", "cpu"]
    arguments += ["--but", "optimizer=sgd", "batch_size=32"]
    assert sweep_report.main([study.study_name, *arguments]) == 0
    told = json.loads(target.with_suffix(".json").read_text())
    assert told["states"] == {"complete": 20}
    assert list(told["importance"]) == ["all trials"]  # the ten of one optimiser are copies of two: no clip acted
    names = ["starting point", "best of the sweep", "best, but optimizer sgd", "best, but batch_size 32"]
    updates = {row["settings"]: row["updates"] for row in told["seeds"]}
    assert list(updates) == names
    assert updates[names[3]] == updates[names[1]] * BASE.batch_size / 32  # as many examples
    assert abs(told["held out"]["validation"] - study.best_value) < 1e-6  # the best trial's own training
    assert 0 < told["held out"]["test"] < 10
    assert len(target.with_suffix(".csv").read_text().splitlines()) == 21
    assert Settings(**told["starting point"]) == BASE


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["sweep", "none.yaml"], "none.yaml"),
        (["sweep", str(ROOT / "notebooks" / "sweep.yaml"), "--profile", "nonesuch"], "nonesuch"),
        (["sweep-worker", "nonesuch", "--wandb", "offline"], "make sweep"),
        (["best", "nonesuch"], "make sweep"),
        (["trial", "clip=1"], "data.pt"),
        (["sweep", "none.yaml", "--trials", "0"], "'0'"),
        (["latency", "--json", "."], "file's name"),
    ],
)
def test_bad_input_is_one_sentence(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever login there is
    command = helpers_main if arguments[0] == "latency" else main
    assert command([*arguments, "--run", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert word in error


def test_an_online_sweep_takes_no_number_of_trials_and_no_database(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.sweeps.usual_mode", lambda: "online")
    arguments = ["sweep", str(ROOT / "notebooks" / "sweep.yaml"), "--run", str(tmp_path)]
    assert main([*arguments, "--trials", "3"]) == 1
    assert "run_cap" in capsys.readouterr().err
    for words in (arguments, ["sweep-worker", "id", "--run", str(tmp_path)]):
        assert main([*words, "--wandb", "online", "--storage", "sqlite:///:memory:"]) == 1
        assert "--wandb offline" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:secret@127.0.0.1:1/none",
        "postgresql://user:my/secret@127.0.0.1:1/none",
        "postgresql://user:my:secret@127.0.0.1:1/none",
        "postgresql://user:sec@secret@127.0.0.1:1/none",
        "postgresql://127.0.0.1:1/none?user=user&password=secret",
        "no database, but a secret",
    ],
)
def test_a_password_is_not_shown(tmp_path, url):
    with pytest.raises(UserError, match="cannot be opened") as error:
        open_study(Run(tmp_path), "a", url)
    assert "secret" not in str(error.value)


def test_what_the_pages_say_of_the_recipes_sweep_follows_from_its_files():
    results = ROOT / "results"
    found = json.loads((results / "sweep-recipe.json").read_text())
    assert found["spec"] == read_sweep(ROOT / "notebooks" / "sweep_recipe.yaml")
    trials = pd.read_csv(results / "sweep-recipe.csv").nsmallest(12, LOSS)
    old = json.loads((results / "sweep-excerpt.json").read_text())
    highest = max(old["spec"]["parameters"]["learning_rate"]["values"])
    assert old["best"]["learning_rate"] == highest
    assert 2 * highest <= trials["learning_rate"].min() < trials["learning_rate"].max() < 8 * highest
    assert 5 * highest < found["best"]["learning_rate"] < 6 * highest
    seeds = pd.DataFrame(found["seeds"]).groupby("settings")[LOSS]
    assert (seeds.count() == 3).all()
    worth = seeds.mean() - seeds.mean()["best of the sweep"]
    assert 0.35 < worth["starting point"] < 0.45
    assert abs(worth["best, but average 0.0"]) < 0.01
    assert worth["best, but batch_size 64"] < 0.03
    assert 0.08 < worth["best, but schedule constant"] < 0.12
    assert worth["best, but optimizer adam"] > 0.9


def test_what_the_page_says_of_the_embedded_corpuss_sweep_follows_from_its_files():
    results = ROOT / "results"
    found = json.loads((results / "sweep-small.json").read_text())
    assert found["spec"] == read_sweep(ROOT / "notebooks" / "sweep_recipe.yaml")
    assert found["corpus"]["name"] == "sample"
    trials = pd.read_csv(results / "sweep-small.csv").nsmallest(20, LOSS)
    for name, value in {"batch_size": 32, "schedule": "cosine", "warmup_updates": 20, "tie_weights": True}.items():
        assert (trials[name] == value).all()
    assert 1.6e-3 <= trials["learning_rate"].min() < trials["learning_rate"].max() < 8e-3
    seeds = pd.DataFrame(found["seeds"]).groupby("settings")[LOSS]
    assert (seeds.count() == 3).all()
    said = {"best of the sweep": 0.141, "best, but batch_size 64": 0.227, "starting point": 0.377}
    assert seeds.mean().round(3).to_dict() == said
    assert round(found["held out"]["test"], 3) == 0.135
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    assert all(f"{loss:.3f}" in page for loss in (*said.values(), 0.135))


def test_the_pages_table_of_recipes_for_the_embedded_corpus_follows_from_its_file():
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    found = pd.read_csv(ROOT / "results" / "sample-recipes.csv").fillna({"more": "", "sentences failed": 0})
    found["above"] = found["test loss"] / found["least"] - 1
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 9 and row[0].isdecimal()]
    groups = [group for _, group in found.groupby(["batch_size", "updates", "more"], sort=False)]
    assert len(rows) == len(groups) == 6
    for (size, updates, _, seeds, seconds, test, above, facts, sentences), group in zip(rows, groups, strict=True):
        first = group.iloc[0]
        assert (int(size), int(updates.replace(",", "")), int(seeds)) == (first.batch_size, first.updates, len(group))
        for said, name, share, digits in (
            (seconds, "seconds", 1, 0), (test, "test loss", 1, 3), (above, "above", 100, 0), (facts, "facts", 100, 1),
        ):  # fmt: skip
            numbers = [float(number) for number in re.findall(r"[\d.]+", said)]
            ends = [group[name].min() * share, group[name].max() * share]
            assert [numbers[0], numbers[-1]] == pytest.approx(ends, abs=0.501 * 10**-digits), (said, ends)
        assert (sentences == "all") == (group["sentences failed"] == 0).all()
    now, profile = rows[1], load_profile("sample")
    assert (int(now[0]), int(now[1].replace(",", ""))) == (profile.batch_size, profile.updates)
