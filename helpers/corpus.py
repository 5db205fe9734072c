"""Any source of dialogue to one list of exchanges: the embedded corpus, Cornell's files, ConvoKit's, or your own.

Whatever cannot be read is a UserError that names the file, the line and what was expected there.
"""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from helpers.run import ROOT, display_path
from helpers.settings import UserError, user_errors

DATA, SAMPLE = ROOT / "data", ROOT / "corpora" / "sample"
URL = "https://www.cs.cornell.edu/~cristian/data/cornell_movie_dialogs_corpus.zip"
SHA256 = "3bde8a571f615201bc2d2453e22878090719638592f774720eddec739de8c900"
LINES, CONVERSATIONS, UTTERANCES = "movie_lines.txt", "movie_conversations.txt", "utterances.jsonl"
SMALL = 2_000  # exchanges, below which a corpus is learnt by heart
LARGEST_FILE = 1 << 30  # bytes; a zip member that claims or turns out to be larger is refused
LONGEST_LINE = 1 << 24  # bytes
SEPARATOR = " +++$+++ "
COLUMNS = {  # by the names that the first line of a table or a JSON object may give them
    "query": ("query", "question", "input", "prompt"), "response": ("response", "answer", "output", "reply"),
    "conversation": ("conversation", "conversation_id", "dialogue"),
}  # fmt: skip
KINDS = f"""Known are, also gzipped (.gz), in a folder or in a zip:
.tsv with lines of query, tab, response; .csv with lines of "query","response"; either may have a third column,
conversation, and a first line with the names; .txt with a line each utterance, and a blank line between conversations;
.jsonl with lines such as {{"query": "Hi.", "response": "Hello."}}, or [{{"role": "user", "content": "Hi."}}, …], or
ConvoKit's; Cornell's {LINES} and {CONVERSATIONS} together."""

_ID_LIST = re.compile(r"\['[^',\s]+'(?:, '[^',\s]+')*\]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: JSON can escape it, but it is no character
_RULE = re.compile(r"\s*([=*#_-]\s*){3,}")  # a line such as ===
_QUOTED = re.compile(r'^\s*"(.*)"\s*$')
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, RuntimeError, ValueError)


class Exchange(NamedTuple):
    """A line of dialogue and the line that answers it, as published."""

    query: str
    response: str
    conversation: str
    movie: str  # the conversation's id where the source names no movie
    before: str | None = None  # the line that the query answers: "" if it has no text, None if there is none


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All exchanges of a source, conversation by conversation, and what was passed over."""

    name: str
    source: str  # what `read_corpus` was given
    exchanges: list[Exchange]
    lines: int
    conversations: int
    silent: int  # exchanges left out because one of their lines has no text at all
    lost: int  # lines left out because they answer one that is not there
    digest: str  # SHA-256 of the files that were read

    @property
    def profile(self) -> str:
        """The profile that is meant for it, if none is named."""
        return "sample" if self.source == "sample" else "own" if len(self.exchanges) < SMALL else "cornell"


class Line(NamedTuple):
    """A line of dialogue in any source."""

    text: str
    conversation: str
    movie: str
    answers: str  # id of the line that it answers; "" for a first line
    asks: bool = False  # it only asks, as a user does: not to be learnt as a response


Numbered = Iterable[tuple[int, str]]


def read_corpus(source: str | Path) -> Corpus:
    """Read `sample`, `cornell`, or the path of a file, a folder or a zip of any of the KINDS.
    `cornell` downloads the official zip into `data/` once. Raises UserError for whatever cannot be read."""
    if source == "sample":
        path, name = SAMPLE, source
    elif source == "cornell":
        path, name = download(URL, DATA / URL.rsplit("/", 1)[1], SHA256), source
    else:
        path = Path(os.path.expanduser(source))
        name, source = path.stem, str(path.absolute())
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"There is no corpus at {path}. Give 'sample', 'cornell', or a path. {KINDS}")
    hashed, lines = hashlib.sha256(), {}
    remedy = f"Fetch it again if it is damaged, cut short or a web page, or give another. {KINDS}"
    with contextlib.ExitStack() as stack, user_errors(f"{path} cannot be read", remedy, *_DAMAGE):
        files, opened = _files(path, stack)
        chosen = _chosen(path, files)
        contents = [_lines(stack.enter_context(opened(file)), Path(file).name, hashed) for file in chosen]
        if [_name(file) for file in chosen] == [LINES, CONVERSATIONS]:
            lines = _read_cornell(*contents)
        else:
            for file, content in zip(chosen, contents, strict=True):
                _read_own(lines, file, READERS[Path(_name(file)).suffix](file, content))
    return _exchanges(name, source, lines, hashed.hexdigest())


def download(url: str, path: Path, sha256: str) -> Path:
    """Fetch a file once, with a progress bar; it takes its place only when its SHA-256 is right.
    Raises UserError if there is no network, or if the server sends something else."""
    import pooch  # here, since only a download needs it

    pooch.get_logger().setLevel("WARNING")
    by_hand = f"Fetch it by other means and put it at {display_path(path)}, or give a local file as the corpus."
    with user_errors(f"{url} could not be downloaded", by_hand, OSError, ValueError):  # requests' errors are OSErrors
        patient = pooch.HTTPDownloader(progressbar=True, timeout=60)
        pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent, downloader=patient)
    return path


def _files(path: Path, stack: contextlib.ExitStack) -> tuple[list[str], Callable[[str], BinaryIO]]:
    """The names of the files in a folder or a zip, or of the one at the path; and what opens a file of that name."""
    if path.is_dir():
        files = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
        return files, lambda file: open(path / file, "rb")
    if Path(_name(path.name)).suffix in READERS:
        return [path.name], lambda _: open(path, "rb")
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = {member.filename: member for member in archive.infolist() if not member.is_dir()}
    for member in members.values():
        if member.file_size > max(LONGEST_LINE, 100 * member.compress_size):  # text shrinks to a tenth or so
            raise UserError(f"{path}: {member.filename} claims {member.file_size:,} bytes, a bomb's sign; refused.")
    return list(members), archive.open


def _name(file: str) -> str:
    return Path(file).name.lower().removesuffix(".gz")


def _chosen(path: Path, files: list[str]) -> list[str]:
    """Which of the files make up the corpus: Cornell's two, ConvoKit's one, or all that are of a known kind."""
    known = [file for file in files if Path(_name(file)).suffix in READERS and not _name(file).startswith("readme")]
    known = [file for file in known if not file.startswith("__MACOSX")]  # Cornell's zip has a second copy there
    if not known:
        raise UserError(f"{path} holds no file of a known kind, but {', '.join(files[:5]) or 'no file'}. {KINDS}")
    named = {name: [file for file in known if _name(file) == name] for name in (LINES, CONVERSATIONS, UTTERANCES)}
    if several := [name for name, found in named.items() if len(found) > 1]:
        raise UserError(f"{path} holds several corpora: more than one file is called {several[0]}.")
    cornell = named[LINES] + named[CONVERSATIONS]
    if len(cornell) == 1:
        raise UserError(f"{path} holds {cornell[0]}, but not the other of {LINES} and {CONVERSATIONS}: give both.")
    return cornell or named[UTTERANCES] or known


def _lines(file: BinaryIO, name: str, hashed) -> Iterator[tuple[int, str]]:
    """Numbered lines of a file, gzipped or not, but for blank ones; hashed on the way. They are in UTF-8, or as Cornell
    published its files, in ISO-8859-1."""
    reader = io.BufferedReader(gzip.GzipFile(fileobj=file) if name.lower().endswith(".gz") else file)
    number = size = 0
    while line := reader.readline(LONGEST_LINE + 1):
        hashed.update(line)
        number, size = number + 1, size + len(line)
        where = f"{name}, line {number}"
        if number == 1 and line.lstrip()[:5].lower().startswith((b"<!doc", b"<html", b"<?xml")):
            raise UserError(f"{name} looks like a web page, not like a file of dialogue. Fetch it again.")
        if size > LARGEST_FILE or len(line) > LONGEST_LINE:
            raise UserError(f"{where}: a line over {LONGEST_LINE:,} bytes, or a file over {LARGEST_FILE:,}; refused.")
        if b"\0" in line:
            raise UserError(f"{where}: holds a NUL byte; the file is damaged, or in UTF-16. Save it as UTF-8.")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # UTF-8's byte-order mark
        line = line.replace(b"\xef\xbf\xbd", b" ")  # U+FFFD, which stands where a conversion once failed
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            if _name(name) not in (LINES, CONVERSATIONS):
                remedy = f"Save it as UTF-8, for example: iconv -f iso-8859-1 -t utf-8 {name}"
                raise UserError(f"{where}: is not UTF-8 ({error}). {remedy}") from None
            text = line.decode("iso-8859-1")
        if text and not text.isspace():
            yield number, text.strip("\r\n")


def _read_cornell(spoken: Numbered, listed: Numbered) -> dict[str, Line]:
    """Cornell's two files: the texts, and the conversations as lists of their ids."""
    texts, lines = {}, {}
    for number, line in spoken:
        fields = (line + " ").split(SEPARATOR, 4)  # where there is no text, an editor may have cut the last blank
        if len(fields) != 5 or fields[0] in texts:
            wanted = f"5 fields parted by '{SEPARATOR}', a new line id, speaker id, movie id, name and text"
            raise UserError(f"{LINES}, line {number}: expected {wanted}, not {line:.80}. Correct or remove the line.")
        texts[fields[0]] = fields[4]
    for number, line in listed:
        where, fields = f"{CONVERSATIONS}, line {number}", line.split(SEPARATOR)
        if len(fields) != 4 or not _ID_LIST.fullmatch(fields[3].strip()):
            wanted = f"two speaker ids, a movie id and a list like ['L1', 'L2'], parted by '{SEPARATOR}'"
            raise UserError(f"{where}: expected {wanted}. Correct or remove the line.")
        ids, before = fields[3].strip()[2:-2].split("', '"), ""
        for line_id in ids:
            if line_id not in texts:
                raise UserError(f"{where}: line id {line_id} is not in {LINES}; are they of one corpus?")
            key = f"{line_id} {number}" if line_id in lines else line_id  # a line of two conversations
            lines[key] = Line(texts[line_id], ids[0], fields[2], before)
            before = key
    return lines


def _read_own(lines: dict[str, Line], name: str, values: Iterable[tuple[int, str | dict | list]]) -> None:
    """Add a file's values, or their JSON: objects of query and response, lists of turns, or ConvoKit's utterances,
    whose `reply-to` names the line that is answered (where no line has one, neighbours answer one another)."""
    last, replies, linked = {}, {}, False  # ids of each conversation's last line, and of what each line answers

    def add(line_id: str, talk: str, text: str | None, movie: str = "", asks: bool = False) -> None:
        if line_id in lines:
            raise ValueError(f"the id {line_id} stands there or in another file a second time")
        if not isinstance(text, str | None):
            raise TypeError(f"{text!r:.40} is no text")
        lines[line_id] = Line(text or "", talk, movie or talk, last.get(talk, ""), asks)
        last[talk] = line_id

    expected = "Expected is an object with query and response, a list of turns, or ConvoKit's with id and text."
    kinds = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
    for number, value in values:
        place = f"{name} {number:09}"
        with user_errors(f"{name}, line {number} cannot be read", expected, *kinds):
            value = json.loads(value) if isinstance(value, str) else value
            turns = value if isinstance(value, list) else value.get("messages")
            if turns is not None:
                for turn, said in enumerate(turns):
                    role, text = (said["role"], said["content"]) if isinstance(said, dict) else ("", said)
                    if role != "system":
                        add(f"{place}.{turn:06}", place, text, asks=role == "user")
            elif "id" in value and "text" in value:
                line_id, talk = str(value["id"]), str(value.get("conversation_id") or value.get("root") or "")
                add(line_id, talk, value["text"], str((value.get("meta") or {}).get("movie_id") or ""))
                answered = value.get("reply-to", value.get("reply_to"))
                replies[line_id] = "" if answered is None else str(answered)
                linked = linked or "reply-to" in value or "reply_to" in value
            else:
                row = {column: value[key] for column, keys in COLUMNS.items() for key in reversed(keys) if key in value}
                query, response = row["query"], row["response"]
                talk = str(row.get("conversation") or "").strip() or place
                if talk not in last or lines[last[talk]].text != query:  # the query can be the response before
                    add(f"{place} a", talk, query, asks=True)
                add(f"{place} b", talk, response)
    for line_id, answered in replies.items() if linked else ():
        lines[line_id] = lines[line_id]._replace(answers=answered)


def _rows(name: str, numbered: Numbered) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table, whose columns are in this order or as a first line of names says.
    Within a .csv's quotes a line can end; of a .tsv's quotes all stay but those around a whole field."""
    numbered, columns = list(numbered), [*COLUMNS]
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if csv_file := Path(_name(name)).suffix == ".csv":
        style = {"delimiter": max(",;\t", key=numbered[0][1].count) if numbered else ",", "skipinitialspace": True}
    rows = csv.reader((line + "\n" for _, line in numbered), strict=True, **style)
    try:
        for row_number, fields in enumerate(rows):
            if not csv_file:
                fields = [_QUOTED.sub(lambda quoted: quoted[1].replace('""', '"'), field.strip()) for field in fields]
            if row_number == 0:
                named = [next((c for c in COLUMNS if field.strip().lower() in COLUMNS[c]), "") for field in fields]
                if {"query", "response"} <= set(named):
                    columns = [*named, "conversation"]
                    continue
            row = dict(zip(columns, fields, strict=False))
            if len(fields) > len(columns) or not {"query", "response"} <= row.keys():
                raise csv.Error(f"{len(fields)} fields instead of query and response, or these and conversation")
            yield numbered[rows.line_num - 1][0], row
    except csv.Error as error:
        where = f"{name}, line {numbered[rows.line_num - 1][0]}"
        raise UserError(f"{where}: {error}. Correct the line; close or double the quotes there or before.") from None


def _talks(name: str, numbered: Numbered) -> Iterable[tuple[int, list[str] | dict[str, str]]]:
    """The conversations of a text: a line each utterance, between them a blank one or ===. With tabs it is a table."""
    numbered = list(numbered)
    if numbered and "\t" in numbered[0][1].strip():
        return _rows(name, numbered)
    talks, first, before = {}, -1, -1
    for number, line in numbered:
        if not _RULE.fullmatch(line):
            first = first if number == before + 1 else number  # blank lines do not come here
            talks.setdefault(first, []).append(line)
            before = number
    return talks.items()


READERS = {".tsv": _rows, ".csv": _rows, ".txt": _talks} | dict.fromkeys((".jsonl", ".ndjson"), lambda _, rows: rows)


def _exchanges(name: str, source: str, lines: dict[str, Line], digest: str) -> Corpus:
    """Each line with the one that it answers: conversation by conversation, each from its first line on."""
    said = {line_id: _SURROGATE.sub(" ", line.text).strip() for line_id, line in lines.items()}
    asked, replies = {}, {}  # what a line answers: "" if it is a first line, None if that is not there; the reverse
    for line_id in sorted(lines, reverse=True):
        answers = lines[line_id].answers
        asked[line_id] = "" if answers in ("", line_id) else answers if answers in lines else None
        replies.setdefault(asked[line_id] or "", []).append(line_id)
    exchanges, silent, talks, waiting = [], 0, {}, replies.pop("", [])
    while waiting:
        line_id = waiting.pop()
        waiting += replies.get(line_id, ())
        line, query = lines[line_id], asked[line_id]
        talk = talks[line_id] = line.conversation or talks.get(query, line_id)
        if not query or line.asks:
            continue
        if said[query] and said[line_id]:
            before = None if asked[query] == "" else said.get(asked[query], "")
            exchanges.append(Exchange(said[query], said[line_id], talk, line.movie or talk, before))
        else:
            silent += 1
    if not exchanges:
        raise UserError(f"The corpus {name} holds no exchange: no line with text answers another line with text.")
    lost = list(asked.values()).count(None) + len(lines) - len(talks)  # the latter answer one another in a circle
    return Corpus(name, source, exchanges, len(lines), len(set(talks.values())), silent, lost, digest)
