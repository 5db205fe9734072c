import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

import helpers.__main__
import tools.sweeps
from helpers.__main__ import main
from helpers.settings import load_profile, parse_changes
from helpers.training import Checkpoint

SMALL = ["--set", "updates=4", "validate_every=2", "hidden_size=16", "embedding_size=16", "held_out_share=0.15"]


def run(*arguments, **options):
    command = [sys.executable, "-m", "helpers", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def trained_by_command(corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = run("train", "--corpus", corpus_folder, "--run", folder, "--profile", "sample", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "best validation loss" in done.stdout
    assert " exchanges read from " in done.stdout
    assert (folder / "manifest.json").is_file()
    return folder


@pytest.mark.parametrize(
    ("arguments", "profile"),
    [
        (["train", "--run", "r"], ""),  # which the corpus decides
        (["sweep", "--run", "r", "f.yaml"], "sweep"),
        (["sweep-worker", "--run", "r", "id"], "sweep"),
    ],
)
def test_each_command_has_the_profile_of_its_own(arguments, profile):
    parser = helpers.__main__._parser() if arguments[0] == "train" else tools.sweeps.parser()
    options = parser.parse_args(arguments)
    assert (options.profile, options.corpus, options.set) == (profile, "sample", [])
    assert parser.parse_args([*arguments, "--profile", "classic"]).profile == "classic"


def test_training_is_with_the_profiles_settings_and_the_changes(trained_by_command):
    changes = parse_changes(SMALL[1:])
    expected = load_profile("sample").change(**changes).to_dict()
    assert Checkpoint.load(trained_by_command / "checkpoint.pt").settings == expected
    assert json.loads((trained_by_command / "manifest.json").read_text())["settings"] == expected


def test_training_into_a_used_folder_needs_resume(trained_by_command, corpus_folder):
    done = run("train", "--corpus", corpus_folder, "--run", trained_by_command, *SMALL)
    assert done.returncode == 1
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    before = (trained_by_command / "checkpoint.pt").read_bytes()
    done = run("train", "--corpus", corpus_folder, "--run", trained_by_command, *SMALL, "--resume")
    assert done.returncode == 0, done.stderr
    assert (trained_by_command / "checkpoint.pt").read_bytes() == before


def test_a_folder_of_another_training_stays_as_it_is_until_it_is_begun_anew(
    trained_by_command, corpus_folder, tmp_path, capsys
):
    folder = shutil.copytree(trained_by_command, tmp_path / "run")
    contents = lambda: {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}  # noqa: E731
    before = contents()

    def train(*more):
        status = main(
            ["train", "--profile", "sample", "--corpus", str(corpus_folder), "--run", str(folder), *SMALL, *more]
        )
        return status, capsys.readouterr().err

    status, error = train()
    assert (status, len(error.splitlines())) == (1, 1)
    assert "--resume" in error
    assert "--fresh" in error
    for changed, named in (("learning_rate=0.01", "learning_rate 0.005, not 0.01"), ("seed=2", "seed 1, not 2"),
                           ("min_count=1", "min_count 2, not 1")):  # fmt: skip
        status, error = train(changed, "--resume")
        assert status == 1
        assert f"checkpoint.pt was trained with other settings: {named}. " in error, error
        assert (folder / "checkpoint.pt").read_bytes() == before["checkpoint.pt"]
        assert contents() == before, "not even its data is another's"
    for number, changed in ((1, "seed=2"), (2, "seed=3")):
        status, error = train(changed, "--fresh")
        assert status == 0, error
        assert f"the former checkpoint is kept as {folder}/checkpoint.{number}.pt" in error
    assert (folder / "checkpoint.1.pt").read_bytes() == before["checkpoint.pt"]
    seeds = [Checkpoint.load(folder / f"checkpoint{kept}.pt").settings["seed"] for kept in (".1", ".2", "")]
    assert seeds == [1, 2, 3]


def test_to_go_on_and_to_begin_anew_exclude_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--run", str(tmp_path), "--resume", "--fresh"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["--fresh", "--resume"])
def test_an_empty_folder_can_be_trained_into_either_way(corpus_folder, tmp_path, way, capsys):
    assert main(["train", "--corpus", str(corpus_folder), "--run", str(tmp_path / "run"), *SMALL, way]) == 0
    assert "best validation loss" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == ["checkpoint.pt", "data.pt"]


def test_score_prints_one_line_of_json(trained_by_command, tmp_path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("hello .\tgood morning zebra !\nwho are you ?\tyes .\n")
    done = run("score", "--run", trained_by_command, pairs)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"pairs", "tokens", "nll_per_token", "perplexity", "nll_per_response", "unknown_rate"}
    assert (result["pairs"], result["tokens"]) == (2, 8)


def test_chat_answers_every_line_of_a_pipe(trained_by_command):
    lines = ["Hello.", "", "🙂", "zebra", "x" * 20_000]
    done = run("chat", "--run", trained_by_command, input="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(lines)
    assert done.stderr == ""


def test_bytes_that_are_no_text_do_not_stop_the_chat(trained_by_command):
    command = [sys.executable, "-m", "helpers", "chat", "--run", str(trained_by_command)]
    done = subprocess.run(command, input=b"\xff\xfe\n\x00\nhello\n", capture_output=True, check=False)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 3), done.stderr


def test_a_reader_that_goes_away_ends_the_chat_quietly(trained_by_command):
    command = f"yes hello | {shlex.quote(sys.executable)} -m helpers chat --run {trained_by_command} | head -2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--run", "RUN", "--corpus", "nowhere.zip"], ["nowhere.zip"]),
        (["train", "--run", "RUN", "--set", "learnin_rate=1"], ["learning_rate"]),
        (["train", "--run", "RUN", "--set", "updates=many"], ["updates", "int"]),
        (["train", "--run", "RUN", "--profile", "nonesuch"], ["nonesuch", "sample"]),
        (["train", "--run", "RUN", "--device", "tpu"], ["tpu"]),
        (["train", "--run", "RUN", "--wandb", "sometimes"], ["sometimes"]),
        (["chat", "--run", "RUN"], ["checkpoint.pt", "03_training"]),
        (["score", "--run", "RUN", "none.tsv"], ["none.tsv"]),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, words, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert main([str(folder) if a == "RUN" else a for a in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words), error
    assert not (folder / "checkpoint.pt").exists()


def test_a_pairs_file_with_a_wrong_line_names_it(trained_by_command, tmp_path, capsys):
    pairs = tmp_path / "pairs.tsv"
    for text, word in [("one field\n", "line 1"), ("", "no pair"), ("hello\tyes\n«»\tno\n", "Pair 2")]:
        pairs.write_text(text)
        assert main(["score", "--run", str(trained_by_command), str(pairs)]) == 1
        assert word in capsys.readouterr().err


def test_a_corpus_without_a_profile_gets_its_own_and_training_goes_on_from_there(tmp_path, capsys):
    (tmp_path / "own.tsv").write_text("".join(f"where is number {i}\tIn Room {i}.\n" for i in range(20)))
    train = ["train", "--corpus", str(tmp_path / "own.tsv"), "--run"]
    changes = ["hidden_size=16", "validate_every=2"]
    assert main([*train, str(tmp_path / "a"), "--set", "updates=2", *changes]) == 0
    assert "20 exchanges read from own; dropped: none; kept: all to train on, none held out; " in (
        told := capsys.readouterr().out
    )
    assert "profile own" in told
    assert main([*train, str(tmp_path / "a"), "--resume", "--set", "updates=4"]) == 0
    assert Checkpoint.load(tmp_path / "a" / "checkpoint.pt").progress["update"] == 4
    more = "what is this\tA new line.\n" * 20
    (tmp_path / "own.tsv").write_text(more)
    assert main([*train, str(tmp_path / "b"), "--start-from", str(tmp_path / "a"), "--set", "updates=2"]) == 0
    assert Checkpoint.load(tmp_path / "b" / "checkpoint.pt").settings["hidden_size"] == 16
    assert main([*train, str(tmp_path / "b"), "--resume", "--set", "updates=4"]) == 0
    words = Checkpoint.load(tmp_path / "b" / "checkpoint.pt").words()
    assert {"number", "line"} <= set(words.words)
    assert main([*train, str(tmp_path / "c"), "--start-from", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--seed", "9" * 30], ["--replies", "0"], ["--min-words", "-1"], ["--seed", "x"]])
def test_a_number_that_is_none_is_refused_in_a_sentence(trained_by_command, capsys, option):
    assert main(["chat", "--run", str(trained_by_command), *option]) == 1
    assert "is not a number from" in capsys.readouterr().err


def test_several_replies_stand_in_one_line_and_are_as_long_as_asked(trained_by_command):
    done = run("chat", "--run", trained_by_command, "--replies", "3", "--min-words", "2", "--raw", input="Hello.\n")
    assert done.returncode == 0, done.stderr
    replies = done.stdout.rstrip("\n").split("\t")
    assert 1 < len(replies) <= 3
    assert len(set(replies)) == len(replies)
    assert all(len(reply.split()) >= 2 for reply in replies)


def test_threads_that_wait_leave_the_processor_to_others():
    program = "import os, helpers; print(os.environ['OMP_WAIT_POLICY'], 'torch' in __import__('sys').modules)"
    own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    told = [subprocess.run([sys.executable, "-c", program], env=own | more, capture_output=True, text=True, check=True)
            for more in ({}, {"OMP_WAIT_POLICY": "ACTIVE"})]  # fmt: skip
    assert [done.stdout.split() for done in told] == [["PASSIVE", "False"], ["ACTIVE", "False"]]


def test_help_is_printed_in_any_encoding():
    done = subprocess.run([sys.executable, "-m", "helpers", "--help"], capture_output=True, check=False,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.returncode == 0, done.stderr
