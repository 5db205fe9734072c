import json
import math
import random

import pytest
import torch
from torch import nn

from helpers import checkpoint
from helpers.batches import Pairs
from helpers.bench import StepByStep
from helpers.checkpoint import load_model
from helpers.run import Run
from helpers.settings import Settings, UserError
from helpers.text import EOS, UNK, Vocabulary
from helpers.tracking import Tracker
from helpers.training import (
    Objective,
    batch_loss,
    choose_precision,
    evaluate,
    fit,
    free_running_logits,
    learning_rate,
    new_model,
    new_optimizer,
    read_metrics,
    replies_of,
    score,
)
from tests.conftest import CPU, TINY, off


def train(folder, prepared, settings, tracker=None, resume=True):
    run = Run(folder)
    fit(run, prepared, settings, CPU, tracker or off(run), resume=resume, progress_bar=False)
    return run


class PowerCut(Tracker):
    """Fails when a validation is logged, before its checkpoint is written."""

    def __init__(self, at: int) -> None:
        super().__init__("off", None, {})
        self.at = at

    def log(self, values, update):
        if update == self.at and "validation_loss" in values:
            raise InterruptedError


def test_the_loss_is_the_mean_over_real_tokens(prepared):
    model = new_model(TINY, len(prepared.vocabulary)).eval()
    batch = prepared.splits["train"].batch(torch.tensor([0, 9, 50]))
    total, tokens = batch_loss(model, batch)
    logits = model(batch.query, batch.query_lengths, batch.inputs)
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=0)
    assert tokens == int((batch.targets != 0).sum())
    assert torch.allclose(total / tokens, expected, atol=1e-6)


def test_evaluation_does_not_depend_on_batches_and_leaves_the_mode_alone(prepared, monkeypatch):
    model = new_model(TINY, len(prepared.vocabulary))
    part = prepared.splits["validation"]
    a = evaluate(model, part)
    monkeypatch.setattr("helpers.training.EVALUATION_BATCH", 7)
    b = evaluate(model, part)
    assert a.per_token == pytest.approx(b.per_token, abs=1e-6)
    assert (a.tokens, a.responses) == (b.tokens, len(part))
    assert model.training


def test_free_running_feeds_back_the_models_own_words(prepared):
    model = new_model(TINY, len(prepared.vocabulary)).eval()
    batch = prepared.splits["train"].batch(torch.tensor([0, 1]))
    own = free_running_logits(model, batch)
    forced = model.token_logits(batch.query, batch.query_lengths, batch.inputs, batch.target_mask)
    assert own.shape == forced.shape
    assert torch.allclose(own[0], forced[0], atol=1e-5)  # the first step sees SOS either way


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("teacher_forcing", [1.0, 0.5])
def test_a_resumed_run_equals_an_uninterrupted_one(prepared, tmp_path, optimizer, teacher_forcing):
    settings = TINY.change(
        optimizer=optimizer, teacher_forcing_ratio=teacher_forcing, schedule="cosine", warmup_updates=2
    )
    straight = train(tmp_path / "straight", prepared, settings)
    with pytest.raises(InterruptedError):
        train(tmp_path / "broken", prepared, settings, PowerCut(8))
    torch.manual_seed(99)  # what happens in between does not matter
    random.seed(99)
    broken = train(tmp_path / "broken", prepared, settings)
    a, b = checkpoint.load(straight.checkpoint), checkpoint.load(broken.checkpoint)
    for key in ("model", "best_model"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    for i, state in a["optimizer"]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(b["optimizer"]["state"][i][k])) for k, v in state.items()
        )
    assert a["progress"] == b["progress"]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(straight)]
    assert rows == [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(broken)]
    assert [row["update"] for row in rows if "loss" in row] == list(range(1, 13))


def test_a_finished_run_is_not_trained_again_and_another_is_kept_aside(prepared, tmp_path):
    run = train(tmp_path, prepared, TINY)
    before = run.checkpoint.read_bytes()
    train(tmp_path, prepared, TINY)
    assert run.checkpoint.read_bytes() == before
    train(tmp_path, prepared, TINY.change(learning_rate=1e-3))
    assert run.checkpoint.with_name("checkpoint.previous.pt").read_bytes() == before


def test_training_does_not_touch_the_callers_random_state(prepared, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tmp_path, prepared, TINY.change(updates=4))
    assert torch.equal(torch.rand(3), expected)


def test_it_learns(prepared, tmp_path):
    run = train(tmp_path, prepared, TINY.change(updates=120, validate_every=40, embedding_size=48, hidden_size=48))
    losses = [row["validation_loss"] for row in read_metrics(run) if "validation_loss" in row]
    assert losses[-1] < 0.6 * math.log(len(prepared.vocabulary))
    assert losses == sorted(losses, reverse=True)


def test_early_stopping_keeps_the_best_weights(prepared, tmp_path):
    settings = TINY.change(updates=60, validate_every=2, patience=2, learning_rate=1.0, optimizer="sgd", clip=0.0)
    run = train(tmp_path, prepared, settings.change(learning_rate=8.0))
    state = checkpoint.load(run.checkpoint)
    assert state["progress"]["stopped"]
    assert state["progress"]["update"] < 60
    model = load_model(run.checkpoint, CPU)[0]
    assert evaluate(model, prepared.splits["validation"]).per_token == pytest.approx(
        state["progress"]["best_loss"], abs=1e-6
    )


def test_every_parameter_is_stepped_once_and_the_decoder_at_its_own_rate(prepared):
    settings = TINY.change(decoder_learning_ratio=5.0)
    model = new_model(settings, 50)
    groups = new_optimizer(model, settings).param_groups
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert [group["ratio"] for group in groups] == [1.0, 5.0]
    assert id(model.embedding.weight) in {id(parameter) for parameter in groups[0]["params"]}


def test_a_clip_of_zero_clips_nothing(prepared, tmp_path):
    weights = []
    for clip in (0.0, 1e9):
        run = train(tmp_path / str(clip), prepared, TINY.change(clip=clip, optimizer="sgd"))
        weights.append(checkpoint.load(run.checkpoint)["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    start = new_model(TINY, len(prepared.vocabulary)).state_dict()
    assert not torch.equal(start["output.weight"], weights[0]["output.weight"])


def test_the_schedule_warms_up_and_glides_to_zero():
    settings = Settings(updates=100, learning_rate=1.0, schedule="cosine", warmup_updates=10)
    rates = [learning_rate(settings, update) for update in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert learning_rate(settings.change(schedule="constant"), 99) == 1.0


def test_a_loss_that_is_not_finite_stops_with_a_word_and_keeps_the_checkpoint(prepared, tmp_path, monkeypatch):
    run = train(tmp_path, prepared, TINY.change(updates=4))
    good = run.checkpoint.read_bytes()
    calls = []

    def poisoned(model, batch, teacher_forcing=True):
        total, tokens = batch_loss(model, batch, teacher_forcing)
        calls.append(1)
        return total * (float("nan") if len(calls) == 2 else 1.0), tokens

    monkeypatch.setattr("helpers.training.batch_loss", poisoned)
    with pytest.raises(UserError, match=r"Update 2: .*learning_rate"):
        train(tmp_path, prepared, TINY.change(updates=5))
    assert run.checkpoint.with_name("checkpoint.previous.pt").read_bytes() == good


def test_metrics_of_a_killed_run_are_read_up_to_the_torn_line(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(UserError, match="03_training"):
        read_metrics(run)
    run.metrics.write_text(json.dumps({"update": 1, "loss": 2.0}) + '\n{"update": 2, "lo')
    assert read_metrics(run) == [{"update": 1, "loss": 2.0}]


def test_score_charges_unknown_words_and_cuts_nothing(prepared):
    vocabulary = Vocabulary(prepared.vocabulary.words[4:], unknown_types=100)
    model = new_model(TINY, len(vocabulary)).eval()
    known = " ".join(prepared.texts["test"][0][1].split() * 10)
    result = score(model, vocabulary, [("hello", known), ("hello", "zebra xylophone")])
    assert result["pairs"] == 2
    assert result["tokens"] == len(known.split()) + 1 + 3
    assert result["unknown_rate"] == pytest.approx(2 / result["tokens"])
    assert result["perplexity"] == pytest.approx(math.exp(result["nll_per_token"]))
    alone = score(model, vocabulary, [("hello", "zebra xylophone")])
    pairs = Pairs.from_words([(["hello"], ["zebra", "xylophone"])], vocabulary)
    assert pairs.responses.tolist() == [[UNK, UNK, EOS]]
    assert alone["nll_per_response"] == pytest.approx(evaluate(model, pairs).nll + 2 * math.log(100), rel=1e-6)
    with pytest.raises(UserError, match="Pair 1"):
        score(model, vocabulary, [("🙂", "yes")])


def test_replies_come_in_the_examples_order(trained, prepared):
    model, vocabulary, _ = load_model(trained.checkpoint, CPU)
    pairs = prepared.splits["test"]
    replies = replies_of(model, pairs, vocabulary, 10)
    assert len(replies) == len(pairs)
    one = replies_of(model, pairs.first(1), vocabulary, 10)
    assert one[0] == replies[0]


def test_precision_is_what_was_asked_for_or_a_choice_of_two():
    assert choose_precision("bf16", CPU) == "bf16"
    assert choose_precision("auto", CPU) in ("fp32", "bf16")


def test_bf16_trains(prepared, tmp_path):
    run = train(tmp_path, prepared, TINY.change(precision="bf16"))
    assert checkpoint.load(run.checkpoint)["precision"] == "bf16"
    assert all(math.isfinite(row["loss"]) for row in read_metrics(run) if "loss" in row)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_fast_path_learns_what_the_stepwise_one_does(prepared, tmp_path, monkeypatch, optimizer):
    settings = TINY.change(dropout=0.0, query_dropout=0.0, updates=20, optimizer=optimizer, learning_rate=1e-3)
    fast = read_metrics(train(tmp_path / "fast", prepared, settings))
    half = read_metrics(train(tmp_path / "half", prepared, settings.change(precision="bf16")))
    monkeypatch.setattr("helpers.training.Objective", StepByStep)
    steps = read_metrics(train(tmp_path / "steps", prepared, settings))
    for a, b in zip(fast, steps, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5)
    assert half[-1]["validation_loss"] == pytest.approx(steps[-1]["validation_loss"], rel=0.01)


def test_words_looked_up_together_give_the_gradient_of_both_lookups(prepared):
    model = new_model(TINY.change(dropout=0.0), len(prepared.vocabulary))
    batch = prepared.splits["train"].batch(torch.arange(20))
    gradients = []
    for kind in (Objective, StepByStep):
        model.zero_grad()
        kind(model)(batch, True).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
