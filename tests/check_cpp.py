"""deploy/chat.cpp, built as its first lines say, answers as Python does. Needs CMake, a C++ compiler, ICU's headers
and, for the replies, a finished run of the embedded corpus (`make check` gives a copy of one in CHATBOT_RUNS)."""

import os
import random
import shutil
import subprocess
import time

import pytest
import torch

from helpers.batches import Prepared
from helpers.deploy import load_scripted, save_scripted
from helpers.run import ROOT, Run
from helpers.text import Vocabulary, spell, tokenise
from tests.check_page import HOSTILE, OWN, read, tricky
from tests.conftest import CPU

RUN = Run.named("sample")
COUNT = 200  # held-out queries


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Gives lines to the program, with a scripted file; returns its lines and how many seconds it took."""
    if shutil.which("cmake") is None or not (shutil.which("c++") or shutil.which(os.environ.get("CXX", "c++"))):
        pytest.skip("CMake or a C++ compiler is not installed")
    folder = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    steps = ["cmake", "-S", ROOT / "deploy", "-B", folder, prefix], ["cmake", "--build", folder]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if "Could NOT find ICU" in done.stderr:
            pytest.skip("ICU's headers are not installed (on Debian: libicu-dev)")
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    def ask(scripted, lines, *more):
        given = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        started = time.perf_counter()
        done = subprocess.run(
            [folder / "chat", scripted, *more], input=given, capture_output=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        ask.errors = done.stderr.decode()
        assert done.returncode == 0, ask.errors
        return done.stdout.decode().removesuffix("\n").split("\n"), time.perf_counter() - started

    ask.program = folder / "chat"
    return ask


def test_it_says_what_python_says(chat):
    search, vocabulary, max_words = load_scripted(RUN.scripted, CPU)
    lines = [query for query, _ in Prepared.load(RUN.data).texts["test"][:COUNT]]
    expected, taken = [], []
    with torch.no_grad():
        for line in lines * 3:
            started = time.perf_counter()
            query = vocabulary.encode(vocabulary.tokenise(line))
            ids = search(torch.tensor([query]), torch.tensor([len(query)]), max_words)
            expected.append(spell(vocabulary.decode(ids[0].tolist()), vocabulary.spelling))
            taken.append(time.perf_counter() - started)
    found, once = chat(RUN.scripted, lines)
    again, thrice = chat(RUN.scripted, lines * 3)
    each = {"Python": 1e3 * sum(taken[-COUNT:]) / COUNT, "C++": 1e3 * (thrice - once) / (2 * COUNT)}
    print(f"{COUNT} replies compared; a reply takes {each['Python']:.1f} ms in Python, {each['C++']:.1f} in C++")
    assert found == expected[:COUNT]
    assert again == expected


class Echo(torch.nn.Module):
    """Says the query."""

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
    save_scripted(path, torch.jit.script(Echo()), vocabulary, 100_000)
    return path, vocabulary, lines


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_reads_and_spells_every_script_as_python_does(chat, echo):
    path, vocabulary, lines = echo
    wrong = []
    for line, found in zip(lines, chat(path, lines)[0], strict=True):
        expected = spell(tokenise(line[-10_000:]), vocabulary.spelling)
        if found != (expected or "I see no word in that. Try a sentence?") and line.strip():
            wrong.append((line, found, expected))
    assert not wrong, (len(wrong), wrong[:5])
    assert chat.errors == ""


def test_a_second_argument_cuts_long_queries(chat, echo):
    assert chat(echo[0], ["a b.", "", " "], "1")[0] == [".", *["Say something, and I will answer."] * 2]


def test_what_it_does_not_do_it_says(chat, echo, tmp_path):
    chat(echo[0], ["a &amp; b", "x &#39; y &nosuch; z"])
    assert [line.split()[0] for line in chat.errors.splitlines()] == ["&amp;", "&#39;", "&nosuch;"]
    (tmp_path / "scripted.pt").write_bytes(b"nonsense")
    for given in ([], [tmp_path / "scripted.pt"]):
        done = subprocess.run([chat.program, *given], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
