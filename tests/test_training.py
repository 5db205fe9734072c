import dataclasses
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import training
from helpers.batches import prepare
from helpers.corpus import read_corpus
from helpers.evaluation import batch_loss, evaluate
from helpers.model import new_model
from helpers.run import Run
from helpers.settings import MARKS, NAMES, Settings, UserError
from helpers.text import PAD
from helpers.training import (
    Checkpoint,
    Trainer,
    choose_precision,
    fit,
    learning_rate,
    load_model,
    new_optimizer,
    require_own_data,
    training_digest,
)
from tests.conftest import CPU, TINY


def train(folder, prepared, settings, callback=lambda row: None, resume=True, start=None):
    run = Run(folder)
    fit(run, prepared, settings, CPU, callback, resume=resume, progress_bar=False, start=start)
    return run


def power_cut(at):
    """A callback that fails at a validation, before its checkpoint is written."""

    def callback(row):
        if row["update"] == at and "validation_loss" in row:
            raise InterruptedError

    return callback


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def timeless(run):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.read_metrics()]


@pytest.mark.parametrize(
    ("optimizer", "teacher_forcing", "average"),
    [("adam", 1.0, 0.0), ("adamw", 0.5, 0.0), ("sgd", 0.5, 0.0), ("adam", 1.0, 0.9)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(prepared, tmp_path, optimizer, teacher_forcing, average):
    settings = TINY.change(
        optimizer=optimizer, teacher_forcing_ratio=teacher_forcing, average=average, schedule="cosine", warmup_updates=2
    )
    straight = train(tmp_path / "straight", prepared, settings)
    with pytest.raises(InterruptedError):
        train(tmp_path / "broken", prepared, settings, power_cut(8))
    torch.manual_seed(99)  # what happens in between does not matter
    random.seed(99)
    broken = train(tmp_path / "broken", prepared, settings)
    a, b = Checkpoint.load(straight.checkpoint), Checkpoint.load(broken.checkpoint)
    for one, other in ((a.model, b.model), (a.average, b.average), (a.best_model, b.best_model)):
        assert all(torch.equal(one[name], other[name]) for name in one)
    for i, state in a.optimizer["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(b.optimizer["state"][i][k])) for k, v in state.items()
        )
    assert a.progress == b.progress
    rows = timeless(straight)
    assert rows == timeless(broken)
    assert [row["update"] for row in rows if "loss" in row] == list(range(1, 13))


def test_a_finished_run_is_not_trained_again(prepared, tmp_path):
    run = train(tmp_path, prepared, TINY)
    before = contents(tmp_path)
    train(tmp_path, prepared, TINY, callback=lambda row: pytest.fail("it trained again"))
    assert {name: before[name] for name in ("checkpoint.pt", "metrics.jsonl")} == {
        "checkpoint.pt": run.checkpoint.read_bytes(),
        "metrics.jsonl": run.metrics.read_bytes(),
    }
    assert set(contents(tmp_path)) == set(before)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_training_goes_on_to_more_updates_as_if_they_had_been_asked_for_at_once(prepared, tmp_path, interrupted):
    settings = TINY.change(schedule="constant")
    straight = train(tmp_path / "straight", prepared, settings.change(updates=20))
    if interrupted:
        with pytest.raises(InterruptedError):
            train(tmp_path / "further", prepared, settings, power_cut(8))
    else:
        train(tmp_path / "further", prepared, settings)
    further = train(tmp_path / "further", prepared, settings.change(updates=20, patience=9, validate_every=5))
    a, b = (Checkpoint.load(run.checkpoint) for run in (straight, further))
    assert b.progress["update"] == b.settings["updates"] == 20
    for name, tensor in a.model.items():
        assert torch.equal(tensor, b.model[name]), name


def test_under_a_cosine_more_updates_wait_until_the_training_is_over(prepared, tmp_path):
    settings = TINY.change(schedule="cosine")
    with pytest.raises(InterruptedError):
        train(tmp_path, prepared, settings, power_cut(8))
    with pytest.raises(UserError, match="updates 12, not 20"):
        train(tmp_path, prepared, settings.change(updates=20))
    train(tmp_path, prepared, settings)
    run = train(tmp_path, prepared, settings.change(updates=20))
    assert Checkpoint.load(run.checkpoint).progress["update"] == 20


def test_a_training_starts_from_the_weights_and_words_of_another(prepared, tmp_path):
    start = Checkpoint.load(train(tmp_path / "first", prepared, TINY).checkpoint)
    pairs = [(f"is the shop{i} open", f"yes until {i}") for i in range(30)]
    (tmp_path / "shop.tsv").write_text("\n".join("\t".join(pair) for pair in pairs))
    settings = start.shaped(TINY.change(hidden_size=99, updates=1, learning_rate=0, min_count=1))
    assert settings.hidden_size == TINY.hidden_size
    data = prepare(read_corpus(tmp_path / "shop.tsv"), settings, start.words())
    second = train(tmp_path / "second", data, settings, start=start)
    new, old = Checkpoint.load(second.checkpoint).model, start.best_model
    assert len(new["embedding.weight"]) == len(data.vocabulary) > len(start.words())
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)], tensor), name
    assert new["embedding.weight"][len(start.words()) :].std() > 0
    further = train(tmp_path / "second", data, settings.change(updates=4))
    assert Checkpoint.load(further.checkpoint).progress["update"] == 4
    with pytest.raises(UserError, match="does not begin with that"):
        train(tmp_path / "third", prepare(read_corpus(tmp_path / "shop.tsv"), settings), settings, start=start)
    with pytest.raises(UserError, match="other shapes"):
        train(tmp_path / "fourth", data, settings.change(hidden_size=8), start=start)


def test_a_checkpoint_beside_other_data_is_told(prepared, corpus_folder, tmp_path):
    run = train(tmp_path, prepared, TINY)
    require_own_data(run, prepared)
    with pytest.raises(UserError, match=r"trained on other data than .*data\.pt"):
        require_own_data(run, prepare(read_corpus(corpus_folder), TINY.change(seed=2)))


# No trained checkpoint is ever lost by accident


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate 0.005, not 0.001"),
        ({"clip": 2.0, "optimizer": "sgd"}, "optimizer 'adam', not 'sgd', clip 1.0, not 2.0"),
        ({"hidden_size": 8, "tie_weights": False}, "hidden_size 24, not 8, tie_weights True, not False"),
    ],
)
def test_a_checkpoint_of_other_settings_is_not_resumed_and_stays(prepared, tmp_path, changes, named):
    run = train(tmp_path, prepared, TINY.change(validate_every=6))
    before = contents(tmp_path)
    with pytest.raises(UserError) as raised:
        train(tmp_path, prepared, TINY.change(validate_every=6, **changes))
    assert f"checkpoint.pt was trained with other settings: {named}. " in str(raised.value)
    assert "--fresh" in str(raised.value)
    assert "resume = False" in str(raised.value)
    assert contents(tmp_path) == before
    assert Checkpoint.load(run.checkpoint).progress["update"] == 12


def test_a_checkpoint_of_other_data_is_not_resumed_and_stays(corpus_folder, prepared, tmp_path):
    train(tmp_path, prepared, TINY)
    before = contents(tmp_path)
    corpus = read_corpus(corpus_folder)
    other = prepare(dataclasses.replace(corpus, digest="of files that are one letter away"), TINY)
    with pytest.raises(UserError, match=r"checkpoint\.pt was trained on other data, .*--fresh"):
        train(tmp_path, other, TINY)
    assert contents(tmp_path) == before


def test_a_checkpoint_of_other_mathematics_is_not_resumed_and_stays(prepared, tmp_path, monkeypatch):
    train(tmp_path, prepared, TINY)
    before = contents(tmp_path)
    monkeypatch.setattr(training, "MATHEMATICS", training.MATHEMATICS + 1)
    with pytest.raises(UserError, match=r"checkpoint\.pt was trained on .* by other mathematics\. .*--fresh"):
        train(tmp_path, prepared, TINY)
    assert contents(tmp_path) == before


def test_a_stopped_training_too_is_refused_to_other_settings_and_goes_on_with_its_own(prepared, tmp_path):
    with pytest.raises(InterruptedError):
        train(tmp_path, prepared, TINY, power_cut(8))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="seed 1, not 2"):
        train(tmp_path, prepared, TINY.change(seed=2))
    assert contents(tmp_path) == before
    assert [row["update"] for row in timeless(train(tmp_path, prepared, TINY)) if "loss" in row] == list(range(1, 13))


def test_starting_over_keeps_every_former_checkpoint(prepared, tmp_path, capsys):
    kept = []
    for number in range(3):
        run = train(tmp_path, prepared, TINY.change(seed=1 + number), resume=False)
        said = capsys.readouterr().err
        assert ("the former checkpoint is kept as" in said) == (number > 0)
        assert number == 0 or f"checkpoint.{number}.pt" in said
        assert [row["update"] for row in run.read_metrics() if "loss" in row] == list(range(1, 13))
        kept.append(run.checkpoint.read_bytes())
    assert (tmp_path / "checkpoint.1.pt").read_bytes() == kept[0]
    assert (tmp_path / "checkpoint.2.pt").read_bytes() == kept[1]
    assert len(set(kept)) == 3
    assert Checkpoint.load(tmp_path / "checkpoint.2.pt").settings["seed"] == 2
    assert load_model(run.checkpoint, CPU)[2].seed == 3


def test_starting_over_overwrites_nothing_of_such_a_name(prepared, tmp_path):
    run = train(tmp_path, prepared, TINY)
    good = run.checkpoint.read_bytes()
    (tmp_path / "checkpoint.1.pt").write_bytes(b"a reader's own copy")
    (tmp_path / "checkpoint.3.pt").write_bytes(b"another")
    train(tmp_path, prepared, TINY, resume=False)
    assert (tmp_path / "checkpoint.1.pt").read_bytes() == b"a reader's own copy"
    assert (tmp_path / "checkpoint.2.pt").read_bytes() == good
    assert (tmp_path / "checkpoint.3.pt").read_bytes() == b"another"


def test_starting_over_with_the_same_settings_trains_the_same(prepared, tmp_path):
    a = Checkpoint.load(train(tmp_path, prepared, TINY).checkpoint)
    b = Checkpoint.load(train(tmp_path, prepared, TINY, resume=False).checkpoint)
    assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)


def test_what_a_training_depends_on_is_settings_data_and_mathematics_and_no_source_text(monkeypatch):
    for reader in ("builtins.open", "io.open", "os.open", "pathlib.Path.read_text", "inspect.getsource"):
        monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("a file was read"))
    data = SimpleNamespace(digest="x")  # nothing else of the data is looked at
    base = training_digest(TINY, data)
    assert training_digest(Settings(**TINY.to_dict()), SimpleNamespace(digest="x")) == base
    assert training_digest(TINY.change(clip=1), data) == training_digest(TINY.change(clip=1.0), data)
    assert training_digest(TINY, SimpleNamespace(digest="y")) != base
    monkeypatch.setattr(training, "MATHEMATICS", training.MATHEMATICS + 1)
    assert training_digest(TINY, data) != base


def another(value):
    """Another value of a setting's type."""
    words = {
        MARKS: ".",
        "drop": "cut",
        "unknown": "drop",
        "general": "dot",
        "adam": "sgd",
        "constant": "cosine",
        "fp32": "bf16",
    }
    changed = {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value / 2 or 0.5,
        str: lambda: words[value],
    }
    return changed[type(value)]()


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_tells_trainings_apart(name):
    data = SimpleNamespace(digest="x")
    changed = TINY.change(**{name: another(getattr(TINY, name))})
    assert training_digest(changed, data) != training_digest(TINY, data)


def test_the_callback_is_given_each_row_of_the_metrics_as_it_is_made(prepared, tmp_path):
    told, written = [], []

    def callback(row):
        told.append(dict(row))
        written.append(len(Run(tmp_path).read_metrics()))

    run = train(tmp_path, prepared, TINY, callback)
    assert told == run.read_metrics()
    assert [row["update"] for row in told if "validation_loss" in row] == [4, 8, 12]
    assert set(told[0]) == {"update", "loss", "gradient_norm", "learning_rate", "tokens", "seconds"}
    assert written == [0] * 5 + [5] * 5 + [10] * 5  # each row before the file has it


def test_training_does_not_touch_the_callers_random_state(prepared, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tmp_path, prepared, TINY.change(updates=4))
    assert torch.equal(torch.rand(3), expected)


def test_it_learns(prepared, tmp_path):
    run = train(tmp_path, prepared, TINY.change(updates=120, validate_every=40, embedding_size=48, hidden_size=48))
    losses = [row["validation_loss"] for row in run.read_metrics() if "validation_loss" in row]
    assert losses[-1] < 0.6 * math.log(len(prepared.vocabulary))
    assert losses == sorted(losses, reverse=True)


def test_what_is_validated_and_kept_is_the_average_of_the_weights_if_one_is_asked_for(prepared, tmp_path, monkeypatch):
    settings, seen = TINY.change(average=0.5, updates=12, validate_every=12), []
    step = Trainer.launch

    def launch(self, *arguments):
        launched = step(self, *arguments)
        seen.append([parameter.detach().clone() for parameter in self.model.parameters()])
        return launched

    monkeypatch.setattr(Trainer, "launch", launch)
    begun = new_model(settings, len(prepared.vocabulary))
    training.begin_with_frequencies(begun, prepared.splits["train"])
    first = list(begun.parameters())
    model = fit(Run(tmp_path), prepared, settings, CPU, progress_bar=False)
    for update, weights in enumerate(seen):
        decay = min(0.5, (1 + update) / (10 + update))
        first = [decay * mean + (1 - decay) * weight for mean, weight in zip(first, weights, strict=True)]
    for parameter, mean, last in zip(model.parameters(), first, seen[-1], strict=True):
        torch.testing.assert_close(parameter, mean)
        assert not torch.equal(parameter, last)
    loss = evaluate(model, prepared.splits["validation"]).per_token
    assert Run(tmp_path).read_metrics()[-1]["validation_loss"] == pytest.approx(loss, abs=1e-9)


def test_a_new_model_begins_with_the_shares_of_words_and_one_that_starts_from_another_does_not(prepared, tmp_path):
    settings = TINY.change(learning_rate=0.0, updates=1)
    begun = fit(Run(tmp_path / "new"), prepared, settings, CPU, progress_bar=False)
    responses = prepared.splits["train"].responses
    shares = torch.bincount(responses[responses != PAD], minlength=len(prepared.vocabulary)) / (responses != PAD).sum()
    torch.testing.assert_close(torch.softmax(begun.output.bias.detach(), 0), shares, atol=2e-3, rtol=0.05)
    start = Checkpoint.load(train(tmp_path / "trained", prepared, TINY).checkpoint)
    after = fit(Run(tmp_path / "after"), prepared, settings, CPU, progress_bar=False, start=start)
    assert torch.equal(after.output.bias, start.best_model["output.bias"])


def test_early_stopping_keeps_the_best_weights(prepared, tmp_path):
    settings = TINY.change(updates=60, validate_every=2, patience=2, learning_rate=1.0, optimizer="sgd", clip=0.0)
    settings = settings.change(learning_rate=8.0)
    run = train(tmp_path, prepared, settings)
    state = Checkpoint.load(run.checkpoint)
    assert state.progress["stale"] == 2
    assert state.progress["update"] == state.progress["best_update"] + 2 * 2 < 60
    train(tmp_path, prepared, settings, callback=lambda row: pytest.fail("it went on after it had stopped"))
    model = load_model(run.checkpoint, CPU)[0]
    assert evaluate(model, prepared.splits["validation"]).per_token == pytest.approx(
        state.progress["best_loss"], abs=1e-6
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
        weights.append(Checkpoint.load(run.checkpoint).model)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    start = new_model(TINY, len(prepared.vocabulary)).state_dict()
    assert not torch.equal(start["output.weight"], weights[0]["output.weight"])


def test_a_gradient_is_clipped_to_the_limit_and_its_norm_is_told_as_it_was(prepared):
    settings = TINY.change(clip=0.01, optimizer="sgd", learning_rate=1.0)
    model = new_model(settings, len(prepared.vocabulary))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    told = Trainer(model, settings).step(prepared.splits["train"], torch.arange(32), 0)
    moved = [now.detach() - then for now, then in zip(model.parameters(), before, strict=True)]
    assert float(nn.utils.get_total_norm(moved)) == pytest.approx(0.01, rel=1e-3)
    assert told["gradient_norm"] > 0.1
    assert told["tokens"] == int(prepared.splits["train"].response_lengths[:32].sum())
    assert told["learning_rate"] == 1.0


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
    with pytest.raises(training.NotFiniteError, match=r"Update 2: .*No checkpoint was written yet\..* learning_rate"):
        train(tmp_path, prepared, TINY.change(updates=5), resume=False)
    assert (tmp_path / "checkpoint.1.pt").read_bytes() == good
    assert not run.checkpoint.exists()


def test_metrics_of_a_killed_run_are_read_up_to_the_torn_line(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(UserError, match="03_training"):
        run.read_metrics()
    run.metrics.write_text(json.dumps({"update": 1, "loss": 2.0}) + '\n{"update": 2, "lo')
    assert run.read_metrics() == [{"update": 1, "loss": 2.0}]


def test_bf16_trains(prepared, tmp_path):
    run = train(tmp_path, prepared, TINY.change(precision="bf16"))
    assert Checkpoint.load(run.checkpoint).precision == "bf16"
    assert all(math.isfinite(row["loss"]) for row in run.read_metrics() if "loss" in row)


def step_by_step(model, batch, teacher_forcing=True):
    """`batch_loss` from one decoding step after another, padding projected and all."""
    assert teacher_forcing
    memory, state = model.encode(batch.query, batch.query_lengths)
    losses = []
    for words, targets in zip(batch.inputs.unbind(1), batch.targets.unbind(1), strict=True):
        logits, state = model.step(words, state, memory)
        losses.append(nn.functional.cross_entropy(logits.float(), targets, ignore_index=PAD, reduction="sum"))
    return torch.stack(losses).sum(), (batch.targets != PAD).sum()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_fast_path_learns_what_the_stepwise_one_does(prepared, tmp_path, monkeypatch, optimizer):
    settings = TINY.change(dropout=0.0, query_dropout=0.0, updates=20, optimizer=optimizer, learning_rate=1e-3)
    fast = train(tmp_path / "fast", prepared, settings).read_metrics()
    half = train(tmp_path / "half", prepared, settings.change(precision="bf16")).read_metrics()
    monkeypatch.setattr("helpers.training.batch_loss", step_by_step)
    steps = train(tmp_path / "steps", prepared, settings).read_metrics()
    for a, b in zip(fast, steps, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5)
    assert half[-1]["validation_loss"] == pytest.approx(steps[-1]["validation_loss"], rel=0.01)


def test_words_looked_up_together_give_the_gradient_of_both_lookups(prepared):
    model = new_model(TINY.change(dropout=0.0), len(prepared.vocabulary))
    batch = prepared.splits["train"].batch(torch.arange(20))
    gradients = []
    for loss in (batch_loss, step_by_step):
        model.zero_grad()
        loss(model, batch)[0].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# One update


def by_hand(model, settings, pairs, indices):
    """An update without anything of ours: the mean loss, clip_grad_norm_ and a plain optimiser's step."""
    slow = {id(parameter) for part in (model.embedding, model.encoder) for parameter in part.parameters()}
    groups = [[p for p in model.parameters() if (id(p) in slow) == kind] for kind in (True, False)]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.optimizer]
    optimizer = kind(
        [{"params": some, "lr": settings.learning_rate * ratio}
         for some, ratio in zip(groups, (1, settings.decoder_learning_ratio), strict=True)],
        weight_decay=settings.weight_decay, fused=False, foreach=False,
    )  # fmt: skip
    batch = pairs.batch(indices)
    logits = model(batch.query, batch.query_lengths, batch.inputs)
    nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=PAD).backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_an_update_is_clipped_and_stepped_as_pytorch_would(prepared, optimizer, clip):
    settings = TINY.change(
        optimizer=optimizer, clip=clip, dropout=0.0, query_dropout=0.0, weight_decay=0.01, decoder_learning_ratio=5.0
    )
    pairs, indices = prepared.splits["train"], torch.arange(32)
    ours, plain = (new_model(settings, len(prepared.vocabulary)).train() for _ in range(2))
    Trainer(ours, settings).step(pairs, indices, 0)
    by_hand(plain, settings, pairs, indices)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_an_update_that_is_not_finite_leaves_weights_and_optimiser_as_they_were(prepared, monkeypatch, optimizer):
    settings = TINY.change(optimizer=optimizer)
    model, pairs = new_model(settings, len(prepared.vocabulary)).train(), prepared.splits["train"]
    trainer = Trainer(model, settings)
    trainer.step(pairs, torch.arange(32), 0)

    def state():
        kept = [value for some in trainer.optimizer.state.values() for value in some.values() if value is not None]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *kept)]

    before = state()
    monkeypatch.setattr(
        "helpers.training.batch_loss", lambda *given: (batch_loss(*given)[0] * math.nan, torch.tensor(9))
    )
    with pytest.raises(FloatingPointError, match="Update 2: the loss is nan"):
        trainer.step(pairs, torch.arange(32), 1)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_figures_read_late_are_those_read_at_once(prepared):
    pairs, rows = prepared.splits["train"], []
    for late in (False, True):
        trainer = Trainer(new_model(TINY, len(prepared.vocabulary)).train(), TINY)
        launched = (trainer.launch(pairs, torch.arange(n, n + 32), n) for n in range(4))
        rows.append([update.row() for update in (list(launched) if late else launched)])
    assert rows[0] == rows[1]


def test_every_update_has_its_row_once_and_before_its_validation(prepared, tmp_path):
    run = train(tmp_path, prepared, TINY.change(updates=10))
    rows = [(row["update"], "validation_loss" in row) for row in run.read_metrics()]
    updates = [(update, False) for update in range(1, 11)]
    assert rows == sorted([*updates, (4, True), (8, True), (10, True)])


def test_in_bf16_the_weights_that_learn_keep_32_bits_and_the_loss_stays_near(prepared):
    settings, pairs, losses = TINY.change(dropout=0.0, query_dropout=0.0), prepared.splits["train"], {}
    for precision in ("fp32", "bf16"):
        model = new_model(settings, len(prepared.vocabulary)).train()
        trainer = Trainer(model, settings, precision)
        losses[precision] = [trainer.step(pairs, torch.arange(n, n + 32), n)["loss"] for n in range(12)]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


class Replayed:
    """What a recorded graph does, without a GPU: the first time the work runs as it is; after that always on the same
    places, into which what changes is copied."""

    def __init__(self, work):
        self.work, self.places = work, {}

    def __call__(self, pairs, where, *shape):
        key = (len(where), *shape)
        if key not in self.places:
            self.places[key] = None
            return self.work(pairs, where, *shape)
        if self.places[key] is None:
            self.places[key] = where.clone()
        self.places[key].copy_(where)
        return self.work(pairs, self.places[key], *shape)


def test_an_update_depends_on_nothing_but_its_places(prepared):
    settings = TINY.change(schedule="cosine", updates=8, optimizer="adam")
    pairs, weights = prepared.splits["train"], []
    short, long = (pairs.order()[rows] for rows in (slice(96), slice(-96, None)))
    assert pairs.shape(short[:32]) != pairs.shape(long[:32])
    for places, replayed in ((False, False), (True, False), (True, True)):
        model = new_model(settings, len(prepared.vocabulary)).train()
        trainer = Trainer(model, settings)
        trainer.update = Replayed(trainer.learn) if replayed else trainer.learn
        trainer.rates = [torch.zeros(()) if places else None for _ in trainer.rates]
        for update in range(8):
            part = (short, long)[update % 2][update // 2 * 16 :][:32]
            trainer.launch(pairs, part, update).row()
            read = [group["lr"] for group in trainer.optimizer.param_groups]
            assert not places or all(a is b for a, b in zip(read, trainer.rates, strict=True))
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    plain, placed, replayed = weights
    assert all(torch.equal(a, b) for a, b in zip(placed, replayed, strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, placed, strict=True))  # a rate of 32 bits


# Which precision


def test_the_precision_is_what_was_asked_for(prepared):
    model, pairs = new_model(TINY, len(prepared.vocabulary)), prepared.splits["train"]
    for asked in ("fp32", "bf16"):
        assert choose_precision(model, TINY.change(precision=asked), pairs) == asked
    with pytest.raises(UserError, match=r"^precision=tf32 is a way of GPUs, not of cpu: [^.]*\.$"):
        choose_precision(model, TINY.change(precision="tf32"), pairs)


@pytest.mark.parametrize("taken", [{"fp32": 2.0, "bf16": 1.0}, {"fp32": 1.0, "bf16": 2.0}])
def test_of_the_precisions_the_faster_one_is_taken(prepared, monkeypatch, taken):
    times, order = iter(taken.values()), []

    def timings(work, device, repeats):
        order.append(work())
        return [next(times)] * repeats

    monkeypatch.setattr(training, "timings", timings)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    settings, pairs = TINY.change(precision="auto"), prepared.splits["train"]
    model = new_model(settings, len(prepared.vocabulary))
    before, random_state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    assert choose_precision(model, settings, pairs) == min(taken, key=taken.get)
    assert len(order) == 2
    assert order[0]["loss"] != order[1]["loss"], "each in its own precision"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_without_units_for_bf16_there_is_no_choice(prepared, monkeypatch):
    monkeypatch.setattr(training, "timings", lambda *_: pytest.fail("nothing is to be timed"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    model = new_model(TINY, len(prepared.vocabulary))
    assert choose_precision(model, TINY.change(precision="auto"), prepared.splits["train"]) == "fp32"


def test_a_resumed_training_keeps_its_precision(prepared, tmp_path, monkeypatch):
    settings = TINY.change(precision="auto")
    monkeypatch.setattr(training, "choose_precision", lambda *_: "bf16")
    with pytest.raises(InterruptedError):
        train(tmp_path, prepared, settings, power_cut(8))
    monkeypatch.setattr(training, "choose_precision", lambda *_: pytest.fail("it is chosen already"))
    run = train(tmp_path, prepared, settings)
    assert Checkpoint.load(run.checkpoint).precision == run.facts()["precision"] == "bf16"


# Several GPUs


def test_a_process_without_a_gpu_of_its_own_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: pytest.fail("it must not wait for others"))
    with pytest.raises(UserError, match=r"^Device 'cuda:3': .* sees no such CUDA device here, 0 in all\.$"):
        training.join_processes(torch.device("cuda"))
