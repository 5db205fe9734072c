"""From a trained model to a file that answers without this package: TorchScript."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.decoding import GreedySearch
from helpers.model import Seq2Seq
from helpers.run import atomic_write, shown
from helpers.settings import UserError
from helpers.text import Vocabulary

EXTRA_FILES = ("vocabulary.json", "limits.json")


class Deployed(nn.Module):
    """What is exported: the greedy search, and the scoring of given responses."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.search = GreedySearch(model)

    def forward(self, query: Tensor, lengths: Tensor, max_words: int) -> Tensor:
        """Greedy replies, as GreedySearch gives them."""
        return self.search(query, lengths, max_words)

    @torch.jit.export
    def token_logits(self, query: Tensor, query_lengths: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
        """Teacher-forced logits, as Seq2Seq.token_logits gives them."""
        return self.search.model.token_logits(query, query_lengths, inputs, mask)


def script(model: Seq2Seq) -> torch.jit.ScriptModule:
    """The whole greedy search as TorchScript, loop and early stop included, and the scoring beside it.

    Called as scripted(query, lengths, max_words). TorchScript is deprecated in current PyTorch; the warning that
    says so is left out here, the notebook says it in words.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        return torch.jit.script(Deployed(model).eval())


def save_scripted(path: Path, scripted: torch.jit.ScriptModule, vocabulary: Vocabulary, max_words: int) -> None:
    """Write the scripted search with its vocabulary inside, so that one file is all that a server needs."""
    extra = {"vocabulary.json": vocabulary.to_json(), "limits.json": json.dumps({"max_words": max_words})}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(scripted, buffer, _extra_files=extra)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def load_scripted(path: Path, device: torch.device) -> tuple[torch.jit.ScriptModule, Vocabulary, int]:
    """The module, the vocabulary and the longest reply of a file that `save_scripted` wrote.

    A scripted file is a program: load only what you made or trust. Raises UserError if it is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{shown(path)} is missing: notebook 07_torchscript_and_latency makes it. Run that first.")
    extra = dict.fromkeys(EXTRA_FILES, "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.load(str(path), map_location=device, _extra_files=extra)
        limits = json.loads(extra["limits.json"])
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{shown(path)} cannot be loaded ({reason}). Run notebook 07 again to make it.") from None
    return scripted, Vocabulary.from_json(extra["vocabulary.json"]), int(limits["max_words"])
