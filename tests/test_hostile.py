"""What files and people may send: nothing runs, nothing is written elsewhere, nothing hangs, no pair is invented."""

import ast
import contextlib
import json
import os
import pickle
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import world
from helpers.__main__ import main
from helpers.batches import Prepared
from helpers.chat import Chatbot
from helpers.corpus import read_corpus
from helpers.run import ROOT, Run
from helpers.settings import UserError
from helpers.text import Vocabulary, spell, tokenise
from helpers.training import Checkpoint, load_model
from tests.conftest import CPU, SOAK, TINY
from tests.test_corpus import as_convokit, as_zip, write

FILES = 10_000 if SOAK else 300  # mutated corpora
CHAT_LINES = 10_000 if SOAK else 300
PIPE_LINES = 100_000 if SOAK else 1_500
CHECKPOINTS = 1_000 if SOAK else 60
SECONDS = 5  # that one input may take
PEAK = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024"  # megabytes

quick = settings(max_examples=1000 if SOAK else 60, deadline=None, suppress_health_check=list(HealthCheck))
NASTY = ["\0", "\x1b]0;owned\x07", "\r", "\u2028", "\ufeff", "\u202e", "\u200f", "e\u0301", "\u0315\u0300", "\udc80",
         "\ud83d", "\U0001f642", "İ", "K", "ß", "ﬁ", "'", "''", "<u>", "<", ">", "+++$+++", " +++$+++ ", ".", "?!",
         "１２", "–", "\x92", "0" * 400, "[" * 400]  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from([*NASTY, "a", " ", "don't", "Café"])).map("".join))


class HangError(BaseException):
    """Not an Exception, so that no handler of the code under test takes it for an error of its own."""


@contextlib.contextmanager
def no_hang():
    def rung(*_):
        raise HangError

    before = signal.signal(signal.SIGALRM, rung)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Text


@quick
@given(TEXTS)
def test_tokenising_is_idempotent_and_words_are_what_the_vocabulary_can_hold(text):
    words = tokenise(text)
    assert tokenise(" ".join(words)) == words
    assert all(word and word == word.lower() and not re.search(r"\s", word) for word in words)
    assert tokenise(spell(words)) == words


@quick
@given(st.lists(TEXTS))
def test_every_known_word_survives_the_vocabulary_and_its_json(texts):
    words = sorted({word for text in texts for word in tokenise(text)})
    vocabulary = Vocabulary.from_json(Vocabulary(words, unknown_types=3).to_json())
    assert vocabulary.decode(vocabulary.encode(words)) == words


@quick
@given(st.one_of(TEXTS, st.recursive(st.none() | st.floats() | TEXTS, st.lists).map(json.dumps)))
def test_what_is_no_vocabulary_is_refused(text):
    with contextlib.suppress(UserError):
        assert Vocabulary.from_json(text).decode([0]) == []
    whole = json.loads(Vocabulary([]).to_json())
    for word in ("\x1b[31m", "two words", "", "<b>", "line\n", "É"):
        with pytest.raises(UserError, match="cannot hold"):
            Vocabulary.from_json(json.dumps(whole | {"words": [word]}))


def test_a_megabyte_of_anything_is_read_in_a_moment():
    for part in (*NASTY, "a", "a'", "<a", "1.", "\u0315\u0300", "Å", "각", "i'm "):
        with no_hang():
            words = tokenise(part * (1_000_000 // len(part)))
            spell(words)


def test_an_error_shows_nothing_that_steers_a_terminal():
    error = str(UserError("one\ntwo \x1b]0;owned\x07 \u202e \ud800 é" + "x" * 5000))
    assert error.startswith(r"one two \x1b]0;owned\x07 \u202e \ud800 é")
    assert len(error) < 1100


# Corpora


@quick
@given(st.lists(TEXTS, min_size=2, max_size=6))
def test_any_text_in_a_well_formed_corpus_comes_back_as_it_is_or_is_refused(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("property")
    rows = [
        json.dumps({"id": f"L{i}", "conversation_id": "L0", "text": text, "reply-to": f"L{i - 1}" if i else None})
        for i, text in enumerate(texts)
    ]
    (folder / "utterances.jsonl").write_text("\n".join(rows))
    texts = [json.loads(json.dumps(text)) for text in texts]  # two halves side by side become one character
    clean = [re.sub("[\ud800-\udfff]", " ", text).strip() for text in texts]
    expected = [(a, b) for a, b in pairwise(clean) if a and b]
    if not expected:
        with pytest.raises(UserError, match="no exchange"):
            read_corpus(folder)
        return
    corpus = read_corpus(folder)
    assert [(exchange.query, exchange.response) for exchange in corpus.exchanges] == expected
    assert corpus.silent == len(texts) - 1 - len(expected)


def neighbours(folder: Path) -> list[tuple[str, str]]:
    """All pairs that the files' own words allow, read in the plainest way: what is not among them is a wrong pair."""
    if (file := folder / "utterances.jsonl").exists():
        rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line.strip(b"\r")]
        texts = {row["id"]: row["text"] or "" for row in rows}
        asked = [(r.get("reply-to", r.get("reply_to")), r) for r in rows]
        pairs = [(texts[to], r["text"] or "") for to, r in asked if to in texts and to != r["id"]]  # none to itself
        return [tuple(re.sub("[\ud800-\udfff]", " ", text).strip() for text in pair) for pair in pairs]
    texts, pairs = {}, []
    for line in (folder / "movie_lines.txt").read_bytes().split(b"\n"):
        line = line.replace(b"\xef\xbf\xbd", b" ")
        try:
            fields = line.decode("utf-8").rstrip("\r").split(" +++$+++ ", 4)
        except UnicodeDecodeError:
            fields = line.decode("iso-8859-1").rstrip("\r").split(" +++$+++ ", 4)
        texts[fields[0]] = fields[4].strip() if len(fields) == 5 else ""
    for line in (folder / "movie_conversations.txt").read_bytes().split(b"\n"):
        ids = line.decode("iso-8859-1").split(" +++$+++ ")[-1].split("'")[1::2]
        pairs += [(texts[a], texts[b]) for a, b in pairwise(ids)]
    return pairs


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A few random injuries: bytes flipped, cut, doubled, and what has broken readers before put in."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(8)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] = chance.randrange(256)
        elif kind == 1:
            del data[at : at + chance.choice((1, 10, 1000))]
        elif kind == 2:
            data[at:at] = chance.choice(NASTY).encode("utf-8", "surrogatepass")
        elif kind == 3:
            data[at:at] = data[at : at + chance.choice((5, 50, 500))]
        elif kind == 4:
            lines = bytes(data).split(b"\n")
            one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
            lines[one], lines[other] = lines[other], chance.choice((lines[one], lines[other], b""))
            data = bytearray(b"\n".join(lines))
        elif kind == 5:
            data = bytearray(bytes(data).replace(*chance.choice(SWAPS), chance.choice((1, 3, -1))))
        elif kind == 6:
            data[at:at] = chance.choice((b"A", b"?", b"\xcc\x95\xcc\x80", b"'L1'", b"{")) * chance.choice((50, 20_000))
        elif chance.random() < 0.1:
            del data[at:]
    return bytes(data)


SWAPS = [(b" +++$+++ ", b"+++$+++"), (b"'", b'"'), (b"\n", b"\r\n"), (b"\n", b"\r"), (b"L", b"M"), (b", ", b","),
         (b"null", b"5"), (b'"text"', b'"txt"'), (b'"L', b'"\\ud800L'), (b"a", b"\xe9"), (b" ", b"\xc2\xa0"),
         (b"[", b"[["), (b"m0", b""), (b'"', b'\\"'), (b"L1", b"L2")]  # fmt: skip


def test_a_mutated_corpus_gives_true_pairs_or_a_clear_error(tmp_path):
    small = world.write_corpus(tmp_path / "small", exchanges=30)
    plain = {"lines": write(tmp_path / "plain"), "small": small}
    jsonl = tmp_path / "jsonl"
    jsonl.mkdir()
    as_convokit(jsonl / "utterances.jsonl")
    zipped = as_zip(small, tmp_path / "whole.zip").read_bytes()
    true = read_corpus(small).exchanges
    folder = tmp_path / "mutated"
    folder.mkdir()
    chance, counts, slowest, said = random.Random(1), {"read": 0, "refused": 0}, 0.0, []
    for number in range(FILES):
        kind = ("lines", "small", "jsonl", "zip")[number % 4]
        for file in folder.iterdir():
            file.unlink()
        source = folder
        if kind == "zip":
            source = folder / "corpus.zip"
            source.write_bytes(mutated(zipped, chance))
        else:
            files = list((jsonl if kind == "jsonl" else plain[kind]).iterdir())
            hurt = chance.choice(files)
            for file in files:
                content = file.read_bytes()
                (folder / file.name).write_bytes(mutated(content, chance) if file == hurt else content)
        started = time.perf_counter()
        try:
            with no_hang():
                corpus = read_corpus(source)
                for exchange in corpus.exchanges:
                    tokenise(exchange.query), tokenise(exchange.response)
        except UserError as error:
            counts["refused"] += 1
            said.append(str(error))
        except BaseException:
            print(f"input {number} ({kind}) is kept in {folder}")
            raise
        else:
            counts["read"] += 1
            found = [(exchange.query, exchange.response) for exchange in corpus.exchanges]
            if kind == "zip":
                assert corpus.exchanges == true, number
            else:
                allowed = neighbours(folder)
                assert len(found) + corpus.silent == len(allowed), number
                assert sorted(found) == sorted(pair for pair in allowed if all(pair)), number
        slowest = max(slowest, time.perf_counter() - started)
    print(f"\n{FILES:,} mutated corpora: {counts}, 0 tracebacks, slowest {slowest:.2f} s")
    assert min(counts.values()) > FILES / 20
    assert [text for text in said if not re.search(r"line \d+|hold|damaged|fetch", text, re.IGNORECASE)] == []


def bomb(path: Path, claimed: int | None = None, filled_with: bytes = b" ") -> Path:
    """A zip of 10 GiB of blanks in 10 MB, made by repeating one compressed block; or one that claims another size."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(filled_with * (1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    packed = block * 10240 + squeeze.flush()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("movie_conversations.txt", "x")
        member = zipfile.ZipInfo("movie_lines.txt")
        with archive.open(member, "w", force_zip64=True) as file:
            file.write(packed)
        member.compress_type, member.compress_size = zipfile.ZIP_DEFLATED, len(packed)
        member.file_size = claimed or 10240 << 20
    return path


@pytest.mark.parametrize(
    ("claimed", "filled_with"),
    [(None, b" "), (1000, b" "), ((1 << 30) - 1, b" "), (1 << 24, b" "), (None, b"\n"), ((1 << 30) - 1, b"\n")],
)
def test_a_zip_bomb_of_ten_gigabytes_is_refused_at_once(tmp_path, claimed, filled_with):
    path = bomb(tmp_path / "bomb.zip", claimed, filled_with)
    assert path.stat().st_size < 20e6
    command = [sys.executable, "-m", "helpers", "train", "--corpus", str(path), "--run", str(tmp_path / "run")]
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert time.perf_counter() - started < SECONDS + 10  # with the start of Python


def test_names_that_lead_out_of_a_zip_lead_nowhere(tmp_path):
    (tmp_path / "inside").mkdir()
    folder = write(tmp_path / "inside" / "c")
    expected = read_corpus(folder).exchanges
    before = sorted(tmp_path.rglob("*"))
    for prefix in ("../", "../../../../", "/", str(tmp_path / "outside") + "/", "c:\\", "a/../../"):
        path = as_zip(folder, tmp_path / "inside" / "c.zip", prefix)
        with contextlib.suppress(UserError):
            assert read_corpus(path).exchanges == expected
        path.unlink()
        assert sorted(tmp_path.rglob("*")) == before


def test_links_in_a_zip_are_not_followed_and_odd_files_in_a_folder_not_opened(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("L1 +++$+++ u0 +++$+++ m0 +++$+++ ANN +++$+++ the secret\n" * 2)
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        for name in ("movie_lines.txt", "movie_conversations.txt"):
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o120777 << 16
            archive.writestr(member, str(secret))
    with pytest.raises(UserError, match="line 1") as raised:
        read_corpus(tmp_path / "link.zip")
    assert "the secret" not in str(raised.value)
    for name, make in [
        ("pipe", os.mkfifo), ("folder", os.mkdir), ("zero", lambda path: os.symlink("/dev/zero", path)),
        ("broken", lambda path: os.symlink("nowhere", path)), ("loop", lambda path: os.symlink(path, path)),
    ]:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "movie_lines.txt")
        (folder / "movie_conversations.txt").write_text("x")
        for source in (folder, folder / "movie_lines.txt"):
            with no_hang(), pytest.raises(UserError):
                read_corpus(source)


@pytest.mark.parametrize("source", ["", "\0", "x" * 5000, "~nobody-of-that-name/c.zip", "\udcff", "/dev/zero", "."])
def test_an_odd_path_is_refused_in_a_sentence(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with no_hang(), pytest.raises(UserError):
        read_corpus(source)


def test_a_line_without_end_is_refused(tmp_path):
    folder = write(tmp_path / "c")
    with open(folder / "movie_lines.txt", "ab") as file:
        file.write(b"\nL9 +++$+++ u0 +++$+++ m0 +++$+++ ANN +++$+++ " + b"word " * 1_000_000)
    assert read_corpus(folder).lines == 6  # 5 MB are read, though no conversation has that line
    with open(folder / "movie_lines.txt", "ab") as file:
        file.truncate(100 << 20)
    with no_hang(), pytest.raises(UserError, match=r"line 7: .* refused"):
        read_corpus(folder)


# Checkpoints and other tensors


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_a_pickle_that_runs_code_is_refused_wherever_it_is_put(trained, tmp_path, capsys):
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # the pickle would
    marker.unlink()
    good = torch.load(trained.checkpoint, weights_only=True)
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    payloads = [{**good, key: Evil(marker)} for key in ("model", "optimizer", "settings")] + [Evil(marker)]
    for payload in payloads:
        torch.save(payload, run.checkpoint)
        torch.save(payload, run.data)
        assert main(["chat", "--run", str(run.folder)]) == 1
        with pytest.raises(UserError, match="cannot be loaded"):
            Prepared.load(run.data)
        torch.save(payload, run.checkpoint, _use_new_zipfile_serialization=False)
        assert main(["chat", "--run", str(run.folder)]) == 1
    run.checkpoint.write_bytes(pickle.dumps(Evil(marker)))
    assert main(["chat", "--run", str(run.folder)]) == 1
    assert capsys.readouterr().err.count("error: ") == 2 * len(payloads) + 1
    assert not marker.exists()


def test_only_one_door_loads_programs_and_nothing_unpickles_runs_or_unpacks():
    files = [path for folder in ("helpers", "benchmarks", "tools") for path in (ROOT / folder).glob("*.py")]
    assert len(files) > 20
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "joblib", "marshal", "shelve"} & set(names), path.name
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called == "exec":  # the series' own notebooks where there is no Jupyter, helpers' own lines with an edit
                assert str(path.relative_to(ROOT)) in ("benchmarks/gpu.py", "benchmarks/mistakes.py")
            assert called not in ("eval", "os.system", "yaml.load"), (path.name, called)
            assert not called.endswith((".extractall", ".extract")), (path.name, called)
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path.name
            if called == "torch.jit.load":  # from the path that its caller names, with a word on trust
                assert path.relative_to(ROOT) == Path("helpers/deploy.py")


def test_a_checkpoint_that_lies_is_refused_before_it_takes_memory(trained, tmp_path, monkeypatch):
    good, path = torch.load(trained.checkpoint, weights_only=True), tmp_path / "checkpoint.pt"
    huge = {**good["settings"], "hidden_size": 8192, "embedding_size": 8192, "layers": 16}  # 60 GB of weights
    lies = [
        {"settings": huge}, {"settings": []}, {"settings": {"hidden": 1}}, {"settings": {1: 2}}, {"vocabulary": "[]"},
        {"vocabulary": None}, {"best_model": {}}, {"best_model": []}, {"best_model": {"a": 1}}, {"progress": None},
        {"best_model": dict.fromkeys(good["model"], torch.ones(1))}, {"format": "1"}, {"more": 1},
        {"settings": good["settings"] | {"layers": 10**30}}, {"settings": good["settings"] | {"dropout": "nan"}},
    ]  # fmt: skip
    torch.save(good, path)
    load_model(path, CPU)  # what is refused below is refused for its lie
    for lie in lies:
        torch.save({**good, **lie}, path)
        with no_hang(), pytest.raises(UserError, match=r"does not fit its own settings|not a (checkpoint|file)"):
            load_model(path, CPU)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(trained.checkpoint) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    with pytest.raises(UserError, match="compressed"):
        Checkpoint.load(packed)


def test_a_checkpoint_that_lies_does_not_break_a_resumed_training(trained, corpus_folder, tmp_path, capsys):
    good, run = torch.load(trained.checkpoint, weights_only=True), Run(tmp_path)
    profile = tmp_path / "profile.yaml"
    profile.write_text(json.dumps(TINY.to_dict()))
    command = ["train", "--run", str(tmp_path), "--corpus", str(corpus_folder), "--profile", str(profile), "--resume"]
    for lie in (
        {"optimizer": {}}, {"optimizer": None}, {"model": {}}, {"model": None}, {"progress": {"update": "x"}},
        {"progress": {"a": 1}}, {"progress": None}, {"best_model": {}},
    ):  # fmt: skip
        torch.save({**good, **lie}, run.checkpoint)
        before = run.checkpoint.read_bytes()
        run.metrics.write_text('{"update": 1, "loss": 2.0}\n')
        assert main(command) == 1, lie
        assert re.search(r"^error: .*(cannot be resumed|not a checkpoint)", capsys.readouterr().err), lie
        assert run.checkpoint.read_bytes() == before
    torch.save(good, run.checkpoint)
    assert main(command) == 0  # what was refused above was refused for its lie


def test_a_mutated_checkpoint_loads_or_is_refused(trained, tmp_path):
    whole, path, chance = trained.checkpoint.read_bytes(), tmp_path / "checkpoint.pt", random.Random(2)
    counts = {"loaded": 0, "refused": 0}
    for _ in range(CHECKPOINTS):
        path.write_bytes(mutated(whole, chance))
        with no_hang():
            try:
                load_model(path, CPU)
                counts["loaded"] += 1
            except UserError:
                counts["refused"] += 1
    print(f"\n{CHECKPOINTS:,} mutated checkpoints: {counts}, 0 tracebacks")


@pytest.mark.parametrize("content", [b"", b"\xff", b'{"update": 1}', b"[]\n", b"5\n", b'{"loss": 1}\n{"upd', None])
def test_metrics_that_are_none_do_not_break_a_resumed_training(trained, corpus_folder, tmp_path, content, capsys):
    run = Run(tmp_path)
    run.checkpoint.write_bytes(trained.checkpoint.read_bytes())
    if content is not None:
        run.metrics.write_bytes(content)
    profile = tmp_path / "profile.yaml"
    profile.write_text(json.dumps(TINY.to_dict()))
    command = ["train", "--run", str(tmp_path), "--corpus", str(corpus_folder), "--profile", str(profile), "--resume"]
    assert main(command) == 0
    assert "Traceback" not in capsys.readouterr().err


# Talking


@pytest.fixture(scope="module")
def bot(trained):
    return Chatbot.load(trained, CPU)


def strange_lines(count: int) -> list[str]:
    """Lines that people and machines send: words, and everything that is none."""
    chance, lines = random.Random(3), []
    for number in range(count):
        parts = [*NASTY, "hello", " ", "how are you?", "don't", "1984", "zebra"]
        line = "".join(chance.choice(parts) for _ in range(chance.choice((0, 1, 3, 12, 60))))
        if chance.random() < 0.2:
            line = "".join(chr(chance.randrange(0x110000)) for _ in range(chance.randrange(200)))
        if chance.random() < 0.1:
            line = chance.choice("?!.,;-'\"") * chance.randrange(500)
        if number % 100 == 7:
            line = (line or "a") * (1_000_000 // len(line or "a"))
        lines.append(line.replace("\n", " ").replace("/quit", ""))
    return lines


def test_any_line_gets_an_answer_in_time(bot):
    slowest, by_decoder, decoders = 0.0, {}, list(bot.decoders())
    for number, line in enumerate(strange_lines(CHAT_LINES)):
        decoder = decoders[number % len(decoders)]
        started = time.perf_counter()
        with no_hang():
            reply = bot.reply(line, decoder, seed=number)
        slowest = max(slowest, time.perf_counter() - started)
        by_decoder[decoder] = by_decoder.get(decoder, 0) + 1
        assert reply.text
        assert reply.text.isprintable()
        assert len(reply.text.splitlines()) == 1
    print(f"\n{CHAT_LINES:,} chat lines {by_decoder}: 0 tracebacks, slowest {slowest:.2f} s")


def test_a_pipe_of_anything_is_a_line_out_for_a_line_in(trained, tmp_path):
    lines = [line.encode("utf-8", "surrogatepass") for line in strange_lines(CHAT_LINES)]
    chance = random.Random(4)
    lines = [mutated(line, chance).replace(b"\n", b" ") if len(line) < 1000 else line for line in lines]
    text = tmp_path / "lines"
    text.write_bytes(b"".join(line.replace(b"/quit", b"") + b"\n" for line in lines))
    command = [sys.executable, "-m", "helpers", "chat", "--run", str(trained.folder)]
    with open(text, "rb") as file:
        done = subprocess.run(command, stdin=file, capture_output=True, check=False, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == len(lines)


def test_a_long_pipe_takes_constant_memory(trained):
    command = [sys.executable, "-m", "helpers", "chat", "--run", str(trained.folder)]
    bot = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = ["Hello.", "How are you?", "", "🙂", "zebra xylophone", "What is your name, and where do you live? " * 5]
    at = {}

    def megabytes(name: str) -> float:
        status = Path(f"/proc/{bot.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024

    started = time.perf_counter()
    for number in range(PIPE_LINES):
        bot.stdin.write(f"{lines[number % len(lines)]} {number if number % 3 else ''}\n".encode())
        if number % 10 == 9 or number == PIPE_LINES - 1:
            bot.stdin.flush()
            for _ in range(number % 10 + 1):
                assert bot.stdout.readline().strip()
        if number + 1 in (PIPE_LINES // 10, PIPE_LINES):
            at[number + 1] = megabytes("VmRSS")
    peak = megabytes("VmHWM")
    seconds = time.perf_counter() - started
    _, error = bot.communicate()
    assert (bot.returncode, error) == (0, b"")
    grown = at[PIPE_LINES] - at[PIPE_LINES // 10]
    print(f"\n{PIPE_LINES:,} lines in {seconds:.0f} s; memory {at} MB, peak {peak:.0f} MB")
    assert grown < 5, at


def test_a_line_of_many_megabytes_takes_no_more_memory_than_a_short_one(trained):
    many = 250 if SOAK else 50
    python, peaks = shlex.quote(sys.executable), []
    line = f"{python} -c \"import sys; [sys.stdout.write('hello ' * 200_000) for _ in range({many})]; print()\""
    for source in ("echo hello", line):
        measured = f"import sys; from helpers.__main__ import main; main(sys.argv[1:]); print({PEAK})"
        command = f'{source} | {python} -c "{measured}" chat --run {trained.folder}'
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        reply, peak = done.stdout.splitlines()
        assert reply
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 20, peaks


# Secrets and the machine


def test_a_key_of_weights_and_biases_is_nowhere_to_be_found(corpus_folder, tmp_path):
    key = "0123456789abcdef" * 2 + "deadbeef"
    run = tmp_path / "run"
    command = [sys.executable, "-m", "helpers", "train", "--corpus", str(corpus_folder), "--run", str(run)]
    command += ["--set", "updates=4", "validate_every=2", "held_out_share=0.15", "--wandb", "offline"]
    environment = os.environ | {"WANDB_API_KEY": key, "HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert key not in done.stdout + done.stderr
    assert list(run.rglob("*.wandb"))
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        assert key.encode() not in content, file
        assert key[:20].encode() not in content, file


def test_peak_memory_of_preparation(excerpt, tmp_path):
    program = (
        "import sys; from helpers.batches import prepare; from helpers.corpus import read_corpus\n"
        "from helpers.settings import load_profile\n"
        f"before = {PEAK}; prepare(read_corpus(sys.argv[1]), load_profile('cornell')); print(before, {PEAK})"
    )
    done = subprocess.run([sys.executable, "-c", program, str(excerpt)], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    print(f"\npreparing {excerpt.name}: peak {peak} MB, of which {before} MB with nothing but the imports")
    assert peak - before < 500
