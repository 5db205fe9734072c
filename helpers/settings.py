"""Every setting of a run, typed and frozen, in one flat record that travels inside the checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import reprlib
from collections.abc import Iterator
from pathlib import Path

PROFILES = Path(__file__).resolve().parent.parent / "notebooks" / "profiles"


class UserError(Exception):
    """Something that the reader can put right: the message says what, where and what to do next."""

    def __str__(self) -> str:
        """One line, whatever a hostile file put into it: at most 1,000 characters, nothing that steers a terminal."""
        line = " ".join(super().__str__().split())[:1000]
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


@contextlib.contextmanager
def refusing(what: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds as a UserError: what cannot be done, the first line of the reason, what to do."""
    try:
        yield
    except kinds as error:
        reason = str(error).strip()
        if not reason or isinstance(error, LookupError):  # a KeyError's text is the key alone
            reason = repr(error)
        reason = reason.splitlines()[0][:200]
        raise UserError(f"{what} ({reason}). {remedy}") from None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run. Values come from a profile (`notebooks/profiles/*.yaml`) and `key=value` changes."""

    seed: int = 1
    # data
    max_query_words: int = 20
    max_response_words: int = 20
    long_queries: str = "drop"  # drop the pair, or cut the query to its last max_query_words
    rare_words: str = "unknown"  # a pair with a word below min_count: keep it with UNK, or drop it
    min_count: int = 2
    context_words: int = 0  # of the line before the query, put before it with EOS between; 0 means the query alone
    openers: bool = False  # train also on each conversation's first line, as the response to silence
    held_out_share: float = 0.1  # of the exchanges, for validation and again for test
    # model
    embedding_size: int = 128
    hidden_size: int = 128
    layers: int = 2
    dropout: float = 0.1
    word_dropout: float = 0.0  # share of words, in queries and decoder inputs, that training replaces by UNK
    query_dropout: float = 0.0  # share of queries that training replaces by silence; decoder mmi needs some
    attention: str = "general"  # dot, general or concat
    input_feeding: bool = False
    tie_weights: bool = True
    # training
    updates: int = 2000
    batch_size: int = 64
    optimizer: str = "adam"  # adam, adamw or sgd
    learning_rate: float = 1e-3
    decoder_learning_ratio: float = 1.0
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0 means no clipping
    teacher_forcing_ratio: float = 1.0
    schedule: str = "constant"  # constant, or cosine down to 0 at the last update
    warmup_updates: int = 0
    validate_every: int = 200
    patience: int = 0  # validations without improvement before stopping; 0 means never stop early
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the device has units for it

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field.name, field.type, getattr(self, field.name)))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"Setting {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"Setting {name}={getattr(self, name)!r} must lie between {low} and {high}.")

    def change(self, **changes) -> Settings:
        """A copy with some settings changed. Raises UserError for a name that does not exist or a wrong type."""
        for name in changes:
            if name not in NAMES:
                near = difflib.get_close_matches(name, NAMES, n=1)
                hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(NAMES)}."
                raise UserError(f"There is no setting {name!r}.{hint}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """Plain values, as they are stored in checkpoints and manifests."""
        return dataclasses.asdict(self)


NAMES = [field.name for field in dataclasses.fields(Settings)]
# What decides the prepared data; the other settings can change without preparing it again.
DATA_SETTINGS = NAMES[: NAMES.index("embedding_size")]
CHOICES = {
    "long_queries": ("drop", "cut"),
    "rare_words": ("unknown", "drop"),
    "attention": ("dot", "general", "concat"),
    "optimizer": ("adam", "adamw", "sgd"),
    "schedule": ("constant", "cosine"),
    "precision": ("auto", "fp32", "bf16"),
}
RANGES = {
    "seed": (0, 2**31 - 1),
    "max_query_words": (1, 1000),
    "max_response_words": (1, 1000),
    "context_words": (0, 1000),
    "min_count": (1, math.inf),
    "held_out_share": (0.01, 0.4),
    "embedding_size": (1, 8192),
    "hidden_size": (1, 8192),
    "layers": (1, 16),
    "dropout": (0.0, 0.95),
    "word_dropout": (0.0, 0.95),
    "query_dropout": (0.0, 0.95),
    "updates": (0, math.inf),
    "batch_size": (1, math.inf),
    "learning_rate": (0.0, 10.0),
    "decoder_learning_ratio": (0.0, 100.0),
    "weight_decay": (0.0, 10.0),
    "clip": (0.0, math.inf),
    "teacher_forcing_ratio": (0.0, 1.0),
    "warmup_updates": (0, math.inf),
    "validate_every": (1, math.inf),
    "patience": (0, math.inf),
}


def load_profile(name: str) -> Settings:
    """The settings of `notebooks/profiles/NAME.yaml`, or of any YAML file. Raises UserError if they don't fit."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise UserError(f"There is no profile {name!r} ({path}). There are: {known}; or give a .yaml file's path.")
    with refusing(f"Profile {path} cannot be read", "Give a file that can be.", OSError):
        text = path.read_bytes()
    values = read_yaml(text, f"Profile {path}") or {}
    if not isinstance(values, dict):
        raise UserError(f"Profile {path} must hold lines of 'name: value'.")
    try:
        return Settings().change(**{str(name): value for name, value in values.items()})
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


def read_yaml(text: str | bytes, name: str):
    """The value of a YAML text. Raises UserError that begins with the name if it has none."""
    import yaml  # here, since a checkpoint's settings need none

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2020-99-99 is a ValueError
        raise UserError(f"{name} is not valid YAML: {error}") from None


def _typed(name: str, kind: str, value):
    """`value` as the type that the annotation names; an int is a float too, and nothing else is bent."""
    wanted = {"int": int, "float": float, "bool": bool, "str": str}[kind]
    if wanted is float and isinstance(value, str):  # YAML reads 1e-3, without a dot, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted or (wanted is float and not math.isfinite(value)):
        raise UserError(f"Setting {name}={reprlib.repr(value)} must be of type {kind}.")  # short, however deep it is
    return value
