"""Saving and loading a training's state, safely (no code in a checkpoint can run) and exactly."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.model import Seq2Seq
from helpers.run import need, read_tensors, shown, write_tensors
from helpers.settings import Settings, UserError, refusing
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
    need(path, "notebook 03_training or 'python -m helpers train'")
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
    kinds = (UserError, RuntimeError, TypeError, KeyError, AttributeError)
    with refusing(f"{shown(path)} does not fit its own settings", "Use another one.", *kinds):
        settings = Settings().change(**state["settings"])
        vocabulary = Vocabulary.from_json(state["vocabulary"])
        weights = state["best_model"] if state["progress"]["best_update"] else state["model"]
        with torch.device("meta"):  # its shapes alone: settings that lie must not take memory
            shapes = {name: tensor.shape for name, tensor in Seq2Seq(settings, len(vocabulary)).state_dict().items()}
        if {name: tensor.shape for name, tensor in weights.items()} != shapes:
            raise UserError("the weights are of other shapes")
        model = Seq2Seq(settings, len(vocabulary))
        model.load_state_dict(weights)
    return model.to(device).eval(), vocabulary, settings
