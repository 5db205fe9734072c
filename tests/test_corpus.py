import hashlib
import http.server
import io
import json
import shutil
import threading
import zipfile

import pytest

from helpers import corpus as corpus_module
from helpers.corpus import download, read_corpus
from helpers.run import ROOT
from helpers.settings import UserError

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
    assert corpus.exchanges[0] == (*(line.split(" +++$+++ ")[4] for line in first), "L0", "m0")
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_wrong_encoding_is_named(tmp_path, encoding):
    lines = [line for line in LINES if "\xef" not in line and "L4" not in line]
    with pytest.raises(UserError, match=r"UTF-8|byte-order"):
        read_corpus(write(tmp_path / "c", lines, CONVERSATIONS[:1], encoding))


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"id": 1, "text": "a", "conversation_id": "c"}', "{", '"' + "[" * 50, "\xff"]
)
def test_a_malformed_convokit_line_is_named(tmp_path, line):
    path = tmp_path / "utterances.jsonl"
    path.write_bytes(line.encode("iso-8859-1"))
    with pytest.raises(UserError, match="line 1"):
        read_corpus(path)


def test_an_answer_to_a_line_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "utterances.jsonl"
    path.write_text(json.dumps({"id": "L2", "text": "a", "conversation_id": "L1", "reply-to": "L1"}))
    with pytest.raises(UserError, match="L1"):
        read_corpus(path)


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
