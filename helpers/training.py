"""Training: one update, the loop around it, and checkpoints from which it resumes exactly."""

import contextlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from helpers.batches import BucketedSampler, Pairs, Prepared
from helpers.evaluation import batch_loss, evaluate
from helpers.model import Seq2Seq, new_model, parameter_count
from helpers.run import Run, digest, display_path, read_tensors, timings, write_tensors
from helpers.settings import Count, Settings, UserError, user_errors
from helpers.text import Vocabulary

FORMAT = 2  # of checkpoint.pt
# Raised by whoever changes what the same settings and data train to: an older checkpoint is then not resumed.
MATHEMATICS = 1
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
        best = loss < self.best_loss
        if best:
            self.best_loss, self.best_update = loss, self.update
        self.stale = 0 if best else self.stale + 1
        return best


@dataclass(config=STRICT)
class Checkpoint:
    """All that a training needs to go on, and a bot to answer."""

    settings: dict
    vocabulary: str  # as JSON
    digest: str  # of what it was trained from
    precision: str
    model: dict
    best_model: dict  # the weights with the lowest validation loss
    optimizer: dict
    progress: dict

    def save(self, path: Path) -> None:
        """Write it in one piece: either the new checkpoint is there, whole, or the old one is."""
        write_tensors(path, FORMAT, vars(self))

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """What `save` wrote, on the CPU. Raises UserError if the file is missing, damaged, or no checkpoint."""
        state = read_tensors(path, FORMAT, "notebook 03_training or 'python -m helpers train'")
        with user_errors(f"{display_path(path)} is not a checkpoint", "Train again.", TypeError, ValueError):
            return cls(**state)


def load_model(path: Path, device: torch.device) -> tuple[Seq2Seq, Vocabulary, Settings]:
    """The model with the best validation loss, ready to answer, with its vocabulary and settings.
    Raises UserError if the file is missing, damaged, or does not fit its own settings."""
    state = Checkpoint.load(path)
    kinds = (UserError, RuntimeError, TypeError, KeyError, AttributeError)
    with user_errors(f"{display_path(path)} does not fit its own settings", "Use another one.", *kinds):
        settings = Settings(**state.settings)
        vocabulary = Vocabulary.from_json(state.vocabulary)
        with torch.device("meta"):  # its shapes alone: settings that lie must not take memory
            shapes = {name: tensor.shape for name, tensor in Seq2Seq(settings, len(vocabulary)).state_dict().items()}
        if {name: tensor.shape for name, tensor in state.best_model.items()} != shapes:
            raise UserError("the weights are of other shapes")
        model = Seq2Seq(settings, len(vocabulary))
        model.load_state_dict(state.best_model)
    return model.to(device).eval(), vocabulary, settings


def new_optimizer(model: Seq2Seq, settings: Settings) -> torch.optim.Optimizer:
    """One optimiser; the decoder's own parameters learn `decoder_learning_ratio` times as fast.
    A parameter belongs to one group only: the embedding, which both sides use, to the first."""
    slow = [*model.embedding.parameters(), *model.encoder.parameters()]
    known = {id(parameter) for parameter in slow}
    fast = [parameter for parameter in model.parameters() if id(parameter) not in known]
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


def choose_precision(wanted: str, device: torch.device) -> str:
    """`fp32` or `bf16`; `auto` takes bf16 where the device has units for it and a product shows that it is faster."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = any(there and "bf16" in name for name, there in torch.cpu.get_capabilities().items())
    if not has_units:
        return "fp32"
    full = torch.ones(512, 512, device=device)
    half = full.bfloat16()
    return "bf16" if min(timings(lambda: half @ half, device)) < min(timings(lambda: full @ full, device)) else "fp32"


class Trainer:
    """A model, its optimiser and how they learn; `step` is one update."""

    def __init__(self, model: Seq2Seq, settings: Settings, precision: str = "fp32") -> None:
        self.model, self.settings, self.precision = model, settings, precision
        self.optimizer = new_optimizer(model, settings)

    def step(self, pairs: Pairs, indices: Tensor, update: int) -> dict[str, float]:
        """One step of the optimiser on the examples `indices`; returns loss, gradient norm, learning rate and tokens.
        All random numbers are a function of the seed and the update (counted from 0), so none need saving.
        Of several processes each takes every so-many-th example.
        Raises FloatingPointError, before the optimiser's step, if loss or gradient is not finite."""
        settings, (rank, world) = self.settings, ranks()
        torch.manual_seed(settings.seed * 1_000_003 + update + (rank << 48))
        teacher_forcing = random.Random(f"{settings.seed} {update}").random() < settings.teacher_forcing_ratio
        rate = learning_rate(settings, update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.zero_grad()
        tokens, share = int(pairs.response_lengths[indices].sum()), indices[rank::world]
        loss = torch.zeros((), device=pairs.queries.device)
        if len(share):
            batch = pairs.batch(share).with_dropout(settings.query_dropout, settings.word_dropout)
            with torch.autocast(batch.query.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = batch_loss(self.model, batch, teacher_forcing)[0] / tokens
            loss.backward()
        if world > 1:
            loss = all_reduce(self.model, loss.detach())
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.model.parameters()])
        found = {"loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": rate, "tokens": tokens}
        if not math.isfinite(found["loss"] + found["gradient_norm"]):
            what = f"the loss is {found['loss']} and the gradient norm {found['gradient_norm']}"
            raise FloatingPointError(f"Update {update + 1}: {what}, on training examples {indices[:8].tolist()} …")
        if 0 < settings.clip < norm:  # below the limit, multiplying all gradients by 1 would be a pass for nothing
            nn.utils.clip_grads_with_norm_(self.model.parameters(), settings.clip, norm)
        self.optimizer.step()
        return found


def all_reduce(model: nn.Module, loss: Tensor) -> Tensor:
    """Add up all processes' gradients, in place, and their losses. Each has divided its share's sum by the tokens of
    the whole batch, so these are what one process alone gets, but for dropout, which each draws for itself."""
    for parameter in model.parameters():
        if parameter.grad is None:  # this process's share was empty
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    dist.all_reduce(loss)
    return loss


def join_processes(device: torch.device) -> torch.device:
    """Under torchrun: meet the other processes (NCCL on GPUs, gloo on CPUs) and return this one's device."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
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


def locked(run: Run) -> contextlib.AbstractContextManager:
    """The run's folder locked by this process, or, of several that train together, by the first for all."""
    return run.locked() if ranks()[0] == 0 else contextlib.nullcontext()


def fit(
    run: Run, prepared: Prepared, settings: Settings, device: torch.device,
    callback: Callable[[dict], None] = lambda row: None, *, resume: bool = True, progress_bar: bool = True,
) -> Seq2Seq:  # fmt: skip
    """Train to the settings' last update or to early stopping, and return the model with the best validation loss.

    Every `validate_every` updates the validation loss is measured and the checkpoint written. `callback` is given each
    row of `metrics.jsonl` when it is made: of an update, {update, loss, …}, or of a validation, {update,
    validation_loss}; what it raises ends the training. With `resume` a training goes on from the folder's checkpoint,
    to exactly what an uninterrupted one gives; a checkpoint of other settings or data is refused. Without, it starts
    over, and a checkpoint that is there is kept under another name. Under torchrun each process takes its share of
    every batch, and the first alone writes files.

    Raises Interrupted on Ctrl-C, NotFiniteError when a loss or gradient is not finite (both keep the last checkpoint),
    and UserError when another process trains here.
    """
    from tqdm.auto import tqdm  # here, since trained models are also used where there is no tqdm

    first = ranks()[0] == 0
    with locked(run):
        model = new_model(settings, len(prepared.vocabulary)).to(device)
        trainer, progress, state = _begin(run, prepared, settings, model, resume)
        train, validation = prepared.splits["train"].to(device), prepared.splits["validation"].to(device)
        batches = BucketedSampler(train, settings.batch_size, settings.seed).from_update(progress.update)
        bar = tqdm(total=settings.updates, initial=progress.update, disable=not (progress_bar and first), unit="update")
        kept, rows = progress.update, []

        def report(**row) -> None:
            row = {"update": progress.update, **row}
            if first:
                rows.append(row)
            callback(row)

        model.train()
        try:
            with torch.random.fork_rng(), bar:
                while not progress.over(settings):
                    started, indices = time.perf_counter(), next(batches)
                    found = trainer.step(train, indices, progress.update)
                    progress.update += 1
                    report(**found, seconds=round(time.perf_counter() - started, 4))
                    bar.set_postfix(loss=f"{found['loss']:.3f}", best=f"{progress.best_loss:.3f}", refresh=False)
                    bar.update()
                    if progress.update % settings.validate_every and progress.update < settings.updates:
                        continue
                    loss = broadcast(evaluate(model, validation).per_token)
                    if not math.isfinite(loss):
                        raise FloatingPointError(f"The validation loss after update {progress.update} is {loss}.")
                    if progress.is_best(loss):
                        state.best_model = _copy(model)
                    report(validation_loss=loss)
                    if first:
                        run.append_metrics(rows)
                        state.model, state.optimizer = model.state_dict(), trainer.optimizer.state_dict()
                        state.progress = vars(progress).copy()
                        state.save(run.checkpoint)
                    kept = progress.update
        except FloatingPointError as error:
            if first:
                run.append_metrics(rows)
            query = " ".join(prepared.vocabulary.decode(train.queries[indices[0]].tolist()))
            remedy = "In another run, try a lower learning_rate, clip=1, or precision=fp32."
            raise NotFiniteError(f"{error} The last batch begins with {query!r}. {_kept(run, kept)} {remedy}") from None
        except KeyboardInterrupt:
            resume = " Resume to go on from there." * run.checkpoint.exists()
            raise Interrupted(f"stopped in update {progress.update + 1}. {_kept(run, kept)}{resume}") from None
        if first and run.facts().get("progress") != vars(progress):
            run.record(
                settings=settings.to_dict(), corpus=prepared.corpus, data_digest=prepared.digest, device=str(device),
                processes=ranks()[1], precision=state.precision, progress=vars(progress),
                parameters=parameter_count(model),
            )  # fmt: skip
    model.load_state_dict(state.best_model)
    return model.eval()


def training_digest(settings: Settings, prepared: Prepared) -> str:
    """Tells whether a checkpoint was trained from these settings and this data, by the same mathematics."""
    return digest(json.dumps(settings.to_dict(), sort_keys=True), prepared.digest, str(MATHEMATICS))


def checkpoint_to_resume(run: Run, prepared: Prepared, settings: Settings) -> Checkpoint:
    """The folder's checkpoint. Raises UserError if it is of another training, which going on would spoil."""
    state, new = Checkpoint.load(run.checkpoint), settings.to_dict()
    if state.digest != training_digest(settings, prepared):
        old = state.settings
        changed = [f"{name} {old.get(name)!r}, not {new[name]!r}" for name in new if old.get(name) != new[name]]
        what = f"with other settings: {', '.join(changed)}" if changed else "on other data, or by other mathematics"
        remedy = "start over (--fresh; resume = False in notebook 3), which keeps it under another name"
        raise UserError(f"{display_path(run.checkpoint)} was trained {what}. Choose another run, or {remedy}.")
    return state


def _begin(
    run: Run, prepared: Prepared, settings: Settings, model: Seq2Seq, resume: bool
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
            trainer.optimizer.load_state_dict(state.optimizer)
            for parameter, moments in trainer.optimizer.state.items():  # the fused optimisers do not look
                if any(moment.dim() and moment.shape != parameter.shape for moment in moments.values()):
                    raise ValueError("the optimiser's state is of other shapes")
            progress = Progress(**state.progress)
        rows = [row for row in run.read_metrics() if row["update"] <= progress.update] if run.metrics.exists() else []
    else:
        if first and run.checkpoint.exists():
            print(f"the former checkpoint is kept as {display_path(run.keep_checkpoint())}", file=sys.stderr)
        precision = broadcast(choose_precision(settings.precision, model.embedding.weight.device))
        trainer, progress, rows = Trainer(model, settings, precision), Progress(), []
        made_from, vocabulary = training_digest(settings, prepared), prepared.vocabulary.to_json()
        state = Checkpoint(settings.to_dict(), vocabulary, made_from, precision, {}, _copy(model), {}, {})
    if first:
        run.write_metrics(rows)
        if not progress.over(settings):
            run.record_machine(model.embedding.weight.device, progress.update)
    return trainer, progress, state


def _kept(run: Run, update: int) -> str:
    if not run.checkpoint.exists():
        return "No checkpoint was written yet."
    return f"{display_path(run.checkpoint)} of update {update} is kept."


def _copy(model: Seq2Seq) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
