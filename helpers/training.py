"""Training: one update, the loop around it, and checkpoints from which it resumes exactly."""

import copy
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from helpers.batches import BucketedSampler, Pairs, Prepared
from helpers.evaluation import batch_loss, evaluate
from helpers.model import Seq2Seq, new_model, parameter_count
from helpers.run import Run, choose_device, digest, display_path, products, read_tensors, timings, write_tensors
from helpers.settings import Count, Settings, UserError, user_errors
from helpers.text import PAD, Vocabulary

FORMAT = 5  # of checkpoint.pt
# Raised by whoever changes what the same settings and data train to: an older checkpoint is then not resumed.
MATHEMATICS = 3
# What another value of changes nothing that was trained before, and what decides the weights' shapes.
LATER = {"updates": 1, "patience": 0, "validate_every": 1, "decline_below": 0.0}
SHAPES = ("embedding_size", "hidden_size", "layers", "attention", "input_feeding", "tie_weights")
STRICT = ConfigDict(strict=True, extra="forbid")


class NotFiniteError(UserError):
    """A loss or a gradient that is infinite or no number: the settings are to blame, nothing else."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a training; the message says which checkpoint is kept."""

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]


@dataclass(config=STRICT)
class Progress:
    """How far a training has come; part of the checkpoint."""

    update: Count = 0
    best_loss: float = math.inf
    best_update: int = 0
    stale: int = 0  # validations since the best

    def over(self, settings: Settings) -> bool:
        """Whether nothing is left to train."""
        return self.update >= settings.updates or 0 < settings.patience <= self.stale

    def is_best(self, loss: float) -> bool:
        """Take note of a validation loss; returns whether it is the best until now."""
        self.stale += 1
        if loss < self.best_loss:
            self.best_loss, self.best_update, self.stale = loss, self.update, 0
        return self.stale == 0


@dataclass(config=STRICT)
class Checkpoint:
    """All that a training needs to go on, and a bot to answer."""

    settings: dict
    vocabulary: str  # as JSON
    examples: list[str]  # queries that the bot was trained on
    digest: str  # of what it was trained from
    precision: str
    model: dict
    average: dict  # of the weights, if the settings ask for one; else the weights
    best_model: dict  # of these, those with the lowest validation loss
    optimizer: dict
    progress: dict

    def words(self) -> Vocabulary:
        """Its vocabulary."""
        return Vocabulary.from_json(self.vocabulary)

    def shaped(self, settings: Settings) -> Settings:
        """These settings for a training that starts from its weights."""
        return settings.change(**{name: self.settings[name] for name in SHAPES})

    def save(self, path: Path) -> None:
        """Write it in one piece: either the new checkpoint is there, whole, or the old one is."""
        write_tensors(path, FORMAT, vars(self))

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """What `save` wrote, on the CPU. Raises UserError if the file is missing, damaged, or no checkpoint."""
        state = read_tensors(path, FORMAT, "notebook 03_training or 'python -m helpers train'")
        with user_errors(f"{display_path(path)} is not a checkpoint", "Train again.", TypeError, ValueError):
            return cls(**state)


def load_model(path: Path, device: torch.device) -> tuple[Seq2Seq, Vocabulary, Settings, list[str]]:
    """The model with the best validation loss, ready to answer, with its vocabulary, settings and examples of queries.
    Raises UserError if the file is missing, damaged, or does not fit its own settings."""
    state = Checkpoint.load(path)
    kinds = (UserError, RuntimeError, TypeError, KeyError, AttributeError)
    with user_errors(f"{display_path(path)} does not fit its own settings", "Use another one.", *kinds):
        settings, vocabulary = Settings(**state.settings), state.words()
        with torch.device("meta"):  # first into a model of shapes alone: settings that lie must not take memory
            Seq2Seq(settings, len(vocabulary)).load_state_dict(state.best_model, assign=True)
        model = Seq2Seq(settings, len(vocabulary))
        model.load_state_dict(state.best_model)
    return model.to(device).eval(), vocabulary, settings, state.examples


def new_optimizer(model: Seq2Seq, settings: Settings) -> torch.optim.Optimizer:
    """One optimiser; the decoder's own parameters learn `decoder_learning_ratio` times as fast.
    A parameter belongs to one group only: the embedding, which both sides use, to the first."""
    first = ("embedding.", "encoder.")
    slow = [parameter for name, parameter in model.named_parameters() if name.startswith(first)]
    fast = [parameter for name, parameter in model.named_parameters() if not name.startswith(first)]
    groups = [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": settings.decoder_learning_ratio}]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.optimizer]
    return kind(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def learning_rate(settings: Settings, update: int) -> float:
    """The rate of an update, counted from 0: linear warm-up, then constant or half a cosine down to 0."""
    rate = settings.learning_rate
    if update < settings.warmup_updates:
        return rate * (update + 1) / settings.warmup_updates
    if settings.schedule == "cosine":
        share = (update - settings.warmup_updates) / max(settings.updates - settings.warmup_updates, 1)
        return rate * 0.5 * (1 + math.cos(math.pi * share))
    return rate


def choose_precision(model: Seq2Seq, settings: Settings, pairs: Pairs) -> str:
    """The precision that `settings` name; for `auto`, of those with units here, that of the fastest real updates."""
    device, cuda = model.embedding.weight.device, model.embedding.weight.is_cuda
    if settings.precision == "tf32" and not cuda:
        raise UserError(f"precision=tf32 is a way of GPUs, not of {device}: choose fp32, bf16 or auto.")
    units = any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
    halves = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else units
    candidates = ["fp32"] + ["tf32"] * cuda + ["bf16"] * halves
    if settings.precision != "auto" or len(candidates) == 1:
        return settings.precision.replace("auto", "fp32")
    pairs, taken = pairs.to(device), {}
    indices = BucketedSampler(pairs, settings.batch_size, settings.seed).epoch(0)[0]
    with torch.random.fork_rng():
        for precision in candidates:
            trainer = Trainer(copy.deepcopy(model).to(device).train(), settings, precision)
            taken[precision] = min(timings(lambda trainer=trainer: trainer.step(pairs, indices, 0), device, 4))
    return min(taken, key=taken.get)


class Launched(NamedTuple):
    """An update that was launched, and its figures, which a GPU sends when it has come so far."""

    update: int
    indices: Tensor
    facts: dict[str, float]  # known beforehand: learning rate and tokens
    figures: Tensor  # loss and gradient norm, (2,), on the CPU
    arrived: torch.cuda.Event | None

    def row(self) -> dict[str, float]:
        """Loss, gradient norm, learning rate and tokens. Waits for them.
        Raises FloatingPointError if loss or gradient is not finite: the optimiser has then skipped the update."""
        if self.arrived:
            self.arrived.synchronize()
        loss, norm = self.figures.tolist()
        if not math.isfinite(loss + norm):
            what = f"the loss is {loss} and the gradient norm {norm}"
            raise FloatingPointError(f"Update {self.update + 1}: {what}, on examples {self.indices[:8].tolist()} …")
        return {"loss": loss, "gradient_norm": norm, **self.facts}


class Recorder:
    """Work on a GPU, recorded as one CUDA graph for each shape: the first time it runs as it is, and libraries set
    themselves up; the second time it is recorded; from then on all its kernels are launched at once."""

    def __init__(self, work: Callable[..., Tensor]) -> None:
        self.work, self.graphs = work, {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, pairs: Pairs, rows: Tensor, *shape) -> Tensor:
        """What work(pairs, rows, *shape) gives; the next call overwrites it."""
        key = (pairs.queries.data_ptr(), rows.shape, *shape)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if key not in self.graphs:
                self.graphs[key], result = None, self.work(pairs, rows, *shape)
            else:
                if self.graphs[key] is None:
                    graph, place = torch.cuda.CUDAGraph(), rows.clone()
                    with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                        result = self.work(pairs, place, *shape)
                    self.graphs[key] = graph, place, result
                graph, place, result = self.graphs[key]
                place.copy_(rows)
                graph.replay()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result


class Trainer:
    """A model, its optimiser and how they learn; `step` is one update.
    In bf16 a second model computes: before each update it takes over the weights, rounded to 16 bits, and it gives its
    gradients back; the weights that learn keep their 32 bits (arXiv:1710.03740, section 3.1)."""

    def __init__(self, model: Seq2Seq, settings: Settings, precision: str = "fp32") -> None:
        self.model, self.settings, self.precision = model, settings, precision
        self.optimizer = new_optimizer(model, settings)
        self.computing, self.parameters, self.rounded = model, list(model.parameters()), []
        self.average = copy.deepcopy(model) if settings.average else model
        if precision == "bf16":
            self.computing = copy.deepcopy(model).bfloat16().train()
            self.rounded = list(self.computing.parameters())
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        self.update, self.rates = self.learn, [None for _ in self.optimizer.param_groups]
        if settings.cuda_graphs and model.embedding.weight.is_cuda and ranks()[1] == 1:
            self.update = Recorder(self.learn)  # which reads each rate from one place
            self.rates = [torch.zeros((), device=model.embedding.weight.device) for _ in self.rates]

    def step(self, pairs: Pairs, indices: Tensor, update: int) -> dict[str, float]:
        """One update on the examples `indices`: loss, gradient norm, learning rate and tokens.
        Raises FloatingPointError if loss or gradient is not finite: the optimiser has then left the weights alone."""
        return self.launch(pairs, indices, update).row()

    def launch(self, pairs: Pairs, indices: Tensor, update: int) -> Launched:
        """The same without waiting for a GPU to come so far.
        All random numbers are a function of the seed and the update (counted from 0), so none need saving."""
        settings, rank = self.settings, ranks()[0]
        torch.manual_seed(settings.seed * 1_000_003 + update + (rank << 48))
        teacher_forcing = random.Random(f"{settings.seed} {update}").random() < settings.teacher_forcing_ratio
        rate = learning_rate(settings, update)
        for group, place in zip(self.optimizer.param_groups, self.rates, strict=True):
            own = rate * group["ratio"]
            group |= {"lr": own if place is None else place.fill_(own), "capturable": place is not None}
        with products(self.precision):
            figures = self.update(pairs, pairs.upload(indices), *pairs.shape(indices), teacher_forcing)
            figures = figures.to("cpu", non_blocking=True)
        if settings.average:  # the decay grows at first, so that the first weights are soon forgotten
            share = 1 - min(settings.average, (1 + update) / (10 + update))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), self.parameters, share)
        facts = {"learning_rate": rate, "tokens": int(pairs.response_lengths[indices].sum())}
        arrived = torch.cuda.current_stream().record_event() if pairs.queries.is_cuda else None
        return Launched(update, indices, facts, figures, arrived)

    def learn(self, pairs: Pairs, rows: Tensor, query_time: int, response_time: int, forced: bool) -> Tensor:
        """An update on uploaded `rows` (2, batch): forward, backward, optimiser, all on the device that holds them.
        Of several processes each takes every so-many-th example. Returns loss and gradient norm, (2,)."""
        settings, (rank, world) = self.settings, ranks()
        idle = rank >= rows.size(1)  # more processes than examples: this one works for nothing
        batch = pairs.batch_of(rows[:, :1] if idle else rows[:, rank::world], query_time, response_time)
        batch = batch.with_dropout(settings.query_dropout, settings.word_dropout, settings.strange_queries)
        if self.rounded:
            with torch.no_grad():
                torch._foreach_copy_(self.rounded, self.parameters)
        self.computing.zero_grad()
        total, tokens = batch_loss(self.computing, batch, forced)
        if idle:
            total, tokens = total * 0, tokens * 0
        if world > 1:
            dist.all_reduce(tokens)
        loss = total / tokens
        loss.backward()
        if self.rounded:
            gradients = ([parameter.grad for parameter in some] for some in (self.parameters, self.rounded))
            torch._foreach_copy_(*gradients)
        if world > 1:
            all_reduce(self.model, loss.detach())
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters])
        # The fused optimisers divide gradients by the one and skip the update for the other, with no pass of their own.
        self.optimizer.grad_scale = (norm / settings.clip).clamp(min=1) if settings.clip else None
        self.optimizer.found_inf = ((loss + norm) * 0 != 0).float()  # 0 for what is finite, NaN for all else
        self.optimizer.step()
        return torch.stack([loss.detach(), norm])


def all_reduce(model: nn.Module, loss: Tensor) -> None:
    """Add up all processes' gradients and losses, in place. Each has divided its share's sum by the tokens of
    the whole batch, so these are what one process alone gets, but for dropout, which each draws for itself."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    dist.all_reduce(loss)


def join_processes(device: torch.device) -> torch.device:
    """Under torchrun: meet the other processes (NCCL on GPUs, gloo on CPUs) and return this one's device."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def ranks() -> tuple[int, int]:
    """This process's rank and the number of processes that train together under torchrun: (0, 1) for one alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast(value):
    """The first process's value, in all of them: what decides must be the same everywhere, to the last digit."""
    values = [value]
    if ranks()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def fit(
    run: Run, prepared: Prepared, settings: Settings, device: torch.device,
    callback: Callable[[dict], None] = lambda row: None, *,
    resume: bool = True, progress_bar: bool = True, start: Checkpoint | None = None,
) -> Seq2Seq:  # fmt: skip
    """Train to the settings' last update or to early stopping, and return the model with the best validation loss.
    Each validation also writes the checkpoint. `callback` is given each row of `metrics.jsonl` when it is made: of an
    update, {update, loss, …}, or a validation, {update, validation_loss}; what it raises ends the training. With
    `resume` a training goes on from the folder's checkpoint, to exactly what an uninterrupted one gives, or further, if
    `updates` are more; a checkpoint of other settings or data is refused. Without, it starts over, from the weights of
    `start` if given, and keeps a former checkpoint under another name. Under torchrun each process takes its share of
    every batch, and the first alone writes files. Raises Interrupted on Ctrl-C, NotFiniteError when a loss or gradient
    is not finite (both keep the last checkpoint), and UserError when another process trains here."""
    from tqdm.auto import tqdm  # here, since trained models are also used where there is no tqdm

    first = ranks()[0] == 0
    with run.locked(first):  # by the first process for all
        model = new_model(settings, len(prepared.vocabulary)).to(device)
        trainer, progress, state = _begin(run, prepared, settings, model, start, resume)
        train, validation = (prepared.splits[name].to(device) for name in ("train", "validation"))
        batches = BucketedSampler(train, settings.batch_size, settings.seed).from_update(progress.update)
        bar = tqdm(total=settings.updates, initial=progress.update, disable=not (progress_bar and first), unit="update")
        kept, rows, launched, clock = progress.update, [], None, time.perf_counter()

        def report(**row) -> None:
            if first:
                rows.append(row)
            callback(row)

        def report_update() -> None:
            nonlocal clock
            row, before, clock = launched.row(), clock, time.perf_counter()
            report(update=launched.update + 1, **row, seconds=round(clock - before, 4))
            bar.set_postfix(loss=f"{row['loss']:.3f}", best=f"{progress.best_loss:.3f}", refresh=False)
            bar.update()

        model.train()
        try:
            with torch.random.fork_rng(), bar:
                while not progress.over(settings):
                    following = trainer.launch(train, next(batches), progress.update)
                    if launched:  # the update before: a GPU has the next one already
                        report_update()
                    launched = following
                    progress.update += 1
                    if progress.update % settings.validate_every and progress.update < settings.updates:
                        continue
                    report_update()
                    launched = None
                    loss = broadcast(evaluate(trainer.average, validation).per_token)
                    if not math.isfinite(loss):
                        raise FloatingPointError(f"The validation loss after update {progress.update} is {loss}.")
                    if progress.is_best(loss):
                        state.best_model = copy.deepcopy(trainer.average.state_dict())
                    report(update=progress.update, validation_loss=loss)
                    clock = time.perf_counter()
                    if first:
                        run.append_metrics(rows)
                        state.model, state.average = model.state_dict(), trainer.average.state_dict()
                        state.optimizer, state.progress = trainer.optimizer.state_dict(), vars(progress).copy()
                        state.save(run.checkpoint)
                    kept = progress.update
        except (FloatingPointError, KeyboardInterrupt) as error:
            there, told = run.checkpoint.exists(), "No checkpoint was written yet."
            if there:
                told = f"{display_path(run.checkpoint)} of update {kept} is kept."
            if isinstance(error, KeyboardInterrupt):
                resume = " Resume to go on from there." * there
                raise Interrupted(f"stopped in update {progress.update + 1}. {told}{resume}") from None
            if first:
                run.append_metrics(rows)
            query = prepared.vocabulary.decode(train.queries[(launched or following).indices[0]].tolist())
            remedy = "In another run, try a lower learning_rate, clip=1, or precision=fp32."
            raise NotFiniteError(f"{error} The last batch begins with {' '.join(query)!r}. {told} {remedy}") from None
        if first and run.facts().get("progress") != vars(progress):
            run.record(
                settings=settings.to_dict(), corpus=prepared.corpus, data_digest=prepared.digest, device=str(device),
                processes=ranks()[1], precision=state.precision, progress=vars(progress),
                parameters=parameter_count(model),
            )  # fmt: skip
    model.load_state_dict(state.best_model)
    return model.eval()


def training_digest(settings: Settings, prepared: Prepared) -> str:
    """Tells whether two trainings are of the same settings and data, by the same mathematics."""
    return digest(json.dumps(settings.to_dict(), sort_keys=True), prepared.digest, str(MATHEMATICS))


def checkpoint_to_resume(run: Run, prepared: Prepared, settings: Settings) -> Checkpoint:
    """The folder's checkpoint. Raises UserError if it is of another training: of other data or mathematics, or of other
    settings, but for LATER. (Under a cosine only a training that is over takes more updates.)"""
    state, new = Checkpoint.load(run.checkpoint), settings.to_dict()
    old = state.settings
    changed = [name for name in new if old.get(name) != new[name] and name not in LATER]
    if old.get("updates") != new["updates"] and new["schedule"] == "cosine" and not changed:
        changed = [] if Progress(**state.progress).over(Settings(**old)) else ["updates"]
    if changed or state.digest != training_digest(settings.change(**LATER), prepared):
        what = f"with other settings: {', '.join(f'{name} {old.get(name)!r}, not {new[name]!r}' for name in changed)}"
        what = what if changed else "on other data, or by other mathematics"
        remedy = "start over (--fresh; resume = False in notebook 3), which keeps it under another name"
        raise UserError(f"{display_path(run.checkpoint)} was trained {what}. Choose another run, or {remedy}.")
    return state


def require_own_data(run: Run, prepared: Prepared) -> None:
    """Raises UserError if the run's checkpoint was trained on other data than these."""
    state = Checkpoint.load(run.checkpoint)
    if state.digest != training_digest(Settings(**state.settings).change(**LATER), prepared):
        what = f"{display_path(run.checkpoint)} was trained on other data than {display_path(run.data)} holds"
        raise UserError(f"{what}: train again, or prepare the former data again.")


def _begin(
    run: Run, prepared: Prepared, settings: Settings, model: Seq2Seq, start: Checkpoint | None, resume: bool
) -> tuple[Trainer, Progress, Checkpoint]:
    """A training that goes on from the folder's checkpoint, or a new one. Manifest and metrics are made to fit."""
    first = ranks()[0] == 0
    if broadcast(resume and run.checkpoint.exists()):
        state = checkpoint_to_resume(run, prepared, settings)
        trainer = Trainer(model, settings, state.precision)
        kinds = (RuntimeError, ValueError, TypeError, KeyError, AttributeError)
        with user_errors(f"{display_path(run.checkpoint)} cannot be resumed", "Move it away.", *kinds):
            for weights in (state.best_model, state.model):
                model.load_state_dict(weights)
            trainer.average.load_state_dict(state.average)
            trainer.optimizer.load_state_dict(state.optimizer)
            for parameter, moments in trainer.optimizer.state.items():  # the fused optimisers do not look
                if any(moment.dim() and moment.shape != parameter.shape for moment in moments.values()):
                    raise ValueError("the optimiser's state is of other shapes")
            progress, state.settings = Progress(**state.progress), settings.to_dict()
    else:
        if first and run.checkpoint.exists():
            print(f"the former checkpoint is kept as {display_path(run.keep_checkpoint())}", file=sys.stderr)
        begin_with_frequencies(model, prepared.splits["train"])
        if start:
            _take_over(model, start, prepared.vocabulary)
        precision = broadcast(choose_precision(model, settings, prepared.splits["train"]))
        trainer, progress = Trainer(model, settings, precision), Progress()
        made_from, vocabulary = training_digest(settings.change(**LATER), prepared), prepared.vocabulary.to_json()
        examples, best = prepared.examples, copy.deepcopy(model.state_dict())
        state = Checkpoint(settings.to_dict(), vocabulary, examples, made_from, precision, {}, {}, best, {}, {})
    if first:
        run.cut_metrics(progress.update)
        if not progress.over(settings):
            run.record_machine(model.embedding.weight.device, progress.update)
    return trainer, progress, state


def begin_with_frequencies(model: Seq2Seq, pairs: Pairs) -> None:
    """Set the output's bias to ln(share of each word in the responses): a new model is as good as one that knows how
    often words occur. Else it learns that first, with all its weights, and at a high rate may not recover from it."""
    counts = torch.bincount(pairs.responses[pairs.responses != PAD], minlength=model.output.out_features)
    with torch.no_grad():
        model.output.bias.copy_(((counts + 0.5) / counts.sum()).log())


def _take_over(model: Seq2Seq, start: Checkpoint, vocabulary: Vocabulary) -> None:
    """Give a new model another one's best weights; words that are new to these keep their random ones."""
    weights, known = model.state_dict(), start.words().words
    if vocabulary.words[: len(known)] != known:
        raise UserError("The vocabulary does not begin with that of the run to start from: prepare the data with it.")
    with user_errors("The weights to start from are of other shapes", "Take them with their settings.", RuntimeError):
        for name, tensor in start.best_model.items():
            weights[name][: len(tensor)].copy_(tensor)
