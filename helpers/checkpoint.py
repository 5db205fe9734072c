"""Saving and loading a training's state, safely (no code in a checkpoint can run) and exactly."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.model import Seq2Seq
from helpers.run import atomic_write, shown
from helpers.settings import Settings, UserError
from helpers.text import Vocabulary

FORMAT = 1
KEYS = {"format", "settings", "vocabulary", "digest", "precision", "model", "best_model", "optimizer", "progress"}


def save(path: Path, state: dict) -> None:
    """Write the state in one piece: either the new checkpoint is there, whole, or the old one is."""
    with atomic_write(path) as file:
        torch.save(state | {"format": FORMAT}, file)


def load(path: Path) -> dict:
    """The state that `save` wrote, on the CPU. Nothing but tensors and plain values is unpickled.

    Raises UserError if the file is missing, damaged, or not a checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(
            f"{shown(path)} is missing: notebook 03_training or 'python -m helpers train' makes it. Run that first."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for damaged and for hostile files
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"{shown(path)} cannot be loaded ({reason}). Use another checkpoint, or train again.") from None
    if not isinstance(state, dict) or set(state) != KEYS or state["format"] != FORMAT:
        raise UserError(f"{shown(path)} is not a checkpoint of this project in format {FORMAT}. Train again.")
    return state


def load_model(path: Path, device: torch.device) -> tuple[Seq2Seq, Vocabulary, Settings]:
    """The model with the best validation loss, ready to answer, with its vocabulary and settings."""
    state = load(path)
    settings = Settings().change(**state["settings"])
    vocabulary = Vocabulary.from_json(state["vocabulary"])
    model = Seq2Seq(settings, len(vocabulary))
    try:
        model.load_state_dict(state["best_model"])
    except RuntimeError as error:
        raise UserError(f"{shown(path)} does not fit its own settings: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), vocabulary, settings
