"""Every setting of a run with its type and bounds beside it, in one frozen record that travels in the checkpoint."""

import contextlib
import difflib
import os
import reprlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

MARKS = ".!?。！？．؟۔।॥։።။។"  # what ends a sentence, in all scripts
PROFILES = Path(__file__).resolve().parent.parent / "notebooks" / "profiles"


class UserError(Exception):
    """Something that the reader can put right: the message says what, where and what to do next."""

    def __str__(self) -> str:
        """One line, whatever a hostile file put into it: at most 1,000 characters, nothing that steers a terminal."""
        line = " ".join(super().__str__().split())[:1000]
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: the sentence, and not the way to it."""
        return [f"{type(self).__name__}: {self}"]


@contextlib.contextmanager
def user_errors(what: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds as a UserError: what cannot be done, the first line of the reason, what to do."""
    try:
        yield
    except kinds as error:
        text = "" if isinstance(error, LookupError) else str(error).strip()  # a KeyError's text is the key alone
        reason = text or repr(error)
        raise UserError(f"{what} ({reason.splitlines()[0][:200]}). {remedy}") from None


def command_line(main: Callable[..., int | None]) -> Callable[..., int]:
    """A command, which then returns its exit status. What the user can put right ends in one sentence, no traceback."""

    def ended(*arguments) -> int:
        try:
            return main(*arguments) or 0
        except (UserError, KeyboardInterrupt) as error:
            stopped = isinstance(error, KeyboardInterrupt)
            print(f"\n{str(error) or 'stopped'}" if stopped else f"error: {error}", file=sys.stderr)
            return 130 if stopped else 1
        except BrokenPipeError:  # the reader of our output has gone: a normal end for a filter
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return ended


def number(value):
    """The value, a number if it is the text of one: YAML reads 1e-3, without a dot, as text."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Words = Annotated[int, Field(ge=1, le=1000)]
Size = Annotated[int, Field(ge=1, le=8192)]
Number = Annotated[float, BeforeValidator(number), Field(ge=0)]
DropShare = Annotated[Number, Field(le=0.95)]
Marks = Annotated[str, Field(max_length=64, pattern=r"^[^\p{L}\p{M}\p{N}\s'<>&]*$")]


class Settings(BaseModel):
    """The settings of a run. Values come from a profile (`notebooks/profiles/*.yaml`) and `name=value` changes. Raises
    UserError, in one sentence, for a name that does not exist, a wrong type or a value out of bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    # data
    max_query_words: Words = 20
    max_response_words: Words = 20
    long_queries: Literal["drop", "cut"] = "drop"  # drop the pair, or cut the query to its last max_query_words
    rare_words: Literal["unknown", "drop"] = "unknown"  # a pair with a word below min_count: keep it with UNK, or drop
    min_count: Positive = 2
    marks: Marks = MARKS  # which are words; all others are dropped
    context_words: Annotated[int, Field(ge=0, le=1000)] = 0  # of the line before the query, put before it with EOS
    openers: bool = False  # train also on each conversation's first line, as the response to silence
    held_out_share: Annotated[Number, Field(le=0.4)] = 0.1  # for validation, and again for test; 0: train on all
    # model
    embedding_size: Size = 128
    hidden_size: Size = 128
    layers: Annotated[int, Field(ge=1, le=16)] = 2
    dropout: DropShare = 0.1
    word_dropout: DropShare = 0.0  # of words, in queries and decoder inputs, that training replaces by UNK
    query_dropout: DropShare = 0.0  # of queries that training replaces by silence; decoder mmi needs some
    strange_queries: DropShare = 0.0  # of queries replaced by jumbled words, to learn when not to answer
    decline_below: Annotated[Number, Field(le=1)] = 0.0  # probability of a reply that the bot then keeps to itself
    attention: Literal["dot", "general", "concat"] = "general"
    input_feeding: bool = False
    tie_weights: bool = True
    # training
    updates: Positive = 2000
    batch_size: Positive = 64
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Annotated[Number, Field(le=10)] = 1e-3
    decoder_learning_ratio: Annotated[Number, Field(le=100)] = 1.0
    weight_decay: Annotated[Number, Field(le=10)] = 0.0
    clip: Number = 1.0  # largest gradient norm; 0 means no clipping
    teacher_forcing_ratio: Annotated[Number, Field(le=1)] = 1.0
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to 0 at the last update
    warmup_updates: Count = 0
    validate_every: Positive = 200
    average: Annotated[Number, Field(le=0.9999)] = 0.0  # decay of an average of the weights, which is kept instead
    patience: Count = 0  # validations without improvement before stopping; 0 means never stop early
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # auto: what a few updates show to be the fastest
    cuda_graphs: bool = True  # on a GPU: record the work of an update once for each shape, then replay it

    def __init__(self, **values) -> None:
        with valid("setting", NAMES):
            super().__init__(**values)

    def change(self, **changes) -> "Settings":
        """A copy with some settings changed, checked as all are."""
        return Settings(**self.to_dict() | changes)

    to_dict = BaseModel.model_dump  # plain values, as they are stored in checkpoints and manifests


NAMES = list(Settings.model_fields)
DATA_SETTINGS = NAMES[: NAMES.index("embedding_size")]  # a change of the others needs no other data


@contextlib.contextmanager
def valid(what: str, names: list[str]) -> Iterator[None]:
    """The first of pydantic's complaints as a UserError that names the thing, one of `names`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(names)}."
            raise UserError(f"There is no {what} {name!r}. {hint}") from None
        expected = first["msg"].replace("Input should", "it must")
        raise UserError(f"{what.capitalize()} {name}={reprlib.repr(first['input'])}: {expected}.") from None


def load_profile(name: str) -> Settings:
    """The settings of `notebooks/profiles/NAME.yaml`, or of any YAML file. Raises UserError if they don't fit."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise UserError(f"There is no profile {name!r} ({path}). There are: {known}; or give a .yaml file's path.")
    values = read_yaml(path, f"Profile {path}") or {}
    if not isinstance(values, dict):
        raise UserError(f"Profile {path} must hold lines of 'name: value'.")
    try:
        return Settings(**{str(name): value for name, value in values.items()})
    except UserError as error:
        raise UserError(f"Profile {path}: {error}") from None


def parse_changes(text: str | list[str]) -> dict:
    """`"updates=100 dropout=0"` (or the words of it) as `{"updates": 100, "dropout": 0}`."""
    changes = {}
    for word in text.split() if isinstance(text, str) else text:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"Setting {word!r} is not of the form name=value.")
        changes[name] = read_yaml(value, f"Setting {name}") if value else ""
    return changes


def read_yaml(source: Path | str, name: str):
    """The value of a YAML file or text. Raises UserError that begins with the name if it has none."""
    import yaml  # here, since a checkpoint's settings need none

    kinds = (OSError, yaml.YAMLError, ValueError, RecursionError)  # a date such as 2020-99-99 is a ValueError
    with user_errors(f"{name} cannot be read as YAML", "Correct it, or give another one.", *kinds):
        return yaml.safe_load(source.read_bytes() if isinstance(source, Path) else source)
