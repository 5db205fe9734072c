"""One door to Weights & Biases: online with an account, offline without, or off."""

from __future__ import annotations

import os
from pathlib import Path

from helpers.settings import UserError

MODES = ("off", "offline", "online")


class Tracker:
    """Logs a run's numbers. Offline needs no account: the files can be uploaded later with `wandb sync`.

    Use as a context manager; in mode `off` it does nothing and does not even import wandb.
    """

    def __init__(self, mode: str, folder: Path, config: dict, *, name: str = "", group: str = "") -> None:
        if mode not in MODES:
            raise UserError(f"Tracking mode {mode!r} is not one of {', '.join(MODES)}.")
        self._run = None
        if mode == "off":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                mode=mode,
                dir=folder,
                project="chatbot-notebooks",
                name=name or None,
                group=group or None,
                config=config,
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise UserError(f"W&B could not start ({error}). Log in with 'wandb login', or use mode offline.") from None

    def log(self, values: dict, update: int) -> None:
        """Numbers by name, at a training update."""
        if self._run is not None:
            self._run.log(values, step=update)

    def summary(self, **values) -> None:
        """The numbers that stand for the whole run."""
        if self._run is not None:
            self._run.summary.update(values)

    @property
    def folder(self) -> Path | None:
        """Where an offline run's files lie."""
        return Path(self._run.dir).parent if self._run is not None else None

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_) -> None:
        self.finish()
