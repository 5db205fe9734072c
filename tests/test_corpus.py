import gzip
import hashlib
import http.server
import io
import json
import re
import shutil
import threading
import zipfile

import pytest

from helpers import corpus as corpus_module
from helpers.corpus import SMALL, download, read_corpus
from helpers.run import ROOT
from helpers.settings import UserError

ENCODINGS = ("iso-8859-1", "utf-8", "utf-8-sig", "utf-16")
LINES = [
    "L1 +++$+++ u0 +++$+++ m0 +++$+++ ANN +++$+++ Hello.",
    "L2 +++$+++ u1 +++$+++ m0 +++$+++ BOB +++$+++ Caf\xe9?",
    "L3 +++$+++ u0 +++$+++ m0 +++$+++ ANN +++$+++ No.",
    "L4 +++$+++ u1 +++$+++ m1 +++$+++ BOB +++$+++ ",
    "L5 +++$+++ u1 +++$+++ m1 +++$+++ BOB +++$+++ Sure\xef\xbf\xbd",
    "L6 +++$+++ u1 +++$+++ m1 +++$+++ BOB +++$+++ Yes +++$+++ no.",
]
CONVERSATIONS = [
    "u0 +++$+++ u1 +++$+++ m0 +++$+++ ['L1', 'L2', 'L3']",
    "u0 +++$+++ u1 +++$+++ m1 +++$+++ ['L4', 'L5', 'L6']",
]


def write(folder, lines=LINES, conversations=CONVERSATIONS, encoding="iso-8859-1"):
    folder.mkdir(exist_ok=True)
    (folder / "movie_lines.txt").write_bytes("\n".join(lines).encode(encoding))
    (folder / "movie_conversations.txt").write_bytes("\n".join(conversations).encode(encoding))
    return folder


def as_zip(folder, path, prefix="cornell movie-dialogs corpus/"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, prefix + file.name)
    return path


def as_convokit(path):
    texts = {line.split(" +++$+++ ")[0]: line for line in LINES}
    rows = []
    for conversation in CONVERSATIONS:
        ids = conversation.split("'")[1::2]
        for before, line_id in zip([None, *ids], ids, strict=False):
            _, speaker, movie, _, text = texts[line_id].split(" +++$+++ ", 4)
            row = {"id": line_id, "conversation_id": ids[0], "text": text, "speaker": speaker, "reply-to": before}
            rows.append(json.dumps(row | {"meta": {"movie_id": movie}}))
    path.write_text("\n".join(reversed(rows)), encoding="utf-8")
    return path


def test_exchanges_are_neighbouring_lines_with_text(tmp_path):
    corpus = read_corpus(write(tmp_path / "c"))
    assert [(e.query, e.response, e.conversation, e.movie) for e in corpus.exchanges] == [
        ("Hello.", "Café?", "L1", "m0"),
        ("Café?", "No.", "L1", "m0"),
        ("Sure", "Yes +++$+++ no.", "L4", "m1"),
    ]
    assert corpus.silent == 1


def test_folder_zip_and_convokit_give_the_same_exchanges(tmp_path):
    folder = write(tmp_path / "c")
    expected = read_corpus(folder).exchanges
    assert read_corpus(as_zip(folder, tmp_path / "c.zip")).exchanges == expected
    convokit = read_corpus(as_convokit(tmp_path / "utterances.jsonl")).exchanges
    assert [(e.query, e.conversation, e.movie) for e in convokit] == [
        (e.query.replace("Sure", "Sureï¿½"), e.conversation, e.movie) for e in expected
    ]
    jsonl = tmp_path / "k"
    jsonl.mkdir()
    shutil.copy(tmp_path / "utterances.jsonl", jsonl)
    assert read_corpus(as_zip(jsonl, tmp_path / "k.zip", "movie-corpus/")).exchanges == convokit


def test_the_embedded_corpus_is_the_two_files_as_they_lie_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # from wherever it is asked for
    corpus = read_corpus("sample")
    files = [ROOT / "corpora" / "sample" / name for name in ("movie_lines.txt", "movie_conversations.txt")]
    lines, conversations = (path.read_bytes() for path in files)
    assert corpus.digest == hashlib.sha256(lines + conversations).hexdigest()
    assert (corpus.name, corpus.lines, corpus.conversations) == (
        "sample",
        lines.count(b"\n"),
        conversations.count(b"\n"),
    )
    assert len(corpus.exchanges) == corpus.lines - corpus.conversations  # nothing is left out
    assert corpus.silent == 0
    first = lines.decode("ascii").splitlines()[:2]
    assert corpus.exchanges[0] == (*(line.split(" +++$+++ ")[4] for line in first), "L0", "m0", None)
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_corpus_is_read_and_not_made(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus_module, "SAMPLE", write(tmp_path / "c"))
    corpus = read_corpus("sample")
    assert corpus.name == "sample"
    assert corpus.exchanges == read_corpus(tmp_path / "c").exchanges
    monkeypatch.setattr(corpus_module, "SAMPLE", tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        read_corpus("sample")


def test_the_real_excerpt(excerpt):
    corpus = read_corpus(excerpt)
    assert (corpus.lines, corpus.conversations) == (47_706, 17_624)
    assert len(corpus.exchanges) + corpus.silent == 30_082


@pytest.mark.parametrize(
    ("lines", "conversations", "words"),
    [
        (["L1 +++$+++ u0 +++$+++ m0"], CONVERSATIONS, ["movie_lines.txt, line 1", "5"]),
        ([*LINES, LINES[0]], CONVERSATIONS, ["movie_lines.txt, line 7", "L1"]),
        (LINES, ["u0 +++$+++ u1 +++$+++ m0 +++$+++ ['L1', 'L99']"], ["movie_conversations.txt, line 1", "L99"]),
        (LINES, ["u0 +++$+++ u1 +++$+++ m0 +++$+++ [__import__('os')]"], ["movie_conversations.txt, line 1"]),
        (LINES, ["u0 +++$+++ u1"], ["movie_conversations.txt, line 1"]),
        (LINES, ["u0 +++$+++ u1 +++$+++ m0 +++$+++ ['L1']"], ["no exchange"]),
        ([], CONVERSATIONS, ["L1"]),
        (["<!DOCTYPE html>"], CONVERSATIONS, ["web page"]),
        ([LINES[0] + "\0"], CONVERSATIONS, ["line 1", "NUL"]),
    ],
)
def test_a_malformed_corpus_names_file_and_line(tmp_path, lines, conversations, words):
    with pytest.raises(UserError) as raised:
        read_corpus(write(tmp_path / "c", lines, conversations))
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_wrong_encoding_is_named_and_utf_8_is_none(tmp_path):
    lines = [line for line in LINES if "\xef" not in line and "L4" not in line]
    folders = {encoding: write(tmp_path / encoding, lines, CONVERSATIONS[:1], encoding) for encoding in ENCODINGS}
    assert read_corpus(folders["utf-8"]).exchanges == read_corpus(folders["iso-8859-1"]).exchanges
    assert read_corpus(folders["utf-8-sig"]).exchanges == read_corpus(folders["iso-8859-1"]).exchanges
    with pytest.raises(UserError, match="UTF-16"):
        read_corpus(folders["utf-16"])
    (tmp_path / "own.tsv").write_bytes("Caf\xe9?\tJa.".encode("iso-8859-1"))
    with pytest.raises(UserError, match=r"own\.tsv, line 1: is not UTF-8 .*iconv"):
        read_corpus(tmp_path / "own.tsv")


@pytest.mark.parametrize(
    "line",
    ["{}", '{"id": 1, "text": 2}', '{"query": "a"}', "3", "null", '"a"', "[[]]", "{", '"' + "[" * 50, "\xff"],
)
def test_a_malformed_jsonl_line_is_named(tmp_path, line):
    path = tmp_path / "utterances.jsonl"
    path.write_bytes(line.encode("iso-8859-1"))
    with pytest.raises(UserError, match="line 1"):
        read_corpus(path)


def utterances(path, *rows):
    """A jsonl file of (id, text, reply-to), the rest left out."""
    path.write_text("\n".join(json.dumps({"id": i, "text": text, "reply-to": to}) for i, text, to in rows))
    return path


def read_in_short(path):
    return [(exchange.before, exchange.query, exchange.response) for exchange in read_corpus(path).exchanges]


def test_the_reply_chain_decides_order_and_context_never_numbers_in_ids(tmp_path):
    chain = [(f"4325-{i}", f"text {i}", f"4325-{i - 1}" if i else None) for i in range(13)]
    told = read_in_short(utterances(tmp_path / "a.jsonl", *reversed(chain)))
    texts = [text for _, text, _ in chain]
    assert told == list(zip([None, *texts], texts, texts[1:], strict=False))


def test_of_a_tree_each_branch_has_its_own_context(tmp_path):
    rows = [(1, "Post.", None), (2, "One.", 1), (3, "Two.", 1), (4, "To one.", 2), (5, "To two.", 3)]
    assert sorted(read_in_short(utterances(tmp_path / "a.jsonl", *rows)), key=str) == [
        ("Post.", "One.", "To one."), ("Post.", "Two.", "To two."), (None, "Post.", "One."), (None, "Post.", "Two."),
    ]  # fmt: skip


def test_lines_that_answer_themselves_nothing_or_each_other(tmp_path):
    rows = [("a", "First.", "a"), ("b", "Second.", "a"), ("x", "Lost.", "gone"), ("y", "Found.", "x")]
    path = utterances(tmp_path / "a.jsonl", *rows, ("p", "Round.", "q"), ("q", "And round.", "p"))
    assert read_in_short(path) == [(None, "First.", "Second."), ("", "Lost.", "Found.")]
    assert read_corpus(path).lost == 3


def test_where_no_line_names_another_neighbours_answer_one_another(tmp_path):
    rows = [{"id": i, "text": f"text {i}", "conversation_id": talk} for i, talk in enumerate("aabba")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_in_short(tmp_path / "a.jsonl") == [
        (None, "text 0", "text 1"), ("text 0", "text 1", "text 4"), (None, "text 2", "text 3"),
    ]  # fmt: skip


def test_a_line_without_text_stays_in_the_chain(tmp_path):
    lines = [f"L{i} +++$+++ u0 +++$+++ m0 +++$+++ A +++$+++ {text}" for i, text in enumerate(["a", "b", "", "d", "e"])]
    told = read_in_short(
        write(tmp_path / "c", lines, ["u0 +++$+++ u1 +++$+++ m0 +++$+++ ['L0', 'L1', 'L2', 'L3', 'L4']"])
    )
    assert told == [(None, "a", "b"), ("", "d", "e")]


def test_a_line_of_two_conversations_has_its_own_context_in_each(tmp_path):
    talks = [f"u0 +++$+++ u1 +++$+++ m0 +++$+++ {ids}" for ids in (["L1", "L3"], ["L2", "L3", "L1"])]
    told = read_in_short(write(tmp_path / "c", LINES, talks))
    assert told == [(None, "Hello.", "No."), (None, "Café?", "No."), ("Café?", "No.", "Hello.")]


TURNS = [{"role": "system", "content": "s"}] + [
    {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "qrst", strict=True)
]
OWN = [
    ("a.tsv", "q\tr\ns\tt", [(None, "q", "r"), (None, "s", "t")]),
    ("a.tsv", "q\tr\tone\ns\tt\tone", [(None, "q", "r"), ("r", "s", "t")]),
    ("a.tsv", "q\tr\tone\nr\ts\tone", [(None, "q", "r"), ("q", "r", "s")]),
    ("a.tsv", '"Hi," he said\t"so ""so"""', [(None, '"Hi," he said', 'so "so"')]),
    ("a.TSV", "Response\tid\tQuery\nr\t1\tq", [(None, "q", "r")]),
    ("a.csv", 'question,answer\r\n"q, q","r ""r"""\r\n', [(None, "q, q", 'r "r"')]),
    ("a.csv", "q;r", [(None, "q", "r")]),
    ("a.csv", '"q\nq",r', [(None, "q\nq", "r")]),
    ("a.txt", "\ufeffq\nr\ns\n\n\nt\nu\n===\nv\nw", [
        (None, "q", "r"), ("q", "r", "s"), (None, "t", "u"), (None, "v", "w")]),
    ("a.txt", "q\tr", [(None, "q", "r")]),
    ("a.jsonl", '{"query": "q", "response": "r"}', [(None, "q", "r")]),
    ("a.jsonl", '{"prompt": "s", "answer": "t"}', [(None, "s", "t")]),
    ("a.ndjson", json.dumps(TURNS), [(None, "q", "r"), ("r", "s", "t")]),
    ("a.jsonl", json.dumps({"messages": TURNS}), [(None, "q", "r"), ("r", "s", "t")]),
    ("a.JSONL", json.dumps(["q", "r", "s"]), [(None, "q", "r"), ("q", "r", "s")]),
]  # fmt: skip


@pytest.mark.parametrize("way", ["plain", "gz", "folder", "zip"])
@pytest.mark.parametrize(("name", "text", "exchanges"), OWN)
def test_own_dialogue_is_read_as_people_have_it(tmp_path, name, text, exchanges, way):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.txt").write_text("not dialogue")
    path = folder / name
    path.write_bytes(text.encode())
    if way == "gz":
        path = folder / f"{name}.gz"
        path.write_bytes(gzip.compress(text.encode()))
    told = {"folder": folder, "zip": tmp_path / "mine.zip"}.get(way, path)
    if way == "zip":
        as_zip(folder, told, "some/where/")
    assert read_in_short(told) == exchanges


def test_a_folder_of_several_files_is_all_of_them(tmp_path):
    for name, text in (("b.tsv", "q\tr"), ("a.txt", "s\nt"), ("c.csv", "u,v")):
        (tmp_path / name).write_text(text)
    assert [query for _, query, _ in read_in_short(tmp_path)] == ["s", "q", "u"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.md", "x", [".tsv with lines of", ".csv with lines of", ".txt with a line", '{"query"', "movie_lines.txt"]),
        ("a.tsv", "q\tr\nq", ["a.tsv, line 2", "1 fields"]),
        ("a.tsv", "q\tr\tc\td", ["a.tsv, line 1", "4 fields"]),
        ("a.csv", 'q,r\n"q,r', ["a.csv, line 2", "quotes"]),
        ("a.txt", "alone", ["no exchange"]),
        ("movie_lines.txt", LINES[0], ["movie_conversations.txt", "both"]),
    ],
)
def test_what_cannot_be_read_says_where_and_what_is_known(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as raised:
        read_corpus(tmp_path / name)
    assert all(word in str(raised.value) for word in words), raised.value


def test_the_profile_follows_from_the_corpus(tmp_path, corpus_folder):
    assert read_corpus("sample").profile == "sample"
    assert read_corpus(utterances(tmp_path / "a.jsonl", ("a", "x", None), ("b", "y", "a"))).profile == "own"


CASES = ROOT.parent / "shared" / "cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
@pytest.mark.parametrize(
    ("name", "exchanges", "silent", "lost"),
    [
        ("faq30.jsonl", 30, 0, 0), ("own400.jsonl", 400, 0, 0), ("long_answers.jsonl", 100, 0, 0),
        ("self_reply.jsonl", 1, 0, 0), ("missing_parent.jsonl", 1, 0, 1), ("tree.jsonl", 4, 0, 0),
        ("numbered_ids.jsonl", 12, 0, 0), ("gap", 3, 3, 0), ("russian.jsonl", 48, 0, 0), ("german.jsonl", 16, 0, 0),
        ("cornell_russian_utf8", 20, 0, 0), ("one_movie", 400, 0, 0), ("one_conversation.jsonl", 59, 0, 0),
        ("no_reply_to.jsonl", 1, 0, 0), ("bom.jsonl", 1, 0, 0), ("qa.csv", 1, 0, 0), ("qa.tsv", 2, 0, 0),
        ("chat.txt", 4, 0, 0), ("entities", 1, 0, 0),
    ],
)  # fmt: skip
def test_the_shared_cases_have_their_right_values(name, exchanges, silent, lost):
    corpus = read_corpus(CASES / name)
    assert (len(corpus.exchanges), corpus.silent, corpus.lost) == (exchanges, silent, lost)


def test_zips_that_are_none_cut_short_or_empty(tmp_path):
    path = as_zip(write(tmp_path / "c"), tmp_path / "c.zip")
    whole = path.read_bytes()
    for content, word in [(whole[: len(whole) // 2], "zip"), (b"<html>", "web page"), (b"", "zip")]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=word):
            read_corpus(path)
    damaged = bytearray(whole)
    damaged[120] ^= 0xFF  # inside the first member's data
    path.write_bytes(damaged)
    with pytest.raises(UserError):
        read_corpus(path)


def test_a_zip_without_the_files_or_with_two_corpora(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"movie_lines\.txt"):
        read_corpus(tmp_path / "other.zip")
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "a")
    write(tmp_path / "two" / "b")
    with pytest.raises(UserError, match="several"):
        read_corpus(tmp_path / "two")


@pytest.mark.parametrize("name", ["movie_lines.txt", "movie_conversations.txt", "utterances.jsonl"])
def test_a_folder_of_a_corpus_file_s_name_is_none_of_the_corpus(tmp_path, name):
    folder = write(tmp_path / "c")
    expected = read_corpus(folder)
    (folder / "extra" / name).mkdir(parents=True)
    assert read_corpus(folder) == expected


def test_a_member_that_claims_to_be_huge_is_refused(tmp_path, monkeypatch):
    path = as_zip(write(tmp_path / "c"), tmp_path / "c.zip")
    monkeypatch.setattr(corpus_module, "LARGEST_FILE", 100)
    with pytest.raises(UserError, match="refused"):
        read_corpus(path)


def test_a_missing_path_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="cornell"):
        read_corpus(tmp_path / "nowhere.zip")


@pytest.fixture
def server():
    """A file server on the loopback; `content` is what it sends, `asked` how often it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        content, asked = b"", 0

        def do_GET(self):
            Handler.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(Handler.content)))
            self.end_headers()
            self.wfile.write(Handler.content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        Handler.url = f"http://127.0.0.1:{httpd.server_port}/corpus.zip"
        yield Handler
        httpd.shutdown()


def test_a_download_is_kept(server, tmp_path):
    server.content = bytes(range(256)) * 1000
    digest = hashlib.sha256(server.content).hexdigest()
    path = tmp_path / "data" / "corpus.zip"
    for _ in range(2):
        assert download(server.url, path, digest).read_bytes() == server.content
    assert server.asked == 1


def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path):
    server.content = b"<html>log in</html>"
    with pytest.raises(UserError, match="does not match") as error:
        download(server.url, tmp_path / "corpus.zip", "0" * 64)
    assert "put it at" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_kept_file_that_changed_is_not_used(server, tmp_path):
    path = tmp_path / "corpus.zip"
    path.write_bytes(b"changed")
    with pytest.raises(UserError, match=r"put it at .*corpus\.zip"):
        download("http://127.0.0.1:1/corpus.zip", path, "0" * 64)
    server.content = b"the true one"
    assert download(server.url, path, hashlib.sha256(server.content).hexdigest()).read_bytes() == server.content


def test_without_network_it_says_where_to_put_the_file(tmp_path):
    with pytest.raises(UserError, match=r"put it at .*corpus\.zip"):
        download("http://127.0.0.1:1/corpus.zip", tmp_path / "corpus.zip", "0" * 64)


def test_lines_are_numbered_from_one():
    assert [n for n, _ in corpus_module._lines(io.BytesIO(b"a\nb"), "movie_lines.txt", hashlib.sha256())] == [1, 2]


def test_every_file_that_the_page_on_own_dialogue_shows_is_read(tmp_path):
    whole = (ROOT / "docs" / "own_dialogue.md").read_text(encoding="utf-8")
    page = whole.partition("## What a file looks like")[2].partition("## What becomes of it")[0]
    texts = re.findall(r"\n```\n(.*?)\n```", page, re.DOTALL)
    kinds = ["shop.tsv", "shop.csv", "talk.txt", "shop.jsonl", "utterances.jsonl"]
    assert all(f"`{name}`" in page for name in kinds)
    assert f"{SMALL:,} exchanges" in whole
    for name, text in zip(kinds, texts, strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert len(read_corpus(tmp_path / name).exchanges) >= 2, name
