import pytest

from helpers.settings import DATA_SETTINGS, PROFILES, Settings, UserError, load_profile, parse_changes


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_every_profile_loads(name):
    assert isinstance(load_profile(name), Settings)


def test_a_misspelt_setting_is_refused_and_the_right_name_suggested():
    with pytest.raises(UserError, match="learning_rate"):
        Settings().change(learnin_rate=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"updates": 1.5},
        {"updates": "many"},
        {"updates": True},
        {"dropout": "high"},
        {"dropout": float("nan")},
        {"input_feeding": 1},
        {"attention": "cosine"},
        {"dropout": 1.5},
        {"batch_size": 0},
        {"learning_rate": -1.0},
    ],
)
def test_ill_typed_and_impossible_values_are_refused_by_name(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        Settings().change(**changes)


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
    with pytest.raises(AttributeError):
        settings.seed = 2


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
    with pytest.raises(UserError, match="Setting seed is not valid YAML"):
        parse_changes([f"seed={value}"])
