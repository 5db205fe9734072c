"""Each mistake does what it claims and is gone afterwards; what was run is kept and not run again."""

import contextlib
import dataclasses
import json
import math
import re
import unittest.mock

import nbformat
import pytest
import torch
from filelock import FileLock

from benchmarks import mistakes
from benchmarks.mistakes import EDITS, HALF, LONG, RECIPE, Mixed, made
from helpers import training
from helpers.batches import BucketedSampler, Pairs
from helpers.decoding import greedy
from helpers.evaluation import batch_loss, evaluate
from helpers.model import LuongAttention, new_model
from helpers.run import ROOT
from helpers.settings import UserError
from helpers.text import EOS, PAD, SOS, UNK
from helpers.training import Trainer
from tests.conftest import CPU, TINY

SMALL = mistakes.steady(TINY.change(embedding_size=16, hidden_size=16, layers=1, dropout=0.1), 4)


@pytest.fixture(scope="module")
def task(corpus_folder):
    return mistakes.talking(corpus_folder, SMALL, mistakes.SCORES, 5)


@pytest.fixture
def model(task):
    """An untrained one, to which some words are likelier than others."""
    model = new_model(SMALL, len(task.data.vocabulary)).eval()
    torch.nn.init.normal_(model.output.bias, std=2, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def uneven(task):
    """A batch of short and long exchanges."""
    train = task.data.splits["train"]
    order = train.response_lengths.argsort(stable=True)
    return train.batch(torch.cat([order[:3], order[-3:]]))


@pytest.mark.parametrize("name", list(EDITS))
def test_a_mistake_is_an_edit_of_a_few_lines(name):
    text = "\n".join(edit.diff() for edit in EDITS[name])
    changed = [line for line in text.splitlines() if line[0] in "+-"]
    assert 1 <= len(changed) <= 12
    assert all(callable(edit.function()) for edit in EDITS[name])
    owners = [(edit.owner, edit.name) for edit in EDITS[name]]
    before = [getattr(*owner) for owner in owners]
    with made(name):
        assert all(getattr(*owner) is not right for owner, right in zip(owners, before, strict=True))
    assert [getattr(*owner) for owner in owners] == before


def test_an_edit_of_what_helpers_do_not_say_is_refused():
    with pytest.raises(UserError, match="forward in helpers/ has 0 lines"):
        mistakes.Edit(LuongAttention, "forward", {"no such line": None}).function()


@pytest.mark.parametrize("score", mistakes.SCORES)
def test_padding_gets_weight_without_the_mask_alone(task, score):
    model = new_model(SMALL.change(attention=score), len(task.data.vocabulary)).eval()
    test = Mixed(**vars(task.asked))
    assert mistakes.weight_on_padding(model, test) == 0
    with made("no mask"):
        assert mistakes.weight_on_padding(model, test) > 0.05
    assert mistakes.weight_on_padding(model, test) == 0


def test_without_the_mask_what_is_said_depends_on_the_batch(task, model):
    alone = lambda: sum(evaluate(model, part).nll for _, part in mistakes.without_padding(task.asked))  # noqa: E731
    together = lambda: evaluate(model, Mixed(**vars(task.asked))).nll  # noqa: E731
    right = together()
    assert alone() == pytest.approx(right, rel=1e-5)
    with made("no mask"):
        assert alone() == pytest.approx(right, rel=1e-5)  # where there is no padding nothing is missing
        assert abs(together() / right - 1) > 1e-4


def test_mixed_batches_take_no_notice_of_length(task):
    train = task.data.splits["train"]
    widths = []
    for kind in (Pairs, Mixed):
        pairs = kind(**vars(train))
        batches = BucketedSampler(pairs, 32, 1).epoch(0)
        assert sorted(torch.cat(batches).unique().tolist()) == list(range(len(train)))
        assert sorted(pairs.order().tolist()) == list(range(len(train)))
        widths.append(sum(pairs.shape(indices)[1] for indices in batches))
    assert widths[1] > 1.2 * widths[0]


@pytest.mark.parametrize(
    ("name", "layers"), [("", [True, True]), ("the wrong half", [True, False]), (HALF, [True, True])]
)
def test_the_wrong_half_throws_the_top_layer_away(task, uneven, name, layers):
    with made(name):
        model = training.new_model(SMALL.change(layers=2), len(task.data.vocabulary)).eval()
        embedded = model.embedding(uneven.query)
        _, hidden = model.encoder(embedded, uneven.query_lengths)
    assert hidden.shape == (2, len(uneven.query), SMALL.hidden_size)
    hidden.square().sum().backward()
    reached = [layer.along.weight_hh_l0.grad is not None for layer in model.encoder.layers]
    assert reached == layers
    if name == "the wrong half":  # the lower layer gets layer 0 forwards, the upper one layer 0 backwards
        along, against = (getattr(model.encoder.layers[0], way) for way in ("along", "against"))
        row, length = 0, int(uneven.query_lengths[0])
        words = embedded[row : row + 1, :length]
        for state, (gru, inputs) in zip(hidden, [(along, words), (against, words.flip(1))], strict=True):
            assert torch.allclose(state[row], gru(inputs)[1][0, 0], atol=1e-6)


def test_the_sum_of_each_steps_mean_weighs_late_tokens_more(model, uneven):
    logits = model(uneven.query, uneven.query_lengths, uneven.inputs)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), uneven.targets, reduction="none")
    mask = uneven.targets != PAD
    steps = [losses[mask[:, t], t].mean() for t in range(mask.size(1)) if mask[:, t].any()]
    total, tokens = batch_loss(model, uneven)
    assert torch.allclose(total / tokens, losses[mask].mean())
    with made("the sum of each step's mean"):
        total, tokens = training.batch_loss(model, uneven)
        assert torch.allclose(total / tokens, torch.stack(steps).sum())
        assert torch.allclose(torch.div(*batch_loss(model, uneven)), losses[mask].mean())  # what is validated is right
    assert not torch.allclose(losses[mask].mean(), torch.stack(steps).mean(), rtol=1e-3)


def moved(task, name: str = "", **changes) -> dict[str, torch.Tensor]:
    """By how much one update on the same batch moves each parameter."""
    settings = SMALL.change(warmup_updates=0, **changes)
    with made(name):
        model = training.new_model(settings, len(task.data.vocabulary)).train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        Trainer(model, settings).step(task.data.splits["train"], torch.arange(32), 0)
    return {key: value - before[key] for key, value in model.state_dict().items()}


def test_an_embedding_in_two_optimisers_is_moved_twice(task):
    right, wrong = moved(task), moved(task, "one embedding in two optimisers")
    for name, way in right.items():
        times = 2 if name in ("embedding.weight", "output.weight") else 1  # which are one
        assert torch.allclose(wrong[name], times * way, atol=1e-6), name
    faster = moved(task, "one embedding in two optimisers", decoder_learning_ratio=5.0)
    assert torch.allclose(faster["embedding.weight"], 6 * right["embedding.weight"], atol=1e-6)


def test_a_clip_of_0_taken_literally_moves_nothing(task):
    assert any(way.any() for way in moved(task, clip=0.0).values())
    assert not any(way.any() for way in moved(task, "clip 0 taken literally", clip=0.0).values())
    same = zip(moved(task).values(), moved(task, "clip 0 taken literally").values(), strict=True)
    assert all(torch.equal(*both) for both in same)  # any other limit means what it meant


def test_split_by_exchange_trains_on_the_movies_that_validation_asks(task):
    right = task.data
    wrong = mistakes.by_exchange(right)
    assert len(wrong.splits["train"]) == len(right.splits["train"])
    assert wrong.splits["validation"] is right.splits["validation"]
    assert wrong.splits["test"] is right.splits["test"]
    known = lambda pairs: {tuple(row[row > 0].tolist()) for row in pairs.responses}  # noqa: E731
    assert known(right.splits["left over"]) <= known(wrong.splits["train"])
    assert not known(right.splits["left over"]) <= known(right.splits["train"])
    left, asked = (len(right.splits[name]) for name in ("left over", "validation"))
    assert left + asked == right.report["validation"]
    assert asked == math.ceil(right.report["validation"] / 4)


def test_no_shuffling_takes_the_exchanges_as_they_stand(task):
    pairs = Mixed(**vars(task.data.splits["train"]))
    with made("no shuffling"):
        batches = BucketedSampler(pairs, 32, 1).epoch(3)
    assert torch.equal(torch.cat(batches)[: len(pairs)], torch.arange(len(pairs)))
    assert not torch.equal(torch.cat(BucketedSampler(pairs, 32, 1).epoch(3))[: len(pairs)], torch.arange(len(pairs)))


def test_past_the_end_goes_on_to_the_longest(task, model):
    with torch.no_grad():
        model.output.bias[EOS] += 1.0  # so that some replies end
    batch = task.asked.batch(torch.arange(20))
    right = greedy(model, batch.query, batch.query_lengths, 12)
    with made("past the end"):
        wrong = greedy(model, batch.query, batch.query_lengths, 12)
    assert wrong.shape == (20, 12)
    assert not (wrong == PAD).any()
    for one, other in zip(right.tolist(), wrong.tolist(), strict=True):
        said = one[: one.index(EOS) + 1] if EOS in one else one
        assert other[: len(said)] == said


def test_unk_is_spoken_where_nothing_forbids_it(task, model):
    with torch.no_grad():
        model.output.bias[UNK] += 50.0
    batch = task.asked.batch(torch.arange(5))
    assert not (greedy(model, batch.query, batch.query_lengths, 4) == UNK).any()
    with made("UNK and PAD spoken"):
        assert (greedy(model, batch.query, batch.query_lengths, 4) == UNK).all()


def test_sos_fed_as_zeros_is_pad(task, model):
    batch, fed = task.asked.batch(torch.arange(5)), []
    step = type(model).step
    with unittest.mock.patch.object(
        type(model), "step", lambda self, words, *rest: fed.append(words) or step(self, words, *rest)
    ):
        greedy(model, batch.query, batch.query_lengths, 1)
        with made("SOS fed as zeros"):
            greedy(model, batch.query, batch.query_lengths, 1)
    assert [words.unique().tolist() for words in fed] == [[SOS], [PAD]]


def test_what_is_evaluated_with_dropout_on_is_left_to_chance(task, model):
    wrong, test = EDITS["dropout on"][0].function(), task.data.splits["test"]
    model.train()
    assert evaluate(model, test) == evaluate(model, test)
    assert wrong(model, test).nll != wrong(model, test).nll
    assert wrong(model.eval(), test) == evaluate(model, test)


def test_the_mean_of_perplexities_is_not_the_perplexity(task, model):
    test = task.data.splits["test"]
    whole, one = evaluate(model, test), evaluate(model, test.first(20))
    assert mistakes.mean_perplexity(model, test.first(20)) == pytest.approx(one.perplexity)
    assert mistakes.mean_perplexity(model, test) != pytest.approx(whole.perplexity, rel=1e-4)


@pytest.mark.parametrize("name", list(mistakes.ways(mistakes.SCORES, 5)))
def test_every_way_trains_for_a_moment_and_is_measured(task, name):
    run = mistakes.figures(task, name, 1, CPU)
    longer = name in (LONG, "split by exchange")
    assert [update for update, *_ in run["curve"]] == [1, 2, 3, 4] + [5] * longer
    assert 0 < run["test"] < 10
    assert 0 <= run["exact"] <= 1
    assert ("weight on padding" in run) == name.startswith("no mask")
    assert ("answering" in run) == (name == RECIPE)
    way = task.ways()[name]
    if way.against:
        right = task.ways()[way.against]
        assert (right.against, right.edit) in (("", ""), ("", HALF))
        assert way.changes.items() >= right.changes.items()


def test_copying_asks_longer_lines_apart():
    task = mistakes.copying(updates=2)
    assert "split by exchange" not in task.ways()
    assert {int(kind) for kind in task.counted} == set(mistakes.race.COPIED)
    run = mistakes.figures(task, "no mask", 1, CPU)
    assert list(run["kinds"]) == [str(length) for length in range(2, mistakes.race.LONGEST + 1)]


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Runs in this process, of a task of two ways and a moment's updates; their names, as they run."""
    ran = []
    monkeypatch.setenv("CHATBOT_RUNS", str(tmp_path / "runs"))
    task = mistakes.copying(updates=2)
    few = {"asked": task.asked.first(20), "references": task.references[:20], "kinds": task.kinds[:20]}
    small = dataclasses.replace(task, **few)
    few = {name: small.ways()[name] for name in (RECIPE, "no clip")}
    monkeypatch.setitem(mistakes.TASKS, "copying", lambda _: small)
    monkeypatch.setattr(mistakes.Task, "ways", lambda _: few)

    class Alone:
        def apply(self, function, arguments):
            ran.append(arguments[1:3])
            return function(*arguments)

    monkeypatch.setattr(mistakes, "process", lambda _: contextlib.nullcontext(Alone()))
    return ran


def test_what_is_there_is_not_run_again(here, tmp_path, capsys):
    file = tmp_path / "mistakes.json"
    command = ["--only", "copying", "--json", str(file), "--device", "cpu", "--seeds", "2"]
    assert mistakes.main([*command, "--runs", "1"]) == 0
    assert here == [(RECIPE, 1)]
    assert mistakes.main(command) == 0
    assert mistakes.main(command) == 0
    assert here == [(RECIPE, 1), ("no clip", 1), (RECIPE, 2), ("no clip", 2)]
    found = json.loads(file.read_text())
    assert [(run["way"], run["seed"]) for run in found["runs"]] == here
    assert found["machine"]["threads"] == 1
    assert "no clip" in capsys.readouterr().out
    mistakes.TASKS["copying"] = lambda _: mistakes.copying(updates=3)
    assert mistakes.main(command) == 1
    assert "move it away" in capsys.readouterr().err


def test_a_run_that_another_program_is_at_work_on_is_left_to_it(here, tmp_path):
    claim = tmp_path / "runs" / "mistakes" / "mistakes" / f"copying {RECIPE} 1.lock"
    claim.parent.mkdir(parents=True)
    command = ["--only", "copying", "--json", str(tmp_path / "mistakes.json"), "--device", "cpu", "--seeds", "1"]
    with FileLock(claim):
        assert mistakes.main(command) == 0
        assert here == [("no clip", 1)]
    assert mistakes.main(command) == 0
    assert here == [("no clip", 1), (RECIPE, 1)]


def test_movies_need_movies(capsys):
    assert mistakes.main(["--only", "movies", "--json", "nowhere.json"]) == 1
    assert "--corpus PATH" in capsys.readouterr().err


def test_updates_later_are_read_between_the_points():
    right, wrong = [[10, 4.0], [20, 2.0], [30, 1.0]], [[10, 5.0], [20, 4.0], [30, 3.0]]
    assert mistakes.later(right, wrong) == 30 - 15  # the right one had 3 after 15 updates
    assert mistakes.later(wrong, right) == -15
    assert mistakes.later(right, right) == 0
    assert mistakes.later(right, [[10, 4.0], [20, 4.0], [30, 4.0]]) == 20
    assert mistakes.later(right, [[10, 9.0], [20, 9.0], [30, 9.0]]) == 30 - 10  # read no further than the first point


def test_prices_are_differences_of_equal_seeds():
    def run(way, seed, nats, exact, **more):
        return {"task": "movies", "way": way, "seed": seed, "test": nats, "exact": exact,
                "curve": [[10, nats + 1], [20, nats]], **more}  # fmt: skip

    answering = {"answering": {"past the end": {"exact": 0.0}}}
    runs = [run(RECIPE, seed, 2.0 + seed, 0.5, **answering) for seed in (1, 2, 3)]
    runs += [run("no clip", seed, 2.5 + seed, 0.25) for seed in (1, 2, 3)]
    runs += [run(HALF, 1, 3.0, 0.5), run("the wrong half", 1, 3.25, 0.5)]
    runs += [{"task": "movies", "way": "no mask", "seed": 1, "failed": "the loss is nan"}]
    found = {"tasks": {"movies": {"settings": {"attention": "general"}}}, "runs": runs}
    table = mistakes.prices(found).set_index("mistake")
    assert list(table.index) == ["no clip", "the wrong half", "past the end"]
    assert table.loc["no clip", ["nats, right", "nats", "nats ±", "exact", "later"]].tolist() == [4.0, 0.5, 0, -0.25, 5]
    assert table.loc["the wrong half", "against"] == HALF
    assert math.isnan(table.loc["the wrong half", "nats ±"])  # one seed has no spread
    assert table.loc["past the end", "exact"] == -0.5
    assert mistakes.spread([1.0, 2.0, 3.0]) == pytest.approx(2.484, abs=1e-3)


def test_the_page_of_prices_and_the_notebooks_say_what_was_measured():
    from tools import mistake_tables, tables

    text = mistake_tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(text, mistake_tables.TABLES) == text, "run 'python -m tools.mistake_tables'"
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (mistake_tables.PAGE.parent / link).exists(), link
    for name, cells in mistake_tables.CELLS.items():
        path = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        assert {cell.id for cell in notebook.cells if cell.id.startswith("price-")} == set(cells)
        right = mistake_tables.with_prices(path).cells
        for one, other in zip(notebook.cells, right, strict=True):
            assert one.source == other.source, "run 'python -m tools.mistake_tables'"


def test_every_mistake_has_its_place_on_the_page():
    from tools.mistake_tables import SECTIONS

    wrong = {name for name, way in mistakes.ways(mistakes.SCORES, 5).items() if way.against}
    told = {name for names in SECTIONS.values() for name in names}
    found = json.loads(next((ROOT / "results").glob("mistakes-*.json")).read_text(encoding="utf-8"))
    answering = {name for run in found["runs"] for name in run.get("answering", ())}
    assert told == wrong | answering | {f"{name}{mistakes.ALONE}" for name in wrong if name.startswith("no mask")}


def test_seeds_are_three_and_nothing_is_left_out():
    for path in (ROOT / "results").glob("mistakes-*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert list(found["tasks"]) == list(mistakes.TASKS)
        table = mistakes.prices(found)
        assert (table["seeds"] >= mistakes.SEEDS).all()
        assert not [run for run in found["runs"] if "failed" in run]
        runs = [run for run in found["runs"] if run["task"] == "world"]
        assert all(run["test"] > found["tasks"]["world"]["least"] for run in runs)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("mistakes-*.json")), ids=lambda path: path.stem)
def test_what_the_page_concludes_follows_from_the_results(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = {(row["task"], row["mistake"]): row for row in mistakes.prices(found).to_dict("records")}

    def sure(task: str, mistake: str, figure: str = "nats") -> bool:
        return abs(rows[task, mistake][figure]) > rows[task, mistake][f"{figure} ±"]

    for task in mistakes.TASKS:
        assert rows[task, "clip 0 taken literally"]["nats"] > 0.9
        for nothing in ("no mask", "no mask, asked alone", "the wrong half"):
            assert not sure(task, nothing)
        assert rows[task, "one embedding in two optimisers"]["nats"] < 0.005
        assert rows[task, "UNK and PAD spoken"]["exact"] == 0
    for task, mistake in rows:
        if mistake.startswith("no mask, random"):
            fails = task == "copying" and mistake.endswith(("dot, asked alone", "general, asked alone"))
            assert sure(task, mistake) == sure(task, mistake, "exact") == fails, (task, mistake)
            assert not fails or rows[task, mistake]["exact"] < -0.8 * rows[task, mistake]["exact, right"]
    for name in ("no clip", "the sum of each step's mean"):
        assert sure("movies", name)
        assert (
            rows["movies", name]["nats"] > 0.03 > 0.01 > max(rows[task, name]["nats"] for task in ("world", "copying"))
        )
    assert [sure(task, "no shuffling") for task in mistakes.TASKS] == [False, True, True]
    assert rows["world", "past the end"]["exact"] < -0.5 * rows["world", "past the end"]["exact, right"]
    assert rows["world", "SOS fed as zeros"]["exact"] < -0.25 * rows["world", "SOS fed as zeros"]["exact, right"]
    for task in ("world", "movies"):
        assert not sure(task, "split by exchange")
    assert sure("movies", "split by exchange", "later")
    assert rows["movies", "split by exchange"]["later"] < -300
    figures = {name: rows["movies", name]["nats"] for (task, name) in rows if task == "movies" and "batches'" in name}
    assert max(map(abs, figures.values())) > 0.1 > 0.06 > rows["movies", "dropout on"]["nats"]
