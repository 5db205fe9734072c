"""Saving and loading a training's state, safely (no code in a checkpoint can run) and exactly."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.model import Seq2Seq
from helpers.run import read_tensors, shown, write_tensors
from helpers.settings import Settings, UserError
from helpers.text import Vocabulary

FORMAT = 1
KINDS = {
    "format": int, "settings": dict, "vocabulary": str, "digest": str, "precision": str, "model": dict,
    "best_model": dict, "optimizer": dict, "progress": dict,
}  # fmt: skip


def save(path: Path, state: dict) -> None:
    """Write the state in one piece: either the new checkpoint is there, whole, or the old one is."""
    write_tensors(path, state | {"format": FORMAT})


def load(path: Path) -> dict:
    """The state that `save` wrote, on the CPU. Nothing but tensors and plain values is unpickled.

    Raises UserError if the file is missing, damaged, or not a checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(
            f"{shown(path)} is missing: notebook 03_training or 'python -m helpers train' makes it. Run that first."
        )
    state = read_tensors(path, "Use another checkpoint, or train again.")
    fits = set(state) == set(KINDS) and all(isinstance(state[key], kind) for key, kind in KINDS.items())
    if not fits or state["format"] != FORMAT:
        raise UserError(f"{shown(path)} is not a checkpoint of this project in format {FORMAT}. Train again.")
    return state


def load_model(path: Path, device: torch.device) -> tuple[Seq2Seq, Vocabulary, Settings]:
    """The model with the best validation loss, ready to answer, with its vocabulary and settings.

    Of a training that was stopped before its first validation, the model as it was then. Raises UserError if the file
    is missing, damaged, or does not fit its own settings.
    """
    state = load(path)
    try:
        settings = Settings().change(**state["settings"])
        vocabulary = Vocabulary.from_json(state["vocabulary"])
        weights = state["best_model"] if state["progress"]["best_update"] else state["model"]
        with torch.device("meta"):  # its shapes alone: settings that lie must not take memory
            shapes = {name: tensor.shape for name, tensor in Seq2Seq(settings, len(vocabulary)).state_dict().items()}
        if {name: tensor.shape for name, tensor in weights.items()} != shapes:
            raise UserError("the weights are of other shapes")
        model = Seq2Seq(settings, len(vocabulary))
        model.load_state_dict(weights)
    except (UserError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{shown(path)} does not fit its own settings ({reason}). Use another one.") from None
    return model.to(device).eval(), vocabulary, settings
