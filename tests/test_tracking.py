import contextlib
import subprocess
import sys

import pytest

from helpers.run import Run
from helpers.settings import UserError
from helpers.tracking import Stopped, Tracker, check_mode
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
        self.logged, self.summary, self.finished, self.committed = [], {}, [], []

    def log(self, values, step, commit):
        self.logged.append((step, values))
        self.committed += [step] * commit

    def finish(self, exit_code):
        self.finished.append(exit_code)


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
        assert noted.finished == []
    assert noted.logged == [
        (15, {"validation_loss": 2.0}),
        (20, {"loss": 20.0, "learning_rate": 0.1}),
        (30, {"validation_loss": 2.0}),
        (40, {"loss": 40.0, "learning_rate": 0.1}),
        (45, {"validation_loss": 2.0}),
    ]
    assert noted.summary == {"best_loss": 2.0, "best_update": 15, "validation_loss": 2.0}
    assert noted.committed == [15, 30, 45]
    assert noted.finished == [0]


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


@pytest.mark.parametrize(
    ("end", "code"), [(None, 0), (Stopped("early"), 0), (UserError("diverged"), 1), (KeyboardInterrupt(), 1)]
)
def test_the_summary_has_the_best_loss_and_the_run_its_exit_code_however_it_ends(tmp_path, monkeypatch, end, code):
    noted = Noted()
    monkeypatch.setattr("wandb.init", lambda **_: noted)
    with contextlib.suppress(Stopped, UserError, KeyboardInterrupt), Tracker("offline", tmp_path, {}) as tracker:
        for update, loss in [(1, 3.0), (2, 1.0), (3, 9.0)]:
            tracker.log({"update": update, "validation_loss": loss})
        if end:
            raise end
    assert noted.summary == {"validation_loss": 1.0}
    assert noted.finished == [code]


def test_a_stopped_run_ends_at_its_next_row(tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.init", lambda **_: Noted())
    with Tracker("online", tmp_path, {}) as tracker:
        tracker.log({"update": 1})
        tracker.stop()
        with pytest.raises(Stopped):
            tracker.log({"update": 2})
