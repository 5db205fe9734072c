"""Training and evaluation: exact losses, one optimiser, exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from helpers import checkpoint
from helpers.batches import Batch, BucketedSampler, Pairs, Prepared
from helpers.decoding import greedy
from helpers.metrics import Likelihood
from helpers.model import Seq2Seq, parameter_count
from helpers.run import Run, append_text, keep_memory, machine, need, shown, timings, training_digest, write_text
from helpers.settings import Settings, UserError, refusing
from helpers.text import UNK, Vocabulary, tokenise
from helpers.tracking import Tracker

EVALUATION_BATCH = 256


class NotFiniteError(UserError):
    """A loss or a gradient that is infinite or no number: the settings are to blame, nothing else."""


@dataclasses.dataclass
class Progress:
    """How far a training has come; part of the checkpoint."""

    update: int = 0
    best_loss: float = math.inf
    best_update: int = 0
    stale: int = 0  # validations since the best
    stopped: bool = False

    def __post_init__(self) -> None:
        if [type(value) for value in dataclasses.astuple(self)] != [int, float, int, int, bool]:
            raise TypeError(f"{self} has values of other types")

    def over(self, settings: Settings) -> bool:
        """Whether nothing is left to train."""
        return self.stopped or self.update >= settings.updates

    def validated(self, loss: float, patience: int) -> bool:
        """Take note of a validation; returns whether it was the best until now."""
        best = loss < self.best_loss
        if best:
            self.best_loss, self.best_update = loss, self.update
        self.stale = 0 if best else self.stale + 1
        self.stopped = 0 < patience <= self.stale
        return best


def new_model(settings: Settings, words: int) -> Seq2Seq:
    """A model with weights drawn by the settings' seed, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return Seq2Seq(settings, words)


def new_optimizer(model: Seq2Seq, settings: Settings) -> torch.optim.Optimizer:
    """One optimiser; the decoder's own parameters learn `decoder_learning_ratio` times as fast.

    A parameter belongs to one group only: the embedding, which both sides use, to the first.
    """
    slow = [*model.embedding.parameters(), *model.encoder.parameters()]
    known = {id(parameter) for parameter in slow}
    fast = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": settings.decoder_learning_ratio}]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    kind = kinds[settings.optimizer]
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
    """`fp32` or `bf16`; `auto` takes bf16 where the device has units for it and a product shows that they are faster.

    Where they are, the product is several times as fast (results/bench-cpu.json), far more than the clock's noise: the
    choice is the same on every run.
    """
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


def batch_loss(model: Seq2Seq, batch: Batch, teacher_forcing: bool = True) -> tuple[Tensor, int]:
    """The sum of the cross-entropy of every real token, in nats, and their number. The loss is their quotient."""
    mask = batch.target_mask
    if teacher_forcing:
        logits = model.token_logits(batch.query, batch.query_lengths, batch.inputs, mask)
    else:
        logits = free_running_logits(model, batch)
    targets = batch.targets[mask]
    return functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def free_running_logits(model: Seq2Seq, batch: Batch) -> Tensor:
    """Logits (tokens, vocabulary) when the decoder reads its own likeliest words instead of the response's."""
    memory, state = model.encode(batch.query, batch.query_lengths)
    words, steps = batch.inputs[:, 0], []
    for _ in range(batch.inputs.size(1)):
        logits, state = model.step(words, state, memory)
        steps.append(logits)
        words = logits.argmax(1)
    return torch.stack(steps, 1)[batch.target_mask]


@torch.no_grad()
def evaluate(model: Seq2Seq, pairs: Pairs) -> Likelihood:
    """The exact teacher-forced likelihood of all responses, in fp32 and without dropout."""
    training = model.training
    model.eval()
    nll, tokens = 0.0, 0
    for batch in pairs.in_order(EVALUATION_BATCH):
        loss, count = batch_loss(model, batch)
        nll, tokens = nll + loss.double().item(), tokens + count
    model.train(training)
    return Likelihood(nll, tokens, len(pairs))


def score(model: Seq2Seq, vocabulary: Vocabulary, texts: list[tuple[str, str]]) -> dict[str, float]:
    """The likelihood of whole responses given their queries, nothing cut and nothing dropped.

    A word that is not in the vocabulary costs -ln P(UNK) + ln(number of training words that UNK stands for): the
    share of one of them if all are equally likely. Raises UserError for a query without any word.
    """
    pairs = [(tokenise(query), tokenise(response)) for query, response in texts]
    for number, (query, _) in enumerate(pairs, 1):
        if not query:
            raise UserError(f"Pair {number}: the query {texts[number - 1][0][:50]!r} has no word in it.")
    device = model.embedding.weight.device
    encoded = Pairs.from_words(pairs, vocabulary)
    unknown = int((encoded.responses == UNK).sum())
    likelihood = evaluate(model, encoded.to(device))
    nll = likelihood.nll + unknown * math.log(max(vocabulary.unknown_types, 1))
    full = Likelihood(nll, likelihood.tokens, likelihood.responses)
    return {
        "pairs": full.responses,
        "tokens": full.tokens,
        "nll_per_token": full.per_token,
        "perplexity": full.perplexity,
        "nll_per_response": full.per_response,
        "unknown_rate": unknown / full.tokens,
    }


def replies_of(model: Seq2Seq, pairs: Pairs, vocabulary: Vocabulary, max_words: int, search=greedy) -> list[list[str]]:
    """The words that a decoder answers to each query, in the examples' order."""
    order = pairs.order()
    replies: list[list[str]] = [[] for _ in range(len(pairs))]
    for indices in order.split(EVALUATION_BATCH):
        batch = pairs.batch(indices)
        ids = search(model, batch.query, batch.query_lengths, max_words)
        for index, row in zip(indices.tolist(), ids.tolist(), strict=True):
            replies[index] = vocabulary.decode(row)
    return replies


class Objective(nn.Module):
    """`batch_loss` as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, teacher_forcing: bool) -> Tensor:
        """The summed cross-entropy of a batch, in nats."""
        return batch_loss(self.model, batch, teacher_forcing)[0]


def join_ranks(device: torch.device) -> torch.device:
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


def alone(run: Run) -> contextlib.AbstractContextManager[None]:
    """The run's folder locked by this process, or, of several that train together, by the first for all."""
    return run.locked() if ranks()[0] == 0 else contextlib.nullcontext()


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to, instead of breaking in between two tensors; a second one breaks in.

    Of several processes that train together each would hear of it at another update, so there it breaks in at once.
    """
    asked: list[int] = []

    def note(number, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or ranks()[1] > 1 or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield asked
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def fit(
    run: Run,
    prepared: Prepared,
    settings: Settings,
    device: torch.device,
    tracker: Tracker,
    *,
    resume: bool = True,
    progress_bar: bool = True,
) -> Seq2Seq:
    """Train to the settings' last update or to early stopping, and return the model with the best validation loss.

    Every `validate_every` updates the validation loss is measured and the checkpoint written. With `resume` a
    checkpoint of the same settings, data and code is gone on from, and what comes out is what an uninterrupted run
    would have given; any other checkpoint in the folder is kept as `checkpoint.previous.pt`. Each update's random
    numbers are a function of (seed, update), so none need saving.

    Under torchrun every process takes its share of each batch, and the first one alone writes files.

    Ctrl-C ends the update in progress, writes the checkpoint and raises KeyboardInterrupt. Raises NotFiniteError when a
    loss or gradient is not finite (the last checkpoint is kept), UserError when another process trains here.
    """
    from tqdm.auto import tqdm  # here, since trained models are also used where there is no tqdm

    keep_memory()
    rank, world = ranks()
    with alone(run):
        model = new_model(settings, len(prepared.vocabulary)).to(device)
        optimizer = new_optimizer(model, settings)
        digest = training_digest(settings, prepared.digest)
        progress, precision, best_model = _begin(run, digest, settings, model, optimizer, resume)
        if rank == 0 and not progress.over(settings):
            _record_machine(run, device, progress.update)
        objective = Objective(model)
        if world > 1:
            objective = DistributedDataParallel(objective)  # no device_ids: it would move the lengths off the CPU
        train, validation = prepared.splits["train"].to(device), prepared.splits["validation"].to(device)
        batches = BucketedSampler(train, settings.batch_size, settings.seed).from_update(progress.update)
        rows: list[dict] = []
        stopping = False
        model.train()
        bar = tqdm(total=settings.updates, initial=progress.update, disable=not progress_bar or rank > 0, unit="update")
        with torch.random.fork_rng(), _ctrl_c() as stop, bar:
            while not progress.over(settings) and not stopping:
                started = time.perf_counter()
                indices = next(batches)
                try:
                    row = take_step(objective, optimizer, train, indices, settings, progress.update, precision)
                except FloatingPointError as error:
                    _write_rows(run, rows)
                    first = " ".join(prepared.vocabulary.decode(train.queries[indices[0]].tolist()))
                    where = f"the batch of training examples {indices[:8].tolist()} … (the first query is {first!r})"
                    raise _not_finite(run, f"Update {progress.update + 1}: {error}, in {where}.") from None
                progress.update += 1
                rows.append({"update": progress.update, **row, "seconds": round(time.perf_counter() - started, 4)})
                bar.update()
                if progress.update % 20 == 0:
                    tracker.log({"loss": row["loss"], "learning_rate": row["learning_rate"]}, progress.update)
                    bar.set_postfix(loss=f"{row['loss']:.3f}", best=f"{progress.best_loss:.3f}", refresh=False)
                due = progress.update % settings.validate_every == 0 or progress.update == settings.updates
                if due:
                    loss = _the_firsts(evaluate(model, validation).per_token)
                    if not math.isfinite(loss):
                        _write_rows(run, rows)
                        raise _not_finite(run, f"The validation loss after update {progress.update} is {loss}.")
                    if progress.validated(loss, settings.patience):
                        best_model = _copy(model)
                    rows.append({"update": progress.update, "validation_loss": loss})
                    tracker.log({"validation_loss": loss}, progress.update)
                stopping = bool(stop)
                if due or stopping:
                    _write_rows(run, rows)
                    rows = []
                    if rank == 0:
                        state = {
                            "settings": settings.to_dict(),
                            "vocabulary": prepared.vocabulary.to_json(),
                            "digest": digest,
                            "precision": precision,
                            "model": model.state_dict(),
                            "best_model": best_model,
                            "optimizer": optimizer.state_dict(),
                            "progress": dataclasses.asdict(progress),
                        }
                        checkpoint.save(run.checkpoint, state)
        if not progress.over(settings):
            raise KeyboardInterrupt(f"stopped after update {progress.update}; {_kept(run)} Resume to go on from there.")
        tracker.summary(best_validation_loss=progress.best_loss, best_update=progress.best_update)
        if rank == 0:
            run.record(
                settings=settings.to_dict(),
                corpus=prepared.corpus,
                data_digest=prepared.digest,
                device=str(device),
                processes=world,
                precision=precision,
                progress=dataclasses.asdict(progress),
                parameters=parameter_count(model),
            )
    model.load_state_dict(best_model)
    return model.eval()


def read_metrics(run: Run) -> list[dict]:
    """The rows of `metrics.jsonl`: one an update (loss, …) and one a validation (validation_loss)."""
    need(run.metrics, "notebook 03_training")
    rows = []
    for line in run.metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a run that was killed while writing
            break
        if not isinstance(row, dict) or not isinstance(row.get("update"), int):
            break
        rows.append(row)
    return rows


def take_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: Pairs,
    indices: Tensor,
    settings: Settings,
    update: int,
    precision: str,
) -> dict[str, float]:
    """One step of the optimiser on the examples `indices`; returns loss, gradient norm, learning rate and tokens.

    Of several processes each takes every so-many-th example. DistributedDataParallel averages their gradients, so each
    one's loss is its sum × processes / all tokens: how the tokens fall on the processes then changes nothing.
    Raises FloatingPointError, before the step, if loss or gradient is not finite.
    """
    rank, world = ranks()
    torch.manual_seed(settings.seed * 1_000_003 + update + (rank << 48))
    rate = learning_rate(settings, update)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    ratio = settings.teacher_forcing_ratio
    teacher_forcing = ratio == 1 or random.Random(f"{settings.seed} {update}").random() < ratio
    tokens = int(pairs.response_lengths[indices].sum())
    share = indices[rank::world]
    # A process without a share goes through the motions with one example that does not count.
    batch = pairs.batch(share if len(share) else indices[:1]).dropped(settings.query_dropout, settings.word_dropout)
    with torch.autocast(batch.query.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = objective(batch, teacher_forcing) / tokens * (len(share) > 0)
    optimizer.zero_grad(set_to_none=True)
    (loss * world).backward()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in objective.parameters()])
    if world > 1:
        loss = loss.detach()
        dist.all_reduce(loss)
    loss_value, norm_value = loss.item(), norm.item()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise FloatingPointError(f"the loss is {loss_value} and the gradient norm {norm_value}")
    if 0 < settings.clip < norm_value:  # below the limit, multiplying all gradients by 1 would be a pass for nothing
        nn.utils.clip_grads_with_norm_(objective.parameters(), settings.clip, norm)
    optimizer.step()
    return {"loss": loss_value, "gradient_norm": norm_value, "learning_rate": rate, "tokens": tokens}


def _begin(
    run: Run, digest: str, settings: Settings, model: Seq2Seq, optimizer: torch.optim.Optimizer, resume: bool
) -> tuple[Progress, str, dict[str, Tensor]]:
    """Progress, precision and best weights: those of the folder's checkpoint, if it is of the same settings, data and
    code, or of a new training. Model, optimiser and the file of metrics are made to fit them."""
    rank, world = ranks()
    state = checkpoint.load(run.checkpoint) if resume and run.checkpoint.is_file() else None
    if world > 1:
        dist.barrier()  # all have read the checkpoint before the first moves it
    if state is None or state["digest"] != digest:
        if rank == 0:
            if run.checkpoint.exists():
                previous = run.checkpoint.replace(run.checkpoint.with_name("checkpoint.previous.pt"))
                if resume:
                    what = "is of other settings, data or code: training starts anew"
                    print(f"{shown(previous)} {what}", file=sys.stderr)
            write_text(run.metrics, "")
        precision = choose_precision(settings.precision, model.embedding.weight.device)
        return Progress(), _the_firsts(precision), _copy(model)
    kinds = (RuntimeError, ValueError, TypeError, KeyError, AttributeError)
    with refusing(f"{shown(run.checkpoint)} cannot be gone on from", "Move it away.", *kinds):
        for weights in (state["best_model"], state["model"]):
            model.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    if rank == 0:
        rows = read_metrics(run) if run.metrics.exists() else []
        write_text(run.metrics, _as_lines([row for row in rows if row["update"] <= progress.update]))
    return progress, state["precision"], state["best_model"]


def _the_firsts(value):
    """The first process's value, in all of them: what decides must be the same everywhere, to the last digit."""
    if ranks()[1] > 1:
        values = [value]
        dist.broadcast_object_list(values)
        value = values[0]
    return value


def _record_machine(run: Run, device: torch.device, update: int) -> None:
    """Note in the manifest what the updates from this one on are made with; say so if that was something else."""
    facts = machine()
    here = {name: facts[name] for name in ("threads", "processor", "torch")} | {"device": str(device)}
    before = [entry for entry in run.facts().get("trained_with", []) if entry["from_update"] < update]
    changed = [
        f"{name} {here[name]} instead of {before[-1][name]}"
        for name in here
        if before and before[-1][name] != here[name]
    ]
    if changed:
        print(f"resumed with {', '.join(changed)}: the result may differ in its last digits", file=sys.stderr)
    if changed or not before:
        before.append({"from_update": update, **here})
    run.record(trained_with=before)


def _not_finite(run: Run, what: str) -> NotFiniteError:
    return NotFiniteError(f"{what} {_kept(run)} Try a lower learning_rate, clip=1, or precision=fp32.")


def _kept(run: Run) -> str:
    return f"{shown(run.checkpoint)} is kept." if run.checkpoint.exists() else "No checkpoint was written yet."


def _write_rows(run: Run, rows: list[dict]) -> None:
    if ranks()[0] == 0:
        append_text(run.metrics, _as_lines(rows))


def _as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _copy(model: Seq2Seq) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
