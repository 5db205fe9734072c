"""Weights & Biases online, against a stand-in of its server: what it is told, and what it is never told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from helpers.run import ROOT
from helpers.settings import UserError, load_profile
from tests.wandb_server import KEY, Server
from tools.sweeps import usual_mode

SHORT = """{max_query_words: 10, max_response_words: 10, min_count: 3, embedding_size: 16, hidden_size: 16, layers: 1,
attention: dot, updates: 40, batch_size: 32, learning_rate: 1.0e-4, validate_every: 10, precision: fp32}"""
SWEEP = """{method: grid, metric: {name: validation_loss, goal: minimize},
parameters: {clip: {values: [0, 25]}, learning_rate: {values: [0.001]}, optimizer: {values: [adam]}}}"""
# W&B asks every few seconds what there is to do; in a test that is a long time.
QUICK = {
    "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1", "WANDB__FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "0.1",
    "WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS": "0.1", "WANDB__DISABLE_STATS": "true",
}  # fmt: skip
HURRY = """
import sys
if "agent" in sys.orig_argv:
    import wandb.wandb_agent
    wandb.wandb_agent.Agent.POLL_INTERVAL = 0.2
elif "trial" in sys.orig_argv:
    from wandb.sdk.lib import run_stopping
    run_stopping.RunStopChecker.__init__.__kwdefaults__["poll_interval"] = 0.2
"""
DIVERGING = {"learning_rate": 10, "optimizer": "sgd", "weight_decay": 10, "clip": 0}


@pytest.fixture
def server():
    with Server() as server:
        yield server
        assert server.unknown == []


@pytest.fixture
def command(server, tmp_path, corpus_folder):
    """Starts one of our commands as a user with a login would."""
    (tmp_path / "short.yaml").write_text(SHORT)
    (tmp_path / "space.yaml").write_text(SWEEP)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HURRY)
    home = QUICK | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "site")}

    def start(*words, **env) -> subprocess.Popen:
        own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        own |= server.environment() | home | env
        return subprocess.Popen([sys.executable, "-m", *map(str, words)], cwd=ROOT, env=own, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(*words, status: int = 0, **env) -> str:
        process = start(*words, **env)
        said = "".join(process.communicate(timeout=120))
        assert process.returncode == status, said
        assert KEY not in said
        return said

    run.start = start
    run.data = ["--corpus", corpus_folder, "--profile", tmp_path / "short.yaml"]
    run.folder = tmp_path / "run"
    run.sweep = ["tools.sweeps", "sweep", tmp_path / "space.yaml", "--run", run.folder, *run.data, "--device", "cpu"]
    run.worker = ["tools.sweeps", "sweep-worker", "sweep000", "--run", tmp_path / "other", *run.data, "--device", "cpu"]
    return run


def best(run: dict) -> float:
    return min(row["validation_loss"] for row in run["history"] if "validation_loss" in row)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def no_secret(folder: Path, *secrets: str) -> None:
    for path in folder.rglob("*"):
        for secret in secrets:
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_a_training_is_seen_live_through_an_outage(server, command):
    server.failures = [["upsertBucket", 500, 2], ["file_stream", None, 1]]
    said = command("helpers", "train", "--run", command.folder, *command.data, "--wandb", "online", "--device", "cpu")
    (run,) = server.runs.values()
    assert (run["state"], run["exitcode"], run["project"]) == ("finished", 0, "chatbot-notebooks")
    assert [row["_step"] for row in run["history"] if "validation_loss" in row] == [10, 20, 30, 40]
    assert run["config"]["updates"] == 40
    assert run["summary"]["validation_loss"] == best(run)
    assert server.url in said  # where it is seen
    assert ("UpsertBucket/upsertBucket", 500) in server.requests
    no_secret(command.folder, KEY)


def test_two_machines_work_on_a_sweep_whose_best_becomes_a_profile(server, command, tmp_path):
    """The trials take the settings that the server gives, whatever WANDB_RUN_ID says; one diverges, and fails alone."""
    server.trials = [{"clip": 25, "learning_rate": 0.003, "optimizer": "sgd"}, DIVERGING]
    said = command(*command.sweep, WANDB_RUN_ID="merged")
    assert "make sweep-worker SWEEP=chatbot-notebooks/sweep000 CORPUS=" in said
    assert {name: run["state"] for name, run in server.runs.items()} == {
        "trial001": "finished", "trial002": "failed",
    }  # fmt: skip
    run = server.runs["trial001"]
    kept = json.loads((command.folder / "online" / "sweep000" / "trial001" / "manifest.json").read_text())["settings"]
    for key, value in run["args"].items():
        assert run["config"][key] == kept[key] == value
    assert run["config"]["corpus"] == command.data[1].name
    assert run["summary"]["validation_loss"] == best(run)
    assert run["sweep"] == "sweep000"
    server.trials.append({"clip": 50})
    assert "another corpus or profile" in command(*command.worker, "--set", "min_count=2", status=1)
    assert list(server.runs) == ["trial001", "trial002"]
    command(*command.worker)
    assert server.runs["trial003"]["state"] == "finished"
    command("tools.sweeps", "best", "sweep000", "--run", command.folder)
    winner = min((run for run in server.runs.values() if run["state"] == "finished"), key=best)
    profile = load_profile(str(command.folder / "best.yaml"))
    assert {name: getattr(profile, name) for name in winner["args"]} == winner["args"]
    no_secret(tmp_path, KEY)


def test_trials_that_are_stopped_early_are_no_failures(server, command):
    """One is ended by the agent, the other told so by the server itself."""
    server.stop_after, server.trials = 2, [{"updates": 100_000, "validate_every": 20}] * 2
    server.told_by_stream = {"trial002"}
    assert command(*command.sweep).count("stopped early: ") == 2
    for run in server.runs.values():
        assert (run["state"], run["exitcode"]) == ("finished", 0)
        assert run["summary"]["validation_loss"] == best(run)


def test_ctrl_c_ends_the_trial_too(server, command):
    server.trials = [{"updates": 100_000, "validate_every": 20}] * 2
    process = command.start(*command.sweep)
    wait_for(lambda: len(server.runs.get("trial001", {"history": []})["history"]) > 2)
    process.send_signal(signal.SIGINT)
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 130, said
    assert "Traceback" not in said
    run = server.runs["trial001"]
    assert run["exitcode"] not in (0, None)
    assert run["state"] == "failed"
    rows = len(run["history"])
    time.sleep(0.5)
    assert len(run["history"]) == rows
    assert list(server.runs) == ["trial001"]


def test_a_trial_that_is_nobody_s_result_ends_the_agent_and_says_why(server, command):
    """Here the data of the sweep are other ones than its digest says."""
    process = command.start(*command.sweep)
    data = command.folder / "online" / "sweep000" / "data.pt"
    wait_for(data.is_file)
    data.write_bytes(b"damaged")
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 1, said
    assert "has failed: " in said.splitlines()[-1]
    assert "data.pt cannot be loaded" in said.splitlines()[-1]


def test_what_the_server_refuses_is_said(server, command):
    assert "not logged in" in command(*command.sweep, status=1, WANDB_API_KEY="f" * 40)
    assert "does not show the sweep" in command(*command.worker, status=1)  # deleted, or never there


def test_an_offline_sweep_is_uploaded_without_a_secret(server, command, tmp_path):
    password = "zauberwort"
    url = f"sqlite:///{tmp_path}/trials.db?{password}=1"
    command(*command.sweep, "--storage", url)  # even so
    files = sorted(command.folder.rglob("run-*.wandb"))
    assert len(files) == 2
    no_secret(command.folder, password, KEY)
    command("wandb", "sync", *[path.parent for path in files])
    assert len(server.runs) == 2
    for run in server.runs.values():
        assert run["summary"]["validation_loss"] == best(run)
        assert run["group"].startswith("sweep-")
    assert password not in json.dumps(server.runs)


def test_wandb_mode_keeps_a_sweep_away_from_the_server_and_a_variable_its_storage_from_ps(server, command, tmp_path):
    storage = f"sqlite:///{tmp_path}/zauberwort.db"
    process = command.start(*command.sweep, WANDB_MODE="disabled", CHATBOT_STORAGE=storage)
    assert "zauberwort" not in Path("/proc", str(process.pid), "cmdline").read_text()
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 0, said
    assert (tmp_path / "zauberwort.db").is_file()
    assert [name for name, _ in server.requests if "otel" not in name] == []  # the SDK's own telemetry
    assert not list(command.folder.rglob("*.wandb"))


# Whether there is a login


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A home without a login."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_without_a_login_a_sweep_is_offline(nobody):
    assert usual_mode() == "offline"
    (nobody / ".netrc").write_text("machine elsewhere\n  login user\n  password secret\n")
    assert usual_mode() == "offline"


@pytest.mark.parametrize("form", ["a key", "~/.netrc", "~/_netrc", "readable by all", "NETRC", "another server"])
def test_a_login_is_found_in_each_form(nobody, monkeypatch, form):
    text = f"machine api.wandb.ai\n  login user\n  password {KEY}\n"
    file = nobody / ("_netrc" if form == "~/_netrc" else "own" if form == "NETRC" else ".netrc")
    if form == "a key":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    elif form == "another server":
        monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
        file.write_text(text.replace("api.wandb.ai", "localhost:9"))
    else:
        file.write_text(text)
    if form == "NETRC":
        monkeypatch.setenv("NETRC", str(file))
    if file.exists():
        file.chmod(0o644 if form == "readable by all" else 0o600)
    assert usual_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert usual_mode() == "offline"


def test_an_identity_token_is_a_login_too(nobody, monkeypatch):
    (nobody / "token").write_text("a.b.c")
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", str(nobody / "token"))
    assert usual_mode() == "online"


def test_a_login_that_is_none_is_one_sentence(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    with pytest.raises(UserError, match="login cannot be used") as error:
        usual_mode()
    assert "too short" not in str(error.value)


def test_the_sweep_files_of_the_series_can_be_registered():
    for path in (ROOT / "notebooks").glob("sweep*.yaml"):
        assert yaml.safe_load(path.read_text())["command"][-1] == "${args_no_hyphens}"
