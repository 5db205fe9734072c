"""From a trained model to one that answers fast, and without this package: TorchScript, and what comes after it."""

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers.decoding import GreedySearch, never_spoken
from helpers.model import Memory, Seq2Seq
from helpers.run import atomic_write, display_path, require
from helpers.settings import UserError, user_errors
from helpers.text import EOS, PAD, SOS, Vocabulary

Runner = Callable[..., tuple[Tensor, ...]]


def script(model: Seq2Seq) -> torch.jit.ScriptModule:
    """The whole greedy search as TorchScript, loop and early stop included. Called as scripted(query, lengths,
    max_words); scripted.model is the scripted model, to be evaluated as any other. TorchScript is deprecated in current
    PyTorch; the warning that says so is left out here, the notebook says it in words."""
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(GreedySearch(model).eval())


def save_scripted(path: Path, scripted: torch.jit.ScriptModule, vocabulary: Vocabulary, max_words: int) -> None:
    """Write the scripted search with its vocabulary inside, so that one file is all that a server needs."""
    extra = {"vocabulary.json": vocabulary.to_json(), "limits.json": json.dumps({"max_words": max_words})}
    with atomic_write(path) as file, warnings.catch_warnings(action="ignore"):
        torch.jit.save(scripted, file, _extra_files=extra)


def load_scripted(path: Path, device: torch.device) -> tuple[torch.jit.ScriptModule, Vocabulary, int]:
    """The module, the vocabulary and the longest reply of a file that `save_scripted` wrote.
    A scripted file is a program: load only what you made or trust. Raises UserError if it is missing or damaged."""
    require(path, "notebook 07_torchscript_and_latency")
    extra = {"vocabulary.json": "", "limits.json": ""}
    kinds = (RuntimeError, ValueError, TypeError, KeyError, UserError)
    with user_errors(f"{display_path(path)} cannot be loaded", "Run notebook 07 again to make it.", *kinds):
        with warnings.catch_warnings(action="ignore"):
            scripted = torch.jit.load(str(path), map_location=device, _extra_files=extra)
        max_words = int(json.loads(extra["limits.json"])["max_words"])
        return scripted, Vocabulary.from_json(extra["vocabulary.json"]), max_words


def quantised(model: Seq2Seq) -> Seq2Seq:
    """A copy with the weights of GRUs and linear layers in int8, and their inputs rounded as they come: for CPUs."""
    with warnings.catch_warnings(action="ignore"):  # deprecated, as TorchScript is
        return torch.ao.quantization.quantize_dynamic(model, {nn.GRU, nn.Linear}, dtype=torch.qint8)


class Steps(nn.Module):
    """`count` steps of greedy search, plain tensors in and out, nothing that depends on data: what compilers want.
    The GRU is computed cell by cell, since the packed many-step one neither compiles nor exports."""

    def __init__(self, model: Seq2Seq, count: int = 1) -> None:
        super().__init__()
        self.model, self.count = model.eval(), count
        never = never_spoken(model.output.out_features).to(model.embedding.weight.device)
        self.register_buffer("never", never, persistent=False)

    def forward(
        self, words: Tensor, ended: Tensor, hidden: Tensor, attentional: Tensor,
        states: Tensor, keys: Tensor, mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The parts of State and Memory in; ids (batch, count) out, and words, ended, hidden, attentional after them.
        words (batch,) were just said, ended (batch,) is True where a reply is over."""
        model, gru, spoken = self.model, self.model.decoder.gru, []
        for _ in range(self.count):
            step, layers = model.embedding(words), []
            if model.decoder.input_feeding:
                step = torch.cat([step, attentional], 1)
            for weights, state in zip(gru.all_weights, hidden, strict=True):
                step = torch.gru_cell(step, state, *weights)
                layers.append(step)
            hidden = torch.stack(layers)
            attentional = model.decoder.attend(step.unsqueeze(1), Memory(states, keys, mask))[0][:, 0]
            words = (model.output(attentional) + self.never).argmax(1).masked_fill(ended, PAD)
            ended = ended | (words == EOS)
            spoken.append(words)
        return torch.stack(spoken, 1), words, ended, hidden, attentional


class BlockSearch:
    """Greedy search around `Steps` that `build` has made fast; the packed encoder and the early exit stay outside.
    Queries are padded to `longest_query`, so that `build(steps, example)` is called once a batch size."""

    def __init__(self, model: Seq2Seq, build: Callable[..., Runner], longest_query: int, count: int = 1) -> None:
        self.steps, self.build, self.longest_query = Steps(model, count), build, longest_query
        self.runs: dict[tuple[int, int], Runner] = {}

    @torch.no_grad()
    def __call__(self, query: Tensor, lengths: Tensor, max_words: int) -> Tensor:
        """What GreedySearch takes and gives; whole blocks are computed, so PAD columns may follow the last EOS."""
        memory, state = self.steps.model.encode(query, lengths)
        more = max(self.longest_query - query.size(1), 0)
        parts = [functional.pad(memory.states, (0, 0, 0, more)), functional.pad(memory.keys, (0, 0, 0, more))]
        parts.append(functional.pad(memory.mask, (0, more)))
        words = torch.full_like(query[:, 0], SOS)
        now = [words, torch.zeros_like(words, dtype=torch.bool), *state]
        shape = tuple(parts[-1].shape)
        if shape not in self.runs:
            self.runs[shape] = self.build(self.steps, (*now, *parts))
        spoken = []
        for _ in range(0, max_words, self.steps.count):
            block, *now = self.runs[shape](*now, *parts)
            spoken.append(block.clone())  # a captured graph writes its next block to the same place
            if bool(now[1].all()):
                break
        return torch.cat(spoken, 1)[:, :max_words]


def compiled(steps: Steps, example: tuple[Tensor, ...]) -> Runner:
    """By torch.compile, when first called."""
    torch._dynamo.config.allow_rnn = True  # the steps read an nn.GRU's weights, they do not call it
    torch._dynamo.config.recompile_limit = 64  # one compilation a batch size, remainders included
    return torch.compile(steps, dynamic=False, fullgraph=True)


def exported(steps: Steps, example: tuple[Tensor, ...]) -> Runner:
    """By torch.export and AOTInductor: a library that C++ can call too, loaded back here."""
    quiet = warnings.catch_warnings(action="ignore", category=FutureWarning)  # PyTorch's about its own pytrees
    with tempfile.TemporaryDirectory() as folder, quiet:
        program = torch.export.export(steps, example)
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/steps.pt2")
        return torch._inductor.aoti_load_package(package)


def captured(steps: Steps, example: tuple[Tensor, ...]) -> Runner:
    """As a CUDA graph: all kernels of a block are launched at once, on tensors that stay where they are."""
    places = [part.clone() for part in example]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries set themselves up now, which a capture does not allow
            steps(*places)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = steps(*places)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return results

    return run
