"""Any edition of the corpus to one list of exchanges: the embedded one, a zip, a folder, or ConvoKit's jsonl.

Whatever cannot be read is a UserError that names the file, the line and what was expected there.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from helpers.run import ROOT, display_path, no_garbage_collection
from helpers.settings import UserError, user_errors

DATA, SAMPLE = ROOT / "data", ROOT / "corpora" / "sample"
URL = "https://www.cs.cornell.edu/~cristian/data/cornell_movie_dialogs_corpus.zip"
SHA256 = "3bde8a571f615201bc2d2453e22878090719638592f774720eddec739de8c900"
LINES, CONVERSATIONS, UTTERANCES = "movie_lines.txt", "movie_conversations.txt", "utterances.jsonl"
LARGEST_FILE = 1 << 30  # bytes; a zip member that claims or turns out to be larger is refused
LONGEST_LINE = 1 << 24  # bytes
SEPARATOR = " +++$+++ "

_ID_LIST = re.compile(r"\['[^',\s]+'(?:, '[^',\s]+')*\]")
_NUMBER = re.compile(r"\d+")
_HIGH_BYTES = re.compile(rb"[\x80-\xff]+")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: JSON can escape it, but it is no character
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, RuntimeError, ValueError)
_REPLACEMENT = b"\xef\xbf\xbd"  # U+FFFD, which stands in the published files where a conversion once failed


class Exchange(NamedTuple):
    """A line of dialogue and the line that answers it, as published."""

    query: str
    response: str
    conversation: str  # id of the conversation's first line
    movie: str  # the conversation's id where the source names no movie


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All exchanges of a source, in the order of their line numbers, and what was passed over."""

    name: str
    exchanges: list[Exchange]
    lines: int
    conversations: int
    silent: int  # exchanges left out because one of their lines has no text at all
    digest: str  # SHA-256 of the files that were read


@no_garbage_collection()
def read_corpus(source: str | Path) -> Corpus:
    """Read `sample`, `cornell`, or the path of a zip, a folder or an `utterances.jsonl`.
    `cornell` downloads the official zip into `data/` once. Raises UserError for whatever cannot be read."""
    if source == "sample":
        return _read_path(SAMPLE, "sample")
    if source == "cornell":
        return _read_path(download(URL, DATA / URL.rsplit("/", 1)[1], SHA256), "cornell")
    path = Path(os.path.expanduser(source))
    if not (os.path.isfile(path) or os.path.isdir(path)):
        kinds = f"a zip, a folder with {LINES} and {CONVERSATIONS}, or ConvoKit's {UTTERANCES}"
        raise UserError(f"There is no corpus at {path}. Give 'sample', 'cornell', or the path of {kinds}.")
    return _read_path(path, path.stem)


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


def _open(path: Path) -> BinaryIO:
    with user_errors(f"{path} cannot be read", "Give a file that can be.", OSError):
        return open(path, "rb")


def _read_path(path: Path, name: str) -> Corpus:
    """Find the corpus files in a folder, a zip or a jsonl file, and read them where they are."""
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            found = [(file.name, functools.partial(_open, file)) for file in path.rglob("*") if file.is_file()]
        elif path.suffix == ".jsonl":
            found = [(UTTERANCES, functools.partial(_open, path))]
        else:
            found = _members(path, stack)
        found = [pair for pair in found if pair[0] in (LINES, CONVERSATIONS, UTTERANCES)]
        names = sorted(file for file, _ in found)
        if len(set(names)) != len(names):
            raise UserError(f"{path} holds several corpora: more than one file is called {names[0]}.")
        hashed = hashlib.sha256()
        try:
            files = {file: stack.enter_context(opener()) for file, opener in sorted(found)}
            if LINES in files and CONVERSATIONS in files:
                texts, conversations = _read_cornell(files, hashed)
            elif UTTERANCES in files:
                texts, conversations = _read_convokit(files[UTTERANCES], hashed)
            else:
                wanted = f"{LINES} and {CONVERSATIONS}, or {UTTERANCES}"
                raise UserError(f"{path} does not hold {wanted}; it holds {', '.join(names) or 'none of them'}.")
        except _DAMAGE as error:
            raise UserError(f"{path} is damaged ({error}). Fetch it again.") from None
    return _exchanges(name, texts, conversations, hashed.hexdigest())


def _members(path: Path, stack: contextlib.ExitStack) -> list[tuple[str, Callable[[], BinaryIO]]]:
    """The files in a zip: names without folders, and what opens them until the stack is closed."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except _DAMAGE as error:
        why = f"{error}; a failed download is often a web page"
        raise UserError(f"{path} is not a zip file that can be read ({why}). Fetch it again.") from None
    members = [member for member in archive.infolist() if not member.filename.startswith("__MACOSX")]  # Cornell's zip
    for member in members:
        if member.file_size > max(LONGEST_LINE, 100 * member.compress_size):  # text shrinks to a tenth or so
            raise UserError(f"{path}: {member.filename} claims {member.file_size:,} bytes, a bomb's sign; refused.")
    return [(Path(member.filename).name, functools.partial(archive.open, member)) for member in members]


class _Conversation(NamedTuple):
    movie: str
    first: str  # line id
    pairs: list[tuple[str, str]]  # line ids of what is said and what is answered


def _read_cornell(files: dict[str, BinaryIO], hashed) -> tuple[dict[str, str], list[_Conversation]]:
    """Texts by line id, and the conversations."""
    texts: dict[str, str] = {}
    for number, line in _lines(files[LINES], LINES, hashed):
        fields = line.split(SEPARATOR, 4)
        if len(fields) != 5 and line.endswith(SEPARATOR.rstrip()):  # no text, and an editor cut the last blank
            fields = (line + " ").split(SEPARATOR, 4)
        if len(fields) != 5:
            wanted = f"line id, speaker id, movie id, name and text, parted by '{SEPARATOR}'. Mend or remove the line."
            raise UserError(f"{LINES}, line {number}: {len(fields)} fields instead of 5: {wanted}")
        if fields[0] in texts:
            raise UserError(f"{LINES}, line {number}: the line id {fields[0]} stands there a second time.")
        texts[fields[0]] = fields[4]
    conversations = []
    for number, line in _lines(files[CONVERSATIONS], CONVERSATIONS, hashed):
        where, fields = f"{CONVERSATIONS}, line {number}", line.split(SEPARATOR)
        if len(fields) != 4 or not _ID_LIST.fullmatch(fields[3].strip()):
            wanted = f"two speaker ids, a movie id and a list like ['L1', 'L2'], parted by '{SEPARATOR}'"
            raise UserError(f"{where}: expected {wanted}. Mend or remove the line.")
        ids = fields[3].strip()[2:-2].split("', '")
        if not all(map(texts.__contains__, ids)):
            missing = [line_id for line_id in ids if line_id not in texts]
            raise UserError(f"{where}: line id {missing[0]} is not in {LINES}; are they of one corpus?")
        conversations.append(_Conversation(fields[2], ids[0], list(pairwise(ids))))
    return texts, conversations


def _read_convokit(file: BinaryIO, hashed) -> tuple[dict[str, str], list[_Conversation]]:
    """The same from ConvoKit's utterances: `reply-to` names the line that is answered."""
    texts: dict[str, str] = {}
    conversations: dict[str, _Conversation] = {}
    answers: dict[str, tuple[int, str]] = {}
    for number, line in _lines(file, UTTERANCES, hashed):
        expected = "Expected is a JSON object with id, conversation_id, text and reply-to."
        kinds = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
        with user_errors(f"{UTTERANCES}, line {number} cannot be read", expected, *kinds):
            utterance = json.loads(line)
            conversation = utterance.get("conversation_id") or utterance["root"]
            movie = (utterance.get("meta") or {}).get("movie_id") or conversation
            reply_to = utterance.get("reply-to", utterance.get("reply_to")) or ""
            values = (utterance["id"], utterance["text"] or "", conversation, movie, reply_to)
            line_id, text, conversation, movie, reply_to = (_SURROGATE.sub(" ", value) for value in values)
        if line_id in texts:
            raise UserError(f"{UTTERANCES}, line {number}: the id {line_id} stands there a second time.")
        texts[line_id] = text
        pairs = conversations.setdefault(conversation, _Conversation(movie, conversation, [])).pairs
        if reply_to:
            pairs.append((reply_to, line_id))
            answers[line_id] = number, reply_to
    for line_id, (number, reply_to) in answers.items():
        if reply_to not in texts:
            raise UserError(f"{UTTERANCES}, line {number}: {line_id} answers {reply_to}, which is not there.")
    return texts, list(conversations.values())


def _exchanges(name: str, texts: dict[str, str], conversations: list[_Conversation], digest: str) -> Corpus:
    """Neighbouring lines paired, in the order of their numbers, whichever edition they come from."""
    exchanges, silent = [], 0
    for movie, first, pairs in sorted(conversations, key=lambda conversation: _order(conversation.first)):
        for before, after in sorted(pairs, key=lambda pair: _order(pair[1])) if len(pairs) > 1 else pairs:
            query, response = texts[before].strip(), texts[after].strip()
            if query and response:
                exchanges.append(Exchange(query, response, first, movie))
            else:
                silent += 1
    if not exchanges:
        raise UserError(f"The corpus {name} holds no exchange: no conversation has two lines with text.")
    return Corpus(name, exchanges, len(texts), len(conversations), silent, digest)


def _order(line_id: str) -> tuple[int, str]:
    number = _NUMBER.search(line_id)
    return (int(number[0]) if number and len(number[0]) < 19 else -1, line_id)


def _lines(file: BinaryIO, name: str, hashed) -> Iterator[tuple[int, str]]:
    """Numbered lines of a file in ISO-8859-1 (the Cornell files) or UTF-8 (jsonl), hashed on the way."""
    reader, size = io.BufferedReader(file), 0
    for number, line in enumerate(iter(functools.partial(reader.readline, LONGEST_LINE + 1), b""), 1):
        hashed.update(line)
        size += len(line)
        if number == 1 and line.lstrip()[:1] == b"<":
            raise UserError(f"{name} looks like a web page, not like a file of the corpus. Fetch it again.")
        if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
            raise UserError(f"{name}, line 1: starts with a byte-order mark; the file is not in its own encoding.")
        if size > LARGEST_FILE or len(line) > LONGEST_LINE:
            most = f"the file is larger than {LARGEST_FILE:,} bytes, or the line longer than {LONGEST_LINE:,}"
            raise UserError(f"{name}, line {number}: {most}; refused.")
        if b"\0" in line:
            raise UserError(f"{name}, line {number}: holds a NUL byte; the file is damaged or in another encoding.")
        if text := (line.decode("ascii") if line.isascii() else _decoded(line, name, number)).rstrip("\r\n"):
            yield number, text


def _decoded(line: bytes, name: str, number: int) -> str:
    """A line that is not plain ASCII, in its file's own encoding."""
    if name == UTTERANCES:
        with user_errors(f"{name}, line {number}: is not UTF-8", "Fetch the file again.", UnicodeDecodeError):
            return line.decode("utf-8")
    line = line.replace(_REPLACEMENT, b" ")
    with contextlib.suppress(UnicodeDecodeError):
        if b" ".join(_HIGH_BYTES.findall(line)).decode("utf-8"):
            back = f"iconv -f utf-8 -t iso-8859-1//TRANSLIT {name}"
            raise UserError(f"{name}, line {number}: is UTF-8, but Cornell's files are ISO-8859-1. Convert it: {back}")
    return line.decode("iso-8859-1")
