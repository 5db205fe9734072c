"""deploy/chat.cpp, built as its first lines say, answers as Python does. Needs CMake, a C++ compiler, ICU's headers
and, for the replies, a finished run of the embedded corpus (`make check` gives a copy of one in CHATBOT_RUNS)."""

import dataclasses
import json
import os
import random
import shutil
import subprocess

import pytest
import torch

from benchmarks import outside
from benchmarks.textbook import textbook_greedy
from helpers.batches import Prepared
from helpers.chat import Chatbot
from helpers.deploy import described, save_scripted, script
from helpers.latency import Subject
from helpers.model import new_model
from helpers.run import Run
from helpers.settings import Settings, UserError
from helpers.text import Vocabulary, spell, tokenise
from helpers.training import Checkpoint
from tests.check_page import HOSTILE, OWN, read, tricky
from tests.conftest import CPU

RUN = Run.named("sample")
COUNT = 200  # held-out queries


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """deploy/chat.cpp, built."""
    try:
        return outside.build(tmp_path_factory.mktemp("build"))
    except UserError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def chat(program):
    """Gives lines to the program, with its files; returns its lines."""

    def ask(lines, *files):
        given = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        done = subprocess.run(
            [program, *files], input=given, capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        ask.errors = done.stderr.decode()
        assert done.returncode == 0, ask.errors
        return done.stdout.decode().removesuffix("\n").split("\n")

    return ask


def expected(bot, lines):
    """What Python says, each reply with the one before it in mind."""
    replies = [None]
    for line in lines:
        replies.append(bot.reply(line, "greedy", before=replies[-1]))
    return [reply.text for reply in replies[1:]]


def test_it_says_what_python_says(chat):
    lines = [query for query, _ in Prepared.load(RUN.data).texts["test"][:COUNT]]
    assert chat(lines, RUN.scripted) == expected(Chatbot.load(RUN, CPU), lines)


@pytest.fixture(scope="module")
def shy(trained_again, tmp_path_factory):
    """A scripted file of a bot that declines, reads the line before and cuts queries, and the bot itself."""
    run = trained_again(decline_below=0.9, context_words=3, max_query_words=8)
    path = tmp_path_factory.mktemp("shy") / "scripted.pt"
    model, about = described(run)
    save_scripted(path, script(model), about)
    return path, Chatbot.load(run, CPU)


@pytest.fixture(scope="module")
def trained_again(tmp_path_factory):
    """The run with settings of replying that are others than those it was trained with."""

    def change(**changes):
        run = Run(tmp_path_factory.mktemp("changed"))
        state = Checkpoint.load(RUN.checkpoint)
        dataclasses.replace(state, settings=state.settings | changes).save(run.checkpoint)
        return run

    return change


def test_it_knows_the_settings(chat, shy):
    """It declines, reads the line before and cuts long queries where Python does."""
    path, bot = shy
    lines = [query for query, _ in Prepared.load(RUN.data).texts["test"][:100]]
    lines = [other for line in lines for other in (line, line.rstrip(" .!?"), f"zebra {line} xylophone")]
    lines += ["", "  ", "«»", "?", "zebra", *read(OWN / "german_strange.txt")]
    found = chat(lines, path)
    assert found == expected(bot, lines)
    declined = sum(text.startswith("I don't know that; I can answer") for text in found)
    assert 10 < declined < len(lines) - 10, declined


def test_aotinductors_steps_say_what_python_says(chat, shy, tmp_path):
    """The library that AOTInductor makes of a decoding step, in a loop in C++; once padded, once with a line before."""
    lines = [query for query, _ in Prepared.load(RUN.data).texts["test"][:COUNT]]
    bot = Chatbot.load(RUN, CPU)
    steps = outside.package(bot.model, bot.settings.max_query_words, tmp_path / "steps.pt2")
    assert chat(lines, RUN.scripted, steps) == expected(bot, lines)
    path, bot = shy
    steps = outside.package(bot.model, bot.settings.max_query_words + 1 + bot.settings.context_words, steps)
    assert chat(lines, path, steps) == expected(bot, lines)


def test_its_rows_of_the_latency_table_agree_with_eager(program, monkeypatch):
    data, model = Prepared.load(RUN.data), Chatbot.load(RUN, CPU).model
    subject = Subject("run's", model, data.splits["test"], 12, textbook_greedy)
    rows, left_out = outside.rows(subject, 30, 20, False, program.parent)
    assert left_out == {"C++, AOTInductor": "compilation was not asked for"}
    (row,) = rows
    assert (row["variant"], row["batch"], row["compared"], row["different"]) == ("C++", 1, 30, 0)
    assert row["parity"]
    assert 0 < row["p50 ms"] <= row["p95 ms"]
    print(f"C++ {row['p50 ms']:.2f} ms a search, {row['vs eager']:.2f} times as fast as eager")
    other = new_model(Chatbot.load(RUN, CPU).settings.change(seed=9), model.output.out_features).eval()
    monkeypatch.setattr(outside, "script", lambda model: script(other))
    (row,) = outside.rows(subject, 30, 20, False, program.parent)[0]
    assert not row["parity"]
    assert "p50 ms" not in row


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(outside.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="CMake is not installed"):
        outside.build(tmp_path)
    data = Prepared.load(RUN.data)
    subject = Subject("run's", Chatbot.load(RUN, CPU).model, data.splits["test"], 12)
    rows, left_out = outside.rows(subject, 5, 5, False, tmp_path)
    assert rows == []
    assert all("CMake is not installed" in reason for reason in left_out.values())


def test_a_build_folder_of_another_checkout_is_built_again(program, tmp_path):
    shutil.copytree(program.parent, tmp_path / "moved", symlinks=True)
    again = outside.build(tmp_path / "moved")
    assert again.is_file()
    assert str(tmp_path / "moved") in (tmp_path / "moved" / "CMakeCache.txt").read_text()


class Echo(torch.nn.Module):
    """Says the query."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Identity()

    def forward(self, query: torch.Tensor, lengths: torch.Tensor, max_words: int) -> torch.Tensor:
        return query[:, :max_words]


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A scripted file that repeats the words of these lines, and the lines; HTML's entities are not its own."""
    lines = [line for path in sorted(OWN.iterdir()) for line in read(path)] + [tricky(seed) for seed in range(10_000)]
    # U+0323 belongs to Katakana too since Unicode 16, which Python's `regex` knows and not every ICU yet.
    lines = [line for line in [*lines, *HOSTILE] if not set("&\ud800\0\u0323") & set(line)]
    words = sorted({word for line in lines for word in tokenise(line[-10_000:])})
    luck = random.Random(1)
    spelling = {word: word.upper() for word in luck.sample(words, len(words) // 4) if tokenise(word.upper()) == [word]}
    vocabulary = Vocabulary(words, 3, spelling=spelling)
    path = tmp_path_factory.mktemp("echo") / "scripted.pt"
    settings = Settings().change(max_query_words=1000, max_response_words=1000).to_dict()
    about = {"vocabulary": json.loads(vocabulary.to_json()), "settings": settings, "examples": []}
    save_scripted(path, torch.jit.script(Echo()), about)
    return path, vocabulary, lines


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_reads_and_spells_every_script_as_python_does(chat, echo):
    path, vocabulary, lines = echo
    wrong = []
    for line, found in zip(lines, chat(lines, path), strict=True):
        said = spell(tokenise(line[-10_000:])[-1000:], vocabulary.spelling)
        if found != (said or "I see no word in that. Try a sentence?") and line.strip():
            wrong.append((line, found, said))
    assert not wrong, (len(wrong), wrong[:5])
    assert chat.errors == ""


def test_what_it_does_not_do_it_says(chat, program, echo, tmp_path):
    chat(["a &amp; b", "x &#39; y &nosuch; z"], echo[0])
    assert [line.split()[0] for line in chat.errors.splitlines()] == ["&amp;", "&#39;", "&nosuch;"]
    (tmp_path / "scripted.pt").write_bytes(b"nonsense")
    old = tmp_path / "old.pt"
    torch.jit.save(torch.jit.script(Echo()), str(old), _extra_files={"vocabulary.json": "{}"})
    for given in ([], [tmp_path / "scripted.pt"], [old]):
        done = subprocess.run([program, *given], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
