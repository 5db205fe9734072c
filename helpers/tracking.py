"""One door to Weights & Biases: online with an account, offline without, or off."""

import math
import os
from pathlib import Path

from helpers.settings import UserError, user_errors

MODES = ("off", "offline", "online")
PROJECT = "chatbot-notebooks"


class Stopped(Exception):  # noqa: N818 - an early end is no error
    """A trial is behind the others of its sweep, and ends here."""


def check_mode(mode: str) -> str:
    """The mode, if it is one. Raises UserError for any other."""
    if mode not in MODES:
        raise UserError(f"Tracking mode {mode!r} is not one of {', '.join(MODES)}.")
    return mode


class Tracker:
    """Logs a run's numbers. Offline needs no account: the files can be uploaded later with `wandb sync`. Use as a
    context manager; in mode `off` it does nothing and does not even import wandb."""

    def __init__(self, mode: str, folder: Path, config: dict, name: str = "", group: str = "") -> None:
        self._run, self._best, self._stop = None, math.inf, False
        if check_mode(mode) == "off":
            return
        quiet = mode == "offline"  # online it says where the run is seen, and what goes wrong
        if quiet:
            os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        with user_errors("W&B could not start", "Log in with 'wandb login', or use mode offline.", wandb.Error):
            self._run = wandb.init(
                mode=mode, dir=folder, project=PROJECT, name=name or None, group=group or None, config=config,
                id=os.urandom(4).hex() if name else None,  # of each trial, whatever WANDB_RUN_ID says
                reinit="create_new", settings=wandb.Settings(silent=quiet, console="off", stop_fn=self.stop),
            )  # fmt: skip

    def log(self, row: dict) -> None:
        """A row of a training's metrics: every validation, and every twentieth update.
        Raises Stopped once W&B has asked for the end."""
        if self._stop:
            raise Stopped("stopped early")
        if self._run is not None and ("validation_loss" in row or row["update"] % 20 == 0):
            values = {name: row[name] for name in ("loss", "learning_rate", "validation_loss") if name in row}
            self._best = min(self._best, values.get("validation_loss", math.inf))
            self._run.log(values, step=row["update"], commit="validation_loss" in row)  # else it would go over the best

    def stop(self, *_) -> None:
        """End at the next row."""
        self._stop = True

    def summary(self, **values) -> None:
        """The numbers that stand for the whole run."""
        if self._run is not None:
            self._run.summary.update(values)
            self._best = min(self._best, values.get("best_loss", math.inf))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self._run is not None:
            if math.isfinite(self._best):
                self._run.summary["validation_loss"] = self._best  # what W&B compares runs by; its own is the last
            self._run.finish(exit_code=int(kind not in (None, Stopped)))
            self._run = None
