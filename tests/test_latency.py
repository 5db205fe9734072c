"""The latency table: nothing is timed that has not been shown to agree, and nothing is invented."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch

from benchmarks import classic
from benchmarks.textbook import textbook_greedy
from helpers import latency
from helpers.__main__ import main
from helpers.batches import Prepared, prepare
from helpers.corpus import read_corpus
from helpers.decoding import GreedySearch
from helpers.latency import Subject, answers, measure, parity, report, table
from helpers.model import new_model
from helpers.run import Run
from helpers.settings import UserError
from helpers.training import load_model
from tests.conftest import CPU, TINY

GRAPHS = ("CUDA graphs", "CUDA graphs, compiled", "CUDA graphs TF32", "CUDA graphs bf16")


@pytest.fixture(scope="module")
def bot(trained, prepared):
    return load_model(trained.checkpoint, CPU)[0], prepared.splits["test"]


def rows_of(bot, compilation=False, **options):
    rows, left_out = table(
        Subject("m", *bot, 12, textbook_greedy), [1, 4], queries=20, replies=10, compilation=compilation, **options
    )
    return pd.DataFrame(rows), left_out


def test_parity_can_fail(bot):
    model, test = bot
    other = new_model(TINY.change(seed=9), model.output.out_features).eval()
    expected, given = (answers(GreedySearch(m).eval(), test, 12) for m in (model, other))
    assert parity(model, test, expected, given)["different"] > 0
    assert parity(model, test, expected, expected) == {"identical": len(test), "tied": 0, "different": 0}


def test_near_ties_are_told_from_differences(bot, monkeypatch):
    model, test = bot
    some = test.first(1)
    expected = answers(GreedySearch(model).eval(), some, 12)
    with torch.no_grad():
        logits = model(*some.batch(torch.tensor([0]))[:2], torch.tensor([[1]]))[0, 0]
    given = expected.clone()
    given[0, 0] = (logits - logits[expected[0, 0]]).abs().add(logits == logits[expected[0, 0]]).argmin()
    gap = float((logits[given[0, 0]] - logits[expected[0, 0]]).abs())
    wanted = "tied" if gap < latency.TIE else "different"
    assert parity(model, some, expected, given)[wanted] == 1
    monkeypatch.setattr(latency, "TIE", gap * 1.01 + 1e-9)
    assert parity(model, some, expected, given)["tied"] == 1


def test_what_follows_the_end_is_no_answer(bot):
    model, test = bot
    textbook = answers(lambda *given: textbook_greedy(model, *given), test, 12, size=7)
    assert parity(model, test, answers(GreedySearch(model).eval(), test, 12), textbook)["different"] == 0


def test_the_textbook_answers_one_query_and_has_its_own_time_a_reply(bot):
    model, test = bot
    asked = {"textbook": set(), "eager": set()}

    def noted(name):
        search = GreedySearch(model).eval()
        return lambda query, *given: asked[name].add(len(query)) or search(query, *given)

    measure({name: noted(name) for name in asked}, test, 4, max_words=3, replies=8)
    assert asked == {"textbook": {1}, "eager": {4}}
    rows = rows_of(bot)[0].set_index("variant").loc["textbook"]
    assert (rows["timed"] == 15).all(), "a reply a call at any size"


def test_enough_replies_are_timed_in_turn(bot):
    model, test = bot
    turns = []

    def noted(name):
        search = GreedySearch(model).eval()
        return lambda *given: turns.append(name) or search(*given)

    seconds = measure({"a": noted("a"), "b": noted("b")}, test, 4, max_words=3, replies=60)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 15, "b": 15}
    assert turns == (["a"] * 6 + ["b"] * 6) * 4  # five timed calls after one that is not; the first turn does not count


def test_a_table_has_a_row_a_variant_and_batch_size(bot):
    rows, left_out = rows_of(bot)
    timed = rows[rows["parity"]]
    assert {"textbook", "eager", "TorchScript"} <= set(timed["variant"])
    assert (rows.groupby("variant").size() == 2).all()
    assert (timed["p95 ms"] >= timed["p50 ms"]).all()
    assert (timed["timed"] >= 10).all()
    assert (timed["vs eager"][timed["variant"] == "eager"] == 1).all()
    assert (timed["vs textbook"][timed["variant"] == "textbook"] == 1).all()
    assert set(left_out) == {"C++", "torch.compile", "AOTInductor", *GRAPHS}
    assert "CUDA device" in left_out["CUDA graphs"]
    shown = latency.as_table(rows.to_dict("records")).set_index("variant")
    assert shown.loc["TorchScript", "perplexity"].isna().all()  # it is eager's
    assert shown.loc["eager", "perplexity"].notna().all()
    assert (shown["wait ms"] == shown["p50 ms"] * shown["batch"])["eager"].all()
    assert shown.loc["eager", "parity"].str.fullmatch(r"(\d+)/\1").all()


def test_a_variant_that_answers_otherwise_is_reported_and_not_timed(bot, monkeypatch):
    other = new_model(TINY.change(seed=9), bot[0].output.out_features).eval()
    monkeypatch.setattr(latency, "quantised", lambda model: other)
    rows, _ = rows_of(bot)
    failed = rows[rows["variant"] == "TorchScript int8"]
    assert not failed["parity"].any()
    assert failed["p50 ms"].isna().all()
    assert (failed["different"] > 0).all()
    assert latency.as_table(rows.to_dict("records"))["parity"].str.startswith("FAILED").sum() == 2


def test_a_compiler_that_is_missing_leaves_its_rows_out_with_the_reason(bot, monkeypatch):
    def broken(steps, example):
        raise RuntimeError("no C++ compiler found\nmore")

    monkeypatch.setattr(latency, "exported", broken)
    monkeypatch.setattr(latency, "compiled", lambda steps, example: steps)
    rows, left_out = rows_of(bot, compilation=True)
    assert left_out["AOTInductor"] == "RuntimeError: no C++ compiler found"
    assert "AOTInductor" not in set(rows["variant"])
    assert rows[rows["variant"] == "torch.compile"]["parity"].all()


def test_the_classic_size_answers_in_ten_words(prepared, monkeypatch):
    assert (classic.CLASSIC.hidden_size, classic.CLASSIC.layers, classic.WORDS) == (500, 2, 7_800)
    monkeypatch.setattr(classic, "CLASSIC", TINY)
    monkeypatch.setattr(classic, "UPDATES", 60)
    name, model, test, max_words, textbook = classic.classic(prepared, CPU)
    assert name.startswith("classic: ")
    assert (max_words, textbook) == (10, textbook_greedy)
    assert model.output.out_features == classic.WORDS
    assert (test.response_lengths == 10).all()
    assert (test.responses[:, :10] > 2).all()
    ids = GreedySearch(model)(*test.batch(torch.arange(8))[:2], 10)
    assert ids.shape == (8, 10)
    assert (ids > 3).all()


def test_the_command_needs_nothing_but_torch_numpy_and_pandas(trained, tmp_path):
    missing = ["yaml", "tqdm", "sacrebleu", "optuna", "wandb", "papermill", "matplotlib", "IPython", "sklearn"]
    program = f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
import helpers.__main__
import torch
from helpers.latency import report
from helpers.run import Run, write_json
import pathlib
write_json(pathlib.Path({str(tmp_path / "t.json")!r}),
     report(Run({str(trained.folder)!r}), torch.device("cpu"), [2], 10, 10, full=False))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "t.json").read_text())
    assert {row["variant"] for row in kept["rows"]} >= {"eager", "TorchScript"}
    assert kept["left out"]["textbook"] == "notebook 07 has it"
    assert "notebook 07" in kept["left out"]["C++"]
    assert kept["machine"]["threads"] >= 1
    assert "CUDA graphs" in kept["left out"] or torch.cuda.is_available()
    assert len(pd.read_csv(trained.latency)) == len(kept["rows"])


def test_the_command_prints_and_keeps_the_table(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "report", lambda run, device, *_, full: report(run, device, [1], 10, 10, full=False))
    assert main(["latency", "--run", str(trained.folder), "--device", "cpu", "--json", str(tmp_path / "l.json")]) == 0
    printed = capsys.readouterr().out
    assert "TorchScript" in printed
    assert "left out: CUDA graphs" in printed or torch.cuda.is_available()
    assert json.loads((tmp_path / "l.json").read_text())["rows"]


@pytest.mark.parametrize(("device", "sentence"), [("tpu9", "not known"), ("cuda:99", "no such CUDA device")])
def test_a_device_that_is_not_there(trained, capsys, device, sentence):
    assert main(["latency", "--run", str(trained.folder), "--device", device]) == 1
    assert sentence in capsys.readouterr().err


def test_a_checkpoint_beside_other_data(trained, tmp_path, corpus_folder):
    run = Run(tmp_path)
    prepare(read_corpus(corpus_folder), Prepared.load(trained.data).settings.change(seed=2)).save(run.data)
    run.checkpoint.write_bytes(trained.checkpoint.read_bytes())
    with pytest.raises(UserError, match="trained on other data"):
        report(run, CPU, [1], 10, 10, full=False)
