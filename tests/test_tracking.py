import subprocess
import sys

import pytest

from helpers.run import Run
from helpers.settings import UserError
from helpers.tracking import Tracker, check_mode, create_sweep, logged_in, run_agent
from helpers.training import fit
from tests.conftest import CPU, TINY


def test_off_does_nothing_and_does_not_import_wandb(tmp_path):
    program = (
        "import sys; from pathlib import Path; from helpers.tracking import Tracker\n"
        "with Tracker('off', Path(sys.argv[1]), {}) as t: t.log({'update': 20, 'loss': 1.0}); t.summary(best=1.0)\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_offline_writes_a_run_without_a_word(tmp_path, capfd):
    with Tracker("offline", tmp_path, {"seed": 1}, name="a", group="g") as tracker:
        for update in range(1, 61):
            tracker.log({"update": update, "loss": 1.0 / update, "learning_rate": 1e-3, "tokens": 5})
        tracker.log({"update": 60, "validation_loss": 0.5})
        tracker.summary(best=0.5)
    assert list(tmp_path.rglob("*.wandb"))
    out, err = capfd.readouterr()
    assert (out.strip(), err.strip()) == ("", "")


class Noted:
    """In the place of a W&B run."""

    def __init__(self) -> None:
        self.logged, self.summary, self.finished = [], {}, 0

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_every_validation_and_every_twentieth_update_are_logged_at_their_update(tmp_path, monkeypatch):
    noted = Noted()
    monkeypatch.setattr("wandb.init", lambda **_: noted)
    with Tracker("offline", tmp_path, {}) as tracker:
        for update in range(1, 46):
            tracker.log(
                {"update": update, "loss": float(update), "gradient_norm": 1.0, "learning_rate": 0.1, "seconds": 1.0}
            )
            if update % 15 == 0:
                tracker.log({"update": update, "validation_loss": 2.0})
        tracker.summary(best_loss=2.0, best_update=15)
        assert noted.finished == 0
    assert noted.logged == [
        (15, {"validation_loss": 2.0}),
        (20, {"loss": 20.0, "learning_rate": 0.1}),
        (30, {"validation_loss": 2.0}),
        (40, {"loss": 40.0, "learning_rate": 0.1}),
        (45, {"validation_loss": 2.0}),
    ]
    assert noted.summary == {"best_loss": 2.0, "best_update": 15}
    assert noted.finished == 1


def test_a_training_tells_its_tracker_what_it_did(prepared, tmp_path, monkeypatch):
    noted, run = Noted(), Run(tmp_path)
    monkeypatch.setattr("wandb.init", lambda **_: noted)
    with Tracker("offline", tmp_path, {}) as tracker:
        fit(run, prepared, TINY.change(updates=20, validate_every=10), CPU, tracker.log, progress_bar=False)
        tracker.summary(**run.facts()["progress"])
    assert [(step, sorted(values)) for step, values in noted.logged] == [
        (10, ["validation_loss"]), (20, ["learning_rate", "loss"]), (20, ["validation_loss"]),
    ]  # fmt: skip
    assert noted.summary["best_loss"] == min(
        values["validation_loss"] for _, values in noted.logged if "validation_loss" in values
    )
    assert noted.summary["update"] == 20


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(UserError, match="offline"):
        Tracker("sometimes", tmp_path, {})
    with pytest.raises(UserError, match="'sometimes' is not one of off, offline, online"):
        check_mode("sometimes")


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_a_login_is_found_where_wandb_writes_it(no_account, monkeypatch):
    assert not logged_in()
    no_account.write_text("machine elsewhere\n  login user\n  password secret\n")
    no_account.chmod(0o600)
    assert not logged_in()
    no_account.write_text("machine localhost:9\n  login user\n  password secret\n")
    assert logged_in()
    no_account.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert logged_in()


def test_an_online_sweep_without_an_account_says_what_to_do(no_account, tmp_path):
    spec = {"method": "random", "metric": {"name": "x"}, "parameters": {"clip": {"values": [1]}}}
    with pytest.raises(UserError, match="wandb login"):
        create_sweep(spec)
    with pytest.raises(UserError, match="agent of sweep abc"):
        run_agent("abc", tmp_path)
