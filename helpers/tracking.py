"""One door to Weights & Biases: online with an account, offline without, or off."""

import netrc
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from helpers.settings import UserError, user_errors

MODES = ("off", "offline", "online")
PROJECT = "chatbot-notebooks"


def logged_in() -> bool:
    """Whether there is a W&B login: WANDB_API_KEY, or what `wandb login` has written for W&B's server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb  # whose own login() asks the server, and waits for it where there is no network

    host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def create_sweep(spec: dict) -> str:
    """Register a sweep with W&B and return its path, `[entity/]project/id`. Raises UserError if W&B refuses."""
    import wandb

    entity, project = spec.get("entity"), spec.get("project", PROJECT)
    with user_errors("W&B did not take the sweep", "Mend that, or add --wandb offline.", wandb.Error, ValueError):
        return "/".join(filter(None, [entity, project, wandb.sweep(spec, project=project, entity=entity)]))


def run_agent(sweep: str, folder: Path) -> None:
    """Work on a W&B sweep until it is done: each trial is the command of the sweep's file, with `folder`'s data."""
    own = {"CHATBOT_RUN": str(folder.absolute()), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "wandb", "agent", sweep if "/" in sweep else f"{PROJECT}/{sweep}"]
    if subprocess.run(command, env=os.environ | own, check=False).returncode:
        raise UserError(f"The W&B agent of sweep {sweep} has failed; its own message stands above.")


def check_mode(mode: str) -> str:
    """The mode, if it is one. Raises UserError for any other."""
    if mode not in MODES:
        raise UserError(f"Tracking mode {mode!r} is not one of {', '.join(MODES)}.")
    return mode


class Tracker:
    """Logs a run's numbers. Offline needs no account: the files can be uploaded later with `wandb sync`. Use as a
    context manager; in mode `off` it does nothing and does not even import wandb."""

    def __init__(self, mode: str, folder: Path, config: dict, name: str = "", group: str = "") -> None:
        self._run = None
        if check_mode(mode) == "off":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        with user_errors("W&B could not start", "Log in with 'wandb login', or use mode offline.", wandb.Error):
            self._run = wandb.init(
                mode=mode, dir=folder, project=PROJECT, name=name or None, group=group or None, config=config,
                reinit="create_new", settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip

    def log(self, row: dict) -> None:
        """A row of a training's metrics: every validation, and every twentieth update."""
        if self._run is not None and ("validation_loss" in row or row["update"] % 20 == 0):
            values = {name: row[name] for name in ("loss", "learning_rate", "validation_loss") if name in row}
            self._run.log(values, step=row["update"])

    def summary(self, **values) -> None:
        """The numbers that stand for the whole run."""
        if self._run is not None:
            self._run.summary.update(values)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
