import base64
import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from helpers.__main__ import main
from helpers.decoding import GreedySearch
from helpers.deploy import (
    BlockSearch,
    captured,
    cell,
    compiled,
    described,
    load_scripted,
    page,
    quantised,
    save_scripted,
    script,
)  # fmt: skip
from helpers.evaluation import evaluate
from helpers.latency import answers, parity
from helpers.model import new_model
from helpers.run import ROOT, Run
from helpers.settings import UserError
from helpers.text import EOS
from helpers.training import load_model
from tests.conftest import CPU, TINY
from tests.test_model import SCORES


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    model, about = described(trained)
    path = tmp_path_factory.mktemp("scripted") / "scripted.pt"
    save_scripted(path, script(model), about)
    return model, about, path


def compared(model, search, pairs, max_words=12, size=64):
    expected = answers(GreedySearch(model).eval(), pairs, max_words)
    return parity(model, pairs, expected, answers(search, pairs, max_words, size))


def test_the_scripted_search_says_what_eager_says(saved, prepared):
    model, about, path = saved
    search, vocabulary, settings = load_scripted(path, CPU)
    assert json.loads(vocabulary.to_json()) == about["vocabulary"]
    assert settings.to_dict() == about["settings"]
    counts = compared(model, search, prepared.splits["test"])
    assert counts["different"] == 0
    assert counts["identical"] + counts["tied"] == len(prepared.splits["test"])
    eager, scripted = (evaluate(m, prepared.splits["test"]).per_token for m in (model, search.model))
    assert scripted == pytest.approx(eager, rel=1e-5)


def test_a_scripted_file_says_what_it_is_without_being_loaded(saved):
    """Settings, vocabulary, origin and licence lie in it as JSON that any program for zip files shows."""
    with zipfile.ZipFile(saved[2]) as file:
        named = {name.rpartition("/")[2]: name for name in file.namelist() if "/extra/" in name}
        assert set(named) == {"settings.json", "vocabulary.json", "examples.json", "origin.json"}
        assert {name: json.loads(file.read(path)) for name, path in named.items()} == {
            f"{part}.json": value for part, value in saved[1].items()
        }
    assert list(saved[1]["origin"]) == ["Trained on", "Licence of that text"]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("feeding", [False, True])
def test_every_kind_of_model_scripts_and_goes_in_blocks(prepared, score, feeding):
    model = new_model(TINY.change(attention=score, input_feeding=feeding), len(prepared.vocabulary)).eval()
    some = prepared.splits["test"].first(30)
    assert compared(model, script(model), some, 8)["different"] == 0
    for count in (1, 5):
        blocks = BlockSearch(model, lambda work, example: work, longest_query=25, count=count)
        assert compared(model, blocks, some, 8, size=7)["different"] == 0
        assert len(blocks.runs) == 2, "one a batch size: 7, and 2 that are left over"


@torch.no_grad()
def test_the_gates_written_out_are_a_gru_cell(monkeypatch):
    torch.manual_seed(0)
    layer, inputs, state = torch.nn.GRU(6, 5, batch_first=True), torch.randn(3, 6), torch.randn(3, 5)
    plain = cell(inputs, state, layer)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "gru_cell", lambda *_: pytest.fail("a compiler cannot look inside"))
    assert torch.allclose(cell(inputs, state, layer), plain, atol=1e-6)
    assert torch.allclose(plain, layer(inputs.unsqueeze(1), state.unsqueeze(0))[0][:, 0], atol=1e-6)


def test_blocks_stop_when_all_replies_have_ended(saved, prepared):
    model, *_ = saved
    batch, calls = prepared.splits["test"].batch(torch.arange(4)), []

    def counted(steps, example):
        return lambda *inputs: calls.append(1) or steps(*inputs)

    reply = BlockSearch(model, counted, 25, count=3)(batch.query, batch.query_lengths, 200)
    alone = GreedySearch(model).eval()(batch.query, batch.query_lengths, 200)
    assert len(calls) == -(-alone.size(1) // 3)
    assert torch.equal(reply[:, : alone.size(1)], alone)


def test_steps_export(saved, prepared):
    model, *_ = saved
    batch = prepared.splits["test"].batch(torch.arange(3))
    exports = []

    def export(steps, example):
        exports.append(torch.export.export(steps, example))
        return exports[0].module()

    blocks = BlockSearch(model, export, 25)
    reply = blocks(batch.query, batch.query_lengths, 6)
    assert torch.equal(reply, GreedySearch(model).eval()(batch.query, batch.query_lengths, 6))
    assert len(exports) == 1


def test_steps_in_bf16_and_weights_in_int8_answer_much_the_same(saved, prepared):
    model, *_ = saved
    half = BlockSearch(copy.deepcopy(model).bfloat16(), lambda work, example: work, 25)
    for search in (half, script(quantised(model))):
        counts = compared(model, search, prepared.splits["test"], max_words=1)
        assert counts["identical"] > 0.7 * len(prepared.splits["test"]), counts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs take a CUDA device")
def test_captured_blocks_say_what_eager_says(saved, prepared):
    model = copy.deepcopy(saved[0]).cuda()
    some = prepared.splits["test"].to(torch.device("cuda"))
    assert compared(model, BlockSearch(model, captured, 25, count=5), some)["different"] == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_say_what_eager_says(saved, prepared):
    model, some = saved[0], prepared.splits["test"].first(16)
    assert compared(model, BlockSearch(model, compiled, 25), some)["different"] == 0


def test_a_query_of_no_words_is_refused_in_one_sentence(saved):
    model, _, path = saved
    query, lengths = torch.tensor([[4, 5], [0, 0]]), torch.tensor([2, 0])
    for search in (GreedySearch(model).eval(), load_scripted(path, CPU)[0]):
        with pytest.raises(Exception, match="A query has no words"):  # TorchScript has its own kind of exception
            search(query, lengths, 5)
    with pytest.raises(UserError):
        GreedySearch(model).eval()(query, lengths, 5)


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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_freezes_the_length_of_the_reply(saved):
    """Why the search is scripted: what the classic tutorial says of tracing does not hold for a loop."""
    model = copy.deepcopy(saved[0])
    torch.nn.init.constant_(model.output.bias[EOS : EOS + 1], -100)  # it does not stop
    eager = GreedySearch(model).eval()
    query, lengths = torch.tensor([[4, 5, 6]]), torch.tensor([3])
    with torch.no_grad():
        traced = torch.jit.trace(eager, (query, lengths, torch.tensor(1)), check_trace=False)
        assert traced(query, lengths, torch.tensor(9)).size(1) == 1
        assert eager(query, lengths, 9).size(1) > 1


NOT_RECORDED = "not recorded: ask whoever gave the text"
TEMPLATE = (ROOT / "deploy" / "page.html").read_text(encoding="utf-8")


def part(text, tag):
    """What stands in the page's element of this name, of scripts in that which runs."""
    return re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_page_allows_its_own_script_and_style_alone(tag):
    own = base64.b64encode(hashlib.sha256(part(TEMPLATE, tag).encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', TEMPLATE)[1].split("; ")
    assert policy[0] == "default-src 'none'"
    assert f"{tag}-src 'sha256-{own}'" in policy


def test_the_page_names_no_address_and_writes_no_text_as_html():
    addresses = set(re.findall(r"\bhttps?://[^\s\"']+", TEMPLATE))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a namespace, which nobody fetches"
    markup = ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "src=", "href=", " style=", " on\\w+="]
    for way in [*markup, "eval\\(", "Function\\(", "fetch\\(", "XMLHttp", "WebSocket", "import\\(", "localStorage"]:
        assert not re.search(way, TEMPLATE), way


def test_the_committed_page_is_this_page():
    """Its bot is that of the machine that ran `make images`; around it is the template, or that is to be run again."""
    before, after = (ROOT / "deploy" / "page.html").read_text(encoding="utf-8").split(">null<")
    committed = (ROOT / "docs" / "bot.html").read_text(encoding="utf-8")
    assert committed.startswith(before + ">{")
    assert committed.endswith("}<" + after)
    assert len(committed) < 2e6


def test_the_page_stays_small():
    """It is there to be read, from top to bottom."""
    lines = part(TEMPLATE, "script").splitlines()
    assert len(lines) <= 460
    assert max(map(len, lines)) <= 120


def inside(text):
    """What a filled page carries."""
    return json.loads(re.search(r'<script type="application/json" id="bot">(.*?)</script>', text)[1])


@pytest.mark.parametrize("precision", ["half", "int8"])
def test_a_page_carries_the_whole_bot(trained, precision, tmp_path, capsys):
    run = Run(tmp_path)
    shutil.copy(trained.checkpoint, run.checkpoint)
    run.record(corpus={"name": "<shop>", "source": "/home/somebody/<shop>.tsv"})
    assert main(["page", "--run", str(tmp_path), "--precision", precision]) == 0
    text = run.page.read_text(encoding="utf-8")
    assert f"bot.html: {len(text.encode()) / 1e6:.1f} MB" in capsys.readouterr().out
    assert text == page(run, precision), "twice the same"
    bot, (model, vocabulary, settings, examples) = inside(text), load_model(run.checkpoint, CPU)
    assert (bot["settings"], bot["examples"], bot["precision"]) == (settings.to_dict(), examples, precision)
    assert bot["vocabulary"] == json.loads(vocabulary.to_json())
    assert bot["origin"] == {"Trained on": "<shop>.tsv", "Licence of that text": NOT_RECORDED}
    assert "somebody" not in text
    assert text.count("</script>") == 2
    assert set(bot["weights"]) == {name for name, _ in model.named_parameters()}
    for name, weight in model.named_parameters():
        shape, packed = bot["weights"][name]
        packed, weight = base64.b64decode(packed), weight.detach().numpy()
        assert tuple(shape) == weight.shape
        if precision == "int8" and weight.ndim == 2:
            scale = np.frombuffer(packed, np.float32, len(weight))[:, None]
            found = np.frombuffer(packed, np.int8, weight.size, 4 * len(weight)).reshape(shape) * scale
            assert np.all(np.abs(found - weight) <= 0.5001 * scale), name
        else:
            assert np.array_equal(np.frombuffer(packed, np.float16).reshape(shape), weight.astype(np.float16)), name


def test_the_embedded_corpus_is_known_and_one_that_nobody_noted_is_not(trained, tmp_path):
    run = Run(tmp_path)
    shutil.copy(trained.checkpoint, run.checkpoint)
    assert described(run)[1]["origin"] == {"Trained on": "not recorded", "Licence of that text": NOT_RECORDED}
    run.record(corpus={"name": "sample", "source": "sample"})
    assert described(run)[1]["origin"]["Licence of that text"].startswith("MIT")
    run.record(corpus={"name": "sample", "source": "/home/somebody/sample"})
    assert described(run)[1]["origin"] == {"Trained on": "sample", "Licence of that text": NOT_RECORDED}
    with pytest.raises(UserError, match="missing"):
        page(Run(tmp_path / "elsewhere"), "half")
