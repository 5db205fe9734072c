import math
import re

import pytest
from pydantic import ValidationError

from helpers.settings import (
    DATA_SETTINGS,
    NAMES,
    PROFILES,
    Settings,
    UserError,
    load_profile,
    parse_changes,
    user_errors,
)

# The least and the greatest value of each number, as the readers are promised; None: no bound but the type's.
BOUNDS = {
    "seed": (0, 2**31 - 1), "max_query_words": (1, 1000), "max_response_words": (1, 1000), "min_count": (1, 10**9),
    "context_words": (0, 1000), "held_out_share": (0.0, 0.4), "embedding_size": (1, 8192), "hidden_size": (1, 8192),
    "layers": (1, 16), "dropout": (0.0, 0.95), "word_dropout": (0.0, 0.95), "query_dropout": (0.0, 0.95),
    "strange_queries": (0.0, 0.95), "decline_below": (0.0, 1.0),
    "updates": (1, 10**9), "batch_size": (1, 10**9), "learning_rate": (0.0, 10.0),
    "decoder_learning_ratio": (0.0, 100.0), "weight_decay": (0.0, 10.0), "clip": (0.0, None),
    "teacher_forcing_ratio": (0.0, 1.0), "warmup_updates": (0, 10**9), "validate_every": (1, 10**9),
    "patience": (0, 10**9), "average": (0.0, 0.9999),
}  # fmt: skip
WORDS = {
    "long_queries": ("drop", "cut"), "rare_words": ("unknown", "drop"), "attention": ("dot", "general", "concat"),
    "optimizer": ("adam", "adamw", "sgd"), "schedule": ("constant", "cosine"),
    "precision": ("auto", "fp32", "tf32", "bf16"),
}  # fmt: skip
SWITCHES = ("cuda_graphs", "openers", "input_feeding", "tie_weights")
INTS = [name for name, (low, _) in BOUNDS.items() if type(low) is int]
FLOATS = [name for name in BOUNDS if name not in INTS]


def made(way, **changes):
    """Settings with changes, by the constructor or by `change`: both must check alike."""
    return Settings(**changes) if way == "constructor" else Settings().change(**changes)


def refused(way, **changes):
    """The sentence with which they are refused; it names the setting."""
    with pytest.raises(UserError) as raised:
        made(way, **changes)
    told, name = str(raised.value), next(iter(changes))
    assert told.startswith((f"Setting {name}=", f"There is no setting {name!r}."))
    assert told.endswith((".", "?"))
    assert len(told.splitlines()) == 1
    assert len(told) < 500 or "There are:" in told
    return told


both_ways = pytest.mark.parametrize("way", ["constructor", "change"])


def test_the_tables_above_have_every_setting():
    assert sorted([*BOUNDS, *WORDS, *SWITCHES, "marks"]) == sorted(NAMES)


@both_ways
@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_is_taken_up_to_its_bounds_and_refused_beyond(way, name):
    for bound, direction, sign in zip(BOUNDS[name], ("less", "greater"), (-1, 1), strict=True):
        if bound is None:
            continue
        assert getattr(made(way, **{name: bound}), name) == bound
        beyond = bound + sign * (1 if name in INTS else 1e-6)
        assert re.search(r"it must be (less|greater) than (or equal to )?[\d.]+\.$", refused(way, **{name: beyond}))
        assert direction not in refused(way, **{name: beyond}).partition("it must")[2]


@both_ways
@pytest.mark.parametrize("name", INTS)
def test_a_whole_number_is_nothing_else_and_not_huge(way, name):
    for value in (True, 2.0, "2", None, [2], 10**30, -(10**30), math.nan):
        refused(way, **{name: value})


@both_ways
@pytest.mark.parametrize("name", FLOATS)
def test_a_number_is_nothing_else_and_finite(way, name):
    for value in (True, "high", "", None, [0.2], math.nan, math.inf, -math.inf, "nan", "inf", -(10**30)):
        refused(way, **{name: value})


@both_ways
@pytest.mark.parametrize("name", FLOATS)
def test_a_huge_whole_number_is_refused_as_a_number_too(way, name):
    refused(way, **{name: 10**400})
    if BOUNDS[name][1] is not None:
        refused(way, **{name: 10**30})


@both_ways
@pytest.mark.parametrize("name", FLOATS)
def test_a_whole_number_and_the_text_that_yaml_makes_of_one_are_numbers(way, name):
    for value, expected in (("1e-1", 0.1), ("2e-1", 0.2)):
        taken = getattr(made(way, **{name: value}), name)
        assert (taken, type(taken)) == (expected, float)
    if BOUNDS[name][1] is None or BOUNDS[name][1] >= 1:
        taken = getattr(made(way, **{name: 1}), name)
        assert (taken, type(taken)) == (1.0, float)


@both_ways
def test_marks_are_no_letters_digits_blanks_or_apostrophes(way):
    for marks in ("", ".!?", "。؟।,;-]^"):
        assert made(way, marks=marks).marks == marks
    for marks in ("a", "é", "7", "'", " ", "\n", "\u0301", "<", "&", "." * 65, None, 1, ["."]):
        refused(way, marks=marks)


@both_ways
@pytest.mark.parametrize("name", WORDS)
def test_a_word_is_one_of_a_few(way, name):
    for word in WORDS[name]:
        assert getattr(made(way, **{name: word}), name) == word
    for other in ("cosines", "", WORDS[name][0].upper(), None, 1, True, [WORDS[name][0]]):
        told = refused(way, **{name: other})
        assert all(repr(word) in told for word in WORDS[name])


@both_ways
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_true_or_false_and_nothing_like_it(way, name):
    for value in (True, False):
        assert getattr(made(way, **{name: value}), name) is value
    for other in (1, 0, "true", "yes", None, 1.0):
        refused(way, **{name: other})


@both_ways
def test_an_unknown_name_is_refused_with_a_suggestion_or_all_names(way):
    assert "Did you mean learning_rate?" in refused(way, learnin_rate=0.1)
    assert "Did you mean hidden_size?" in refused(way, hiden_size=1)
    assert all(name in refused(way, zebra=1) for name in NAMES)


@pytest.mark.parametrize("value", ["x" * 100_000, ["deep"] * 100_000, {"a": {"b": {"c": {}}}}])
def test_a_refusal_is_short_however_large_the_value(value):
    refused("constructor", seed=value)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_every_profile_loads(name):
    assert isinstance(load_profile(name), Settings)


def test_changes_are_parsed_from_words():
    changes = parse_changes("updates=100 learning_rate=1e-3 attention=dot input_feeding=true")
    settings = Settings().change(**changes)
    assert (settings.updates, settings.learning_rate, settings.attention, settings.input_feeding) == (
        100,
        1e-3,
        "dot",
        True,
    )
    with pytest.raises(UserError, match="name=value"):
        parse_changes("updates")


def test_settings_are_frozen_and_survive_a_round_trip():
    settings = load_profile("sample")
    assert Settings(**settings.to_dict()) == settings
    with pytest.raises(ValidationError):
        settings.seed = 2
    assert settings.change(seed=7).seed == 7
    assert (settings.seed, settings) == (1, load_profile("sample"))
    assert settings.change(seed=7) != settings


def test_plain_values_are_what_a_checkpoint_holds():
    values = Settings().to_dict()
    assert list(values) == NAMES
    assert {type(value) for value in values.values()} == {int, float, str, bool}


def test_a_setting_given_as_another_spelling_of_the_same_number_is_the_same():
    assert Settings(clip=1) == Settings(clip="1.0") == Settings(clip=1.0)
    assert Settings(clip=1).to_dict() == Settings(clip=1.0).to_dict()
    assert type(Settings(clip=1).to_dict()["clip"]) is float


def test_other_errors_become_one_sentence_with_what_to_do():
    with pytest.raises(UserError, match=r"^It cannot be done \(reason\)\. Do that\.$"), \
            user_errors("It cannot be done", "Do that.", ValueError):  # fmt: skip
        raise ValueError("reason\nmore")
    with pytest.raises(UserError, match=r"\(KeyError\('name'\)\)"), user_errors("No", "Do that.", KeyError):
        raise KeyError("name")
    with pytest.raises(OSError, match="other"), user_errors("No", "Do that.", ValueError):
        raise OSError("other")


def test_a_profile_with_a_wrong_key_or_no_mapping_names_the_file(tmp_path):
    for text in ("updatez: 3\n", "- 1\n", "a: [\n"):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=r"mine\.yaml"):
            load_profile(str(path))
    with pytest.raises(UserError, match="sample"):
        load_profile("nonesuch")


def test_data_settings_are_those_before_the_model():
    assert "min_count" in DATA_SETTINGS
    assert "seed" in DATA_SETTINGS
    assert "hidden_size" not in DATA_SETTINGS


@pytest.mark.parametrize(
    "text",
    ["seed: 2020-99-99", "[" * 5000, "seed: " + "1" * 5000, "seed: !!python/object/apply:os.system [ls]", "\0", "\xff",
     "seed: [&a0 [1]" + "".join(f", &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)) + "]"],
)  # fmt: skip
def test_a_hostile_profile_is_refused_in_a_sentence(tmp_path, text):
    path = tmp_path / "profile.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"profile\.yaml"):
        load_profile(str(path))


@pytest.mark.parametrize("value", ["[", "2020-99-99", "[" * 5000, "!!python/name:os.system"])
def test_a_change_that_is_no_yaml_is_refused_in_a_sentence(value):
    with pytest.raises(UserError, match="Setting seed cannot be read as YAML"):
        parse_changes([f"seed={value}"])
