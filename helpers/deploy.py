"""From a trained model to one that answers fast, and without this package: TorchScript, and what comes after it."""

import base64
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
from helpers.run import ROOT, Run, atomic_write, display_path, require
from helpers.settings import UserError, user_errors
from helpers.text import EOS, PAD, SOS, Vocabulary
from helpers.training import load_model

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
        for gru in scripted.modules() if device.type == "cuda" else []:
            if hasattr(gru, "_flat_weights"):  # in one piece, as cuDNN wants them: else it copies them at every call
                inputs, hidden = (weights.size(1) for weights in gru._flat_weights[:2])
                torch._cudnn_rnn_flatten_weight(gru._flat_weights, 4, inputs, 3, hidden, 0, 1, True, False)
        max_words = int(json.loads(extra["limits.json"])["max_words"])
        return scripted, Vocabulary.from_json(extra["vocabulary.json"]), max_words


def page(run: Run, precision: str) -> str:
    """`deploy/page.html` with the run's bot in it, in `half` precision or with matrices in `int8` and a scale a row."""
    model, vocabulary, settings, examples = load_model(run.checkpoint, torch.device("cpu"))
    source = run.facts().get("corpus", {}).get("source", "")  # one that we know by name, or somebody's path
    bot = {"corpus": Path(source).name, "own": Path(source).is_absolute(), "settings": settings.to_dict()}
    bot |= {"vocabulary": vocabulary.to_json(), "examples": examples, "precision": precision, "weights": {}}
    for name, weight in model.requires_grad_(False).named_parameters():
        parts = [weight.half()]
        if precision == "int8" and weight.dim() == 2:
            scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
            parts = [scale, (weight / scale).round().to(torch.int8)]
        bot["weights"][name] = weight.shape, base64.b64encode(b"".join(p.numpy().tobytes() for p in parts)).decode()
    text = json.dumps(bot).replace("<", "\\u003c")  # no word of the vocabulary ends the script
    return (ROOT / "deploy" / "page.html").read_text(encoding="utf-8").replace(">null<", f">{text}<")


def quantised(model: Seq2Seq) -> Seq2Seq:
    """A copy with the weights of GRUs and linear layers in int8, and their inputs rounded as they come: for CPUs."""
    with warnings.catch_warnings(action="ignore"):  # deprecated, as TorchScript is
        return torch.ao.quantization.quantize_dynamic(model, {nn.GRU, nn.Linear}, dtype=torch.qint8)


class Steps(nn.Module):
    """`count` steps of greedy search, plain tensors in and out, nothing that depends on data: what compilers want.
    The GRU is computed cell by cell, since the many-step one neither compiles nor exports."""

    def __init__(self, model: Seq2Seq, count: int = 1) -> None:
        super().__init__()
        self.model, self.count = model.eval(), count
        never = never_spoken(model.output.out_features, model.embedding.weight.device)
        self.register_buffer("never", never, persistent=False)

    def forward(
        self, words: Tensor, ended: Tensor, hidden: Tensor, attentional: Tensor,
        states: Tensor, keys: Tensor, padding: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The parts of State and Memory in; ids (batch, count) out, and words, ended, hidden, attentional after them.
        words (batch,) were just said, ended (batch,) is True where a reply is over."""
        model, spoken = self.model, []
        for _ in range(self.count):
            step, layers = model.embedding(words), []
            if model.decoder.input_feeding:
                step = torch.cat([step, attentional], 1)
            for layer, state in zip(model.decoder.grus, hidden, strict=True):
                step = cell(step, state, layer)
                layers.append(step)
            hidden = torch.stack(layers)
            attentional = model.decoder.attend(step.unsqueeze(1), Memory(states, keys, padding))[0][:, 0]
            words = (model.output(attentional) + self.never).argmax(1).masked_fill(ended, PAD)
            ended = ended | (words == EOS)
            spoken.append(words)
        return torch.stack(spoken, 1), words, ended, hidden, attentional


def cell(inputs: Tensor, state: Tensor, layer: nn.GRU) -> Tensor:
    """One step of a GRU of one layer: inputs (batch, input) and state (batch, hidden) to the state after them.
    Where a compiler reads it, the gates are written out, as in nn.GRU's documentation, so that it can fuse them."""
    weights = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0
    if not torch.compiler.is_compiling():
        return torch.gru_cell(inputs, state, *weights)
    from_inputs = functional.linear(inputs, weights[0], weights[2]).chunk(3, 1)
    from_state = functional.linear(state, weights[1], weights[3]).chunk(3, 1)
    reset, update = (torch.sigmoid(from_inputs[gate] + from_state[gate]) for gate in (0, 1))
    new = torch.tanh(from_inputs[2] + reset * from_state[2])
    return (1 - update) * new + update * state


class BlockSearch:
    """Greedy search around `Steps` that `build` has made fast, `build_encoder` the encoder; the early exit is outside.
    Queries are padded to `longest_query`, so that each is built once a batch size, by build(function, example)."""

    def __init__(
        self, model: Seq2Seq, build: Callable[..., Runner], longest_query: int, count: int = 1,
        build_encoder: Callable[..., Runner] | None = None,
    ) -> None:  # fmt: skip
        self.steps, self.build, self.build_encoder = Steps(model, count), build, build_encoder
        self.longest_query, self.runs = longest_query, {}

    @torch.no_grad()
    def __call__(self, query: Tensor, lengths: Tensor, max_words: int) -> Tensor:
        """What GreedySearch takes and gives; whole blocks are computed, so PAD columns may follow the last EOS."""
        query = functional.pad(query, (0, max(self.longest_query - query.size(1), 0)), value=PAD)
        asked = query, lengths.to(query.device)
        if query.shape not in self.runs:
            build = self.build_encoder or (lambda work, example: work)
            encode = build(self.begin, tuple(part.clone() for part in asked))
            self.runs[query.shape] = encode, self.build(self.steps, encode(*asked))
        encode, steps = self.runs[query.shape]
        *now, states, keys, padding = encode(*asked)
        spoken = []
        for _ in range(0, max_words, self.steps.count):
            block, *now = steps(*now, states, keys, padding)
            spoken.append(block.clone())  # a captured graph writes its next block to the same place
            if bool(now[1].all()):
                break
        return torch.cat(spoken, 1)[:, :max_words]

    def begin(self, query: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """query (batch, query time) and lengths (batch,) to what `Steps` takes."""
        memory, state = self.steps.model.encode(query, lengths)
        words = torch.full_like(query[:, 0], SOS)
        return (words, torch.zeros_like(words, dtype=torch.bool), *state, *memory)


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


def captured(work: Callable[..., tuple[Tensor, ...]], example: tuple[Tensor, ...]) -> Runner:
    """As a CUDA graph: all kernels of `work` are launched at once, on tensors that stay where `example`'s are."""
    places = list(example)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries set themselves up now, which a capture does not allow
            work(*places)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work(*places)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        for place, value in zip(places, inputs, strict=True):
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)
        graph.replay()
        return results

    return run
