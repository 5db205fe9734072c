"""Any edition of the corpus to one list of exchanges: zip, folder, ConvoKit's jsonl, or the embedded sample.

Whatever cannot be read is a UserError that names the file, the line and what was expected there.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from helpers import sample
from helpers.run import ROOT, no_collection, shown
from helpers.settings import UserError, refusing

DATA = ROOT / "data"
URL = "https://www.cs.cornell.edu/~cristian/data/cornell_movie_dialogs_corpus.zip"
SHA256 = "3bde8a571f615201bc2d2453e22878090719638592f774720eddec739de8c900"
LINES, CONVERSATIONS, UTTERANCES = "movie_lines.txt", "movie_conversations.txt", "utterances.jsonl"
LARGEST_FILE = 1 << 30  # bytes; a zip member that claims or turns out to be larger is refused
LONGEST_LINE = 1 << 24  # bytes
BLOCK = 1 << 22  # bytes read at once

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


@no_collection()
def read_corpus(source: str | Path) -> Corpus:
    """Read `sample`, `cornell`, or the path of a zip, a folder or an `utterances.jsonl`.

    `cornell` downloads the official zip into `data/` once. Raises UserError for whatever cannot be read.
    """
    return _read_path(*locate(source))


def locate(source: str | Path) -> tuple[Path, str]:
    """Where a source's files lie, made or downloaded if they must be, and its name."""
    if source == "sample":
        return sample.write_corpus(DATA / "sample"), "sample"
    if source == "cornell":
        return download(URL, DATA / URL.rsplit("/", 1)[1], SHA256), "cornell"
    path = Path(os.path.expanduser(source))
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(
            f"There is no corpus at {path}. Give 'sample', 'cornell', or the path of a zip, a folder with {LINES} and "
            f"{CONVERSATIONS}, or ConvoKit's {UTTERANCES}."
        )
    return path, path.stem


def fingerprint(path: Path) -> str:
    """The SHA-256 of the corpus's file, or of all those in a folder that `read_corpus` would read."""
    return "".join(map(_sha256, _files_of(path) if path.is_dir() else [path]))


def download(url: str, path: Path, sha256: str) -> Path:
    """Fetch a file once, with a progress bar; it takes its place only when its SHA-256 is right.

    Raises UserError if there is no network, if the server sends something else, or if a kept file has changed.
    """
    if path.is_file():
        if _sha256(path) != sha256:
            raise UserError(f"{shown(path)} has the wrong SHA-256, not {sha256}. Delete it and run again.")
        return path
    import pooch  # here, since only a download needs it

    pooch.get_logger().setLevel("WARNING")
    by_hand = f"Fetch it by other means and put it at {shown(path)}, or give a local file as the corpus."
    with refusing(f"{url} could not be downloaded", by_hand, OSError, ValueError):  # requests' errors are OSErrors
        patient = pooch.HTTPDownloader(progressbar=True, timeout=60)
        pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent, downloader=patient)
    return path


def _sha256(path: Path) -> str:
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_path(path: Path, name: str) -> Corpus:
    """Find the corpus files in a folder, a zip or a jsonl file, and read them where they are."""
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            found = [(file.name, functools.partial(_open, file)) for file in _files_of(path)]
        elif path.suffix == ".jsonl":
            found = [(UTTERANCES, functools.partial(_open, path))]
        else:
            found = _members(path, stack)
        names = [file for file, _ in found]
        if len(set(names)) != len(names):
            raise UserError(f"{path} holds several corpora: more than one file is called {sorted(names)[0]}.")
        hashed = hashlib.sha256()
        try:
            files = {file: stack.enter_context(opened()) for file, opened in found}
            if LINES in files and CONVERSATIONS in files:
                texts, conversations = _read_cornell(files, hashed)
            elif UTTERANCES in files:
                texts, conversations = _read_convokit(_lines(files[UTTERANCES], UTTERANCES, hashed))
            else:
                wanted = f"{LINES} and {CONVERSATIONS}, or {UTTERANCES}"
                raise UserError(f"{path} does not hold {wanted}; it holds {', '.join(names) or 'none of them'}.")
        except _DAMAGE as error:
            raise UserError(f"{path} is damaged ({error}). Fetch it again.") from None
    return _exchanges(name, texts, conversations, hashed.hexdigest())


def _members(path: Path, stack: contextlib.ExitStack) -> list[tuple[str, Callable[[], BinaryIO]]]:
    """The corpus files in a zip: names, and what opens them until the stack is closed."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except _DAMAGE as error:
        with _open(path) as file:
            page = file.read(512).lstrip()[:1] == b"<"
        why = "it looks like a web page" if page else str(error)
        raise UserError(f"{path} is not a zip file that can be read ({why}). Fetch it again.") from None
    found = []
    for member in archive.infolist():
        name = Path(member.filename).name
        if name not in (LINES, CONVERSATIONS, UTTERANCES) or member.filename.startswith("__MACOSX"):
            continue  # the official zip carries such
        swollen = member.file_size > max(LONGEST_LINE, 100 * member.compress_size)  # text shrinks to 1/10
        if member.file_size > LARGEST_FILE or swollen:
            claim = f"{member.filename} claims {member.file_size:,} bytes"
            raise UserError(f"{path}: {claim}, a sign of damage or a bomb; refused. Fetch it again.")
        found.append((name, functools.partial(archive.open, member)))
    return found


def _files_of(folder: Path) -> list[Path]:
    wanted = (LINES, CONVERSATIONS, UTTERANCES)
    return [file for file in sorted(folder.rglob("*")) if file.name in wanted and file.is_file()]


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


class _Conversation(NamedTuple):
    movie: str
    first: str  # line id
    pairs: list[tuple[str, str]]  # line ids of what is said and what is answered


def _read_cornell(files: dict[str, BinaryIO], hashed) -> tuple[dict[str, str], list[_Conversation]]:
    """Texts by line id, and the conversations."""
    texts: dict[str, str] = {}
    for number, line in _lines(files[LINES], LINES, hashed):
        fields = line.split(sample.SEPARATOR, 4)
        if len(fields) != 5 and line.endswith(sample.SEPARATOR.rstrip()):  # no text, and an editor cut the last blank
            fields = (line + " ").split(sample.SEPARATOR, 4)
        if len(fields) != 5:
            raise UserError(
                f"{LINES}, line {number}: {len(fields)} fields instead of 5 (line id, speaker id, movie id, name, "
                f"text, parted by '{sample.SEPARATOR}'). Mend or remove the line."
            )
        if fields[0] in texts:
            raise UserError(f"{LINES}, line {number}: the line id {fields[0]} stands there a second time.")
        texts[fields[0]] = fields[4]
    conversations = []
    for number, line in _lines(files[CONVERSATIONS], CONVERSATIONS, hashed):
        fields = line.split(sample.SEPARATOR)
        if len(fields) != 4 or not _ID_LIST.fullmatch(fields[3].strip()):
            raise UserError(
                f"{CONVERSATIONS}, line {number}: expected two speaker ids, a movie id and a list like ['L1', 'L2'], "
                f"parted by '{sample.SEPARATOR}'. Mend or remove the line."
            )
        ids = fields[3].strip()[2:-2].split("', '")
        for line_id in ids:
            if line_id not in texts:
                raise UserError(
                    f"{CONVERSATIONS}, line {number}: line id {line_id} is not in {LINES}; are they of one corpus?"
                )
        conversations.append(_Conversation(fields[2], ids[0], list(pairwise(ids))))
    return texts, conversations


def _read_convokit(lines: Iterable[tuple[int, str]]) -> tuple[dict[str, str], list[_Conversation]]:
    """The same from ConvoKit's utterances: `reply-to` names the line that is answered."""
    texts: dict[str, str] = {}
    conversations: dict[str, _Conversation] = {}
    answers: list[tuple[int, str, str]] = []
    for number, line in lines:
        try:
            utterance = json.loads(line)
            line_id, text = utterance["id"], utterance["text"] or ""
            conversation = utterance.get("conversation_id") or utterance["root"]
            reply_to = utterance.get("reply-to", utterance.get("reply_to"))
            movie = (utterance.get("meta") or {}).get("movie_id") or conversation
            line_id, text, conversation, movie = (
                _SURROGATE.sub(" ", value) for value in (line_id, text, conversation, movie)
            )
            reply_to = _SURROGATE.sub(" ", reply_to) if reply_to else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{UTTERANCES}, line {number}: expected a JSON object with id, conversation_id, text and reply-to "
                f"({type(error).__name__}: {error})."
            ) from None
        if line_id in texts:
            raise UserError(f"{UTTERANCES}, line {number}: the id {line_id} stands there a second time.")
        texts[line_id] = text
        pairs = conversations.setdefault(conversation, _Conversation(movie, conversation, [])).pairs
        if reply_to:
            pairs.append((reply_to, line_id))
            answers.append((number, line_id, reply_to))
    for number, line_id, reply_to in answers:
        if reply_to not in texts:
            raise UserError(f"{UTTERANCES}, line {number}: {line_id} answers {reply_to}, which is not there.")
    return texts, list(conversations.values())


def _exchanges(name: str, texts: dict[str, str], conversations: list[_Conversation], digest: str) -> Corpus:
    """Neighbouring lines paired, in the order of their numbers, whichever edition they come from."""
    texts = {line_id: text.strip() for line_id, text in texts.items()}
    exchanges, silent = [], 0
    for movie, first, pairs in sorted(conversations, key=lambda conversation: _order(conversation.first)):
        for before, after in sorted(pairs, key=lambda pair: _order(pair[1])) if len(pairs) > 1 else pairs:
            query, response = texts[before], texts[after]
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
    """Numbered lines of a file in ISO-8859-1 (the Cornell files) or UTF-8 (jsonl), hashed on the way.

    A block of whole lines is read at a time, since a look at each line by itself costs as much as all the rest.
    """
    reader, number, size = io.BufferedReader(file), 0, 0
    while block := reader.read(BLOCK):
        block += reader.readline(LONGEST_LINE + 1)
        hashed.update(block)
        size += len(block)
        if size > LARGEST_FILE:
            raise UserError(f"{name} is larger than {LARGEST_FILE:,} bytes; refused.")
        if number == 0 and block.lstrip()[:1] == b"<":
            raise UserError(f"{name} looks like a web page, not like a file of the corpus. Fetch it again.")
        if number == 0 and block.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
            raise UserError(f"{name}, line 1: starts with a byte-order mark; the file is not in its own encoding.")
        lines = block.decode("iso-8859-1").removesuffix("\n").split("\n")
        plain = block.isascii() and b"\0" not in block and len(lines[-1]) < LONGEST_LINE
        for number, line in enumerate(lines, number + 1):  # noqa: B020, it goes on counting
            if text := (line if plain else _checked(line, name, number)).rstrip("\r"):
                yield number, text


def _checked(line: str, name: str, number: int) -> str:
    """A line of bytes that were read as ISO-8859-1, in its own encoding."""
    if len(line) >= LONGEST_LINE:
        raise UserError(f"{name}, line {number}: is longer than {LONGEST_LINE:,} bytes; refused.")
    if "\0" in line:
        raise UserError(f"{name}, line {number}: holds a NUL byte; the file is damaged or in another encoding.")
    if line.isascii():
        return line
    encoded = line.encode("iso-8859-1")
    if name == UTTERANCES:
        with refusing(f"{name}, line {number}: is not UTF-8", "Fetch the file again.", UnicodeDecodeError):
            return encoded.decode("utf-8")
    encoded = encoded.replace(_REPLACEMENT, b" ")
    with contextlib.suppress(UnicodeDecodeError):
        if b" ".join(_HIGH_BYTES.findall(encoded)).decode("utf-8"):
            raise UserError(
                f"{name}, line {number}: is UTF-8, but the Cornell files are ISO-8859-1. Convert it back: "
                f"iconv -f utf-8 -t iso-8859-1//TRANSLIT {name}"
            )
    return encoded.decode("iso-8859-1")
