import subprocess
import sys

import pytest
import torch

from helpers.checkpoint import load_model
from helpers.decoding import GreedySearch
from helpers.deploy import load_scripted, save_scripted, script
from helpers.latency import measure, parity
from helpers.settings import UserError
from helpers.training import evaluate, new_model
from tests.conftest import CPU, TINY


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    model, vocabulary, _ = load_model(trained.checkpoint, CPU)
    path = tmp_path_factory.mktemp("scripted") / "scripted.pt"
    save_scripted(path, script(model), vocabulary, 12)
    return model, vocabulary, path


def test_the_scripted_search_says_what_eager_says(saved, prepared):
    model, vocabulary, path = saved
    search, words, max_words = load_scripted(path, CPU)
    assert (words.words, max_words) == (vocabulary.words, 12)
    counts = parity(model, GreedySearch(model).eval(), search, prepared.splits["test"], 12)
    assert counts["different"] == 0
    assert counts["identical"] + counts["tied"] == len(prepared.splits["test"])
    eager, scripted = (evaluate(m, prepared.splits["test"]).per_token for m in (model, search))
    assert scripted == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize("feeding", [False, True])
def test_every_kind_of_model_scripts(prepared, score, feeding):
    model = new_model(TINY.change(attention=score, input_feeding=feeding), len(prepared.vocabulary)).eval()
    counts = parity(model, GreedySearch(model).eval(), script(model), prepared.splits["test"].first(30), 8)
    assert counts["different"] == 0


def test_parity_can_fail(saved, prepared):
    model, *_ = saved
    other = new_model(TINY.change(seed=9), len(prepared.vocabulary)).eval()
    counts = parity(model, GreedySearch(model).eval(), GreedySearch(other).eval(), prepared.splits["test"], 12)
    assert counts["different"] > 0


def test_a_process_without_the_package_can_answer(saved):
    program = (
        "import sys, torch; search = torch.jit.load(sys.argv[1])\n"
        "with torch.no_grad(): print(tuple(search(torch.tensor([[4, 5]]), torch.tensor([2]), 3).shape)[0])\n"
        "assert 'helpers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(saved[2])],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_a_scripted_file_that_is_missing_or_cut_short(saved, tmp_path):
    with pytest.raises(UserError, match="notebook 07"):
        load_scripted(tmp_path / "scripted.pt", CPU)
    (tmp_path / "scripted.pt").write_bytes(saved[2].read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_scripted(tmp_path / "scripted.pt", CPU)


def test_measuring_gives_a_row_a_variant_and_batch_size(saved, prepared):
    model, *_ = saved
    search = GreedySearch(model).eval()
    table = measure({"a": search, "b": search}, prepared.splits["test"], [1, 4], max_words=5, replies=20)
    assert table[["variant", "batch"]].to_numpy().tolist() == [["a", 1], ["b", 1], ["a", 4], ["b", 4]]
    assert (table["timed"] >= 20).all()
    assert (table["p95 ms"] >= table["p50 ms"]).all()
    assert (table["speed-up"][table["variant"] == "a"] == 1).all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_freezes_the_length_of_the_reply(saved):
    """Why the search is scripted: what the classic tutorial says of tracing does not hold for a loop."""
    model, *_ = saved
    eager = GreedySearch(model).eval()
    query, lengths = torch.tensor([[4, 5, 6]]), torch.tensor([3])
    with torch.no_grad():
        traced = torch.jit.trace(eager, (query, lengths, torch.tensor(1)), check_trace=False)
        assert traced(query, lengths, torch.tensor(9)).size(1) == 1
        assert eager(query, lengths, 9).size(1) > 1
