"""Both programs of the speedrun read the same files, are held to the same exchanges, and are run once each."""

import itertools
import json
import statistics
import zipfile

import pytest

from benchmarks import speedrun
from helpers.corpus import CONVERSATIONS, LINES, read_corpus
from helpers.model import new_model
from helpers.run import ROOT
from helpers.settings import UserError, load_profile
from tests.conftest import CPU

SMALL = {
    "embedding_size": 16, "hidden_size": 16, "updates": 8, "validate_every": 4, "precision": "fp32", "min_count": 1,
    "layers": 1, "max_query_words": 20, "max_response_words": 20,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Recipes of a moment: the second begins with the words' frequencies, the first does not."""
    monkeypatch.setattr(speedrun, "SHORT", 20)
    monkeypatch.setattr(
        speedrun, "RECIPES", {"first": SMALL, speedrun.FREQUENCIES: {}, speedrun.QUICK: {"learning_rate": 0.01}}
    )


@pytest.fixture
def parted(corpus_folder, tmp_path):
    return speedrun.part_in_two(corpus_folder, tmp_path), tmp_path


def test_the_changes_lead_to_the_profiles():
    for recipe, profile in ((speedrun.QUICK, "quick"), (list(speedrun.RECIPES)[-1], "cornell")):
        assert speedrun.settings_of(recipe, 1) == load_profile(profile).change(held_out_share=0)
    assert speedrun.FREQUENCIES in speedrun.RECIPES


def test_what_is_held_out_is_not_in_the_files_that_the_programs_read(corpus_folder, parted):
    held_out, folder = parted
    whole, kept = read_corpus(corpus_folder), read_corpus(folder)
    movies, left = ({exchange.movie for exchange in corpus.exchanges} for corpus in (whole, kept))
    assert left < movies
    gone = [exchange for exchange in whole.exchanges if exchange.movie not in left]
    assert len(kept.exchanges) + len(gone) == len(whole.exchanges)
    assert 0 < len(held_out) < len(gone)  # the rest is validation's, on which settings were chosen
    assert set(held_out) < {(exchange.query, exchange.response) for exchange in gone}


def test_a_zip_is_parted_as_its_folder_is(corpus_folder, parted, tmp_path_factory):
    file, folder = tmp_path_factory.mktemp("zip") / "corpus.zip", tmp_path_factory.mktemp("parted")
    with zipfile.ZipFile(file, "w") as archive:
        for name in (LINES, CONVERSATIONS):
            archive.write(corpus_folder / name, f"corpus/{name}")
    assert speedrun.part_in_two(file, folder) == parted[0]
    assert (folder / CONVERSATIONS).read_bytes() == (parted[1] / CONVERSATIONS).read_bytes()
    assert read_corpus(folder).exchanges  # nothing else is left there


def test_a_corpus_in_other_files_is_refused(tmp_path):
    (tmp_path / "mine.tsv").write_text("Hi.\tHello.\n" * 30)
    with pytest.raises(UserError, match="which the classic tutorial reads"):
        speedrun.part_in_two(tmp_path / "mine.tsv", tmp_path)


def test_only_exchanges_that_every_program_knows_are_scored(small, parted):
    held_out, folder = parted
    strange = [("Hello.", "Xyzzy."), ("Xyzzy?", "Hello."), ("Hello. " * 11, "Hello."), ("1984", "Hello.")]
    known = speedrun.known_to_all([*held_out, *strange], folder)
    assert known
    assert set(known) <= set(held_out)
    assert all(max(len(text.split()) for text in pair) <= speedrun.SHORT for pair in known)


def test_each_program_is_run_once_a_seed_and_what_is_there_is_kept(small, corpus_folder, tmp_path, monkeypatch):
    ran = []

    def here(recipe, number, folder, held_out, device):  # not in a process of its own, which would not see `small`
        ran.append((recipe, number))
        return speedrun.by_recipe(folder, held_out, recipe, number, device, speedrun.time.time())

    monkeypatch.setattr(speedrun, "curve", here)
    file, recipes = tmp_path / "speedrun.json", list(speedrun.RECIPES)
    speedrun.measure(corpus_folder, file, CPU, recipes, 1)
    found = speedrun.measure(corpus_folder, file, CPU, recipes, 2)
    assert ran == [(name, number) for number in (1, 2) for name in recipes]
    assert found == json.loads(file.read_text())
    for run in found["runs"]:
        assert [update for _, update, _ in run["curve"]] == [4, 8]
        seconds = [after for after, _, _ in run["curve"]]
        assert 0 < seconds[0] < seconds[1]
    first, frequencies = (run["curve"][0][2] for run in found["runs"][:2])
    assert frequencies < first - 1  # nats per response
    monkeypatch.setattr(speedrun, "RECIPES", speedrun.RECIPES | {"another": {}})
    with pytest.raises(UserError, match="other recipes"):
        speedrun.measure(corpus_folder, file, CPU, recipes, 1)


def test_the_textbook_is_held_to_the_same_exchanges(small, parted, monkeypatch):
    held_out, folder = parted
    monkeypatch.setattr(speedrun, "PATIENCE", -1)
    (point,) = speedrun.by_textbook(folder, speedrun.known_to_all(held_out, folder), 1, CPU, speedrun.time.time())
    assert point[1] == 25
    assert 0 < point[2] < 100


def test_a_program_is_stopped_when_it_finds_nothing_better():
    points = [(10.0, 1, 20.0), (20.0, 2, 18.0), (90.0, 3, 19.0)]
    assert not speedrun.exhausted(points, 20 + speedrun.PATIENCE)
    assert speedrun.exhausted(points, 21 + speedrun.PATIENCE)
    assert not speedrun.exhausted([], speedrun.LIMIT)
    assert speedrun.exhausted([(speedrun.LIMIT, 1, 1.0)], speedrun.LIMIT + 1)


def test_what_else_was_tried_is_another_training(small, parted):
    held_out, folder = parted
    recipes = [speedrun.QUICK, *speedrun.OTHERS]
    curves = [speedrun.by_recipe(folder, held_out, one, 1, CPU, speedrun.time.time()) for one in recipes]
    ends = [curve[-1][2] for curve in curves]
    assert len(set(ends)) == len(recipes)
    assert all(0 < end < 100 for end in ends)


def test_muon_moves_the_matrices_inside_and_adam_the_rest(prepared):
    model = new_model(prepared.settings, len(prepared.vocabulary))
    optimizer = speedrun.WithMuon(model, prepared.settings)
    by_muon = {id(one) for one in optimizer.muon.param_groups[0]["params"]}
    by_adam = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert by_muon | by_adam == {id(one) for one in model.parameters()}
    assert not by_muon & by_adam
    names = {name for name, one in model.named_parameters() if id(one) in by_muon}
    assert {"encoder.layers.0.along.weight_hh_l0", "decoder.combine.weight"} <= names
    assert not names & {"embedding.weight", "output.weight"}


def test_growing_batches_show_as_many_examples(prepared):
    updates, pairs = load_profile("quick").updates, prepared.splits["train"]
    sizes = [len(rows) for rows in itertools.islice(speedrun.GrowingBatches(pairs, 8, 1).from_update(0), updates)]
    assert set(sizes) == {4, 8, 12}
    assert sizes == sorted(sizes)
    assert abs(sum(sizes) - 8 * updates) < 8


def test_seconds_to_a_loss_are_those_of_the_first_crossing():
    points = [(10.0, 1, 20.0), (20.0, 2, 18.0), (30.0, 3, 19.0), (40.0, 4, 17.0)]
    assert [speedrun.seconds_to(points, nats) for nats in (21, 18.5, 17.0)] == [10, 20, 40]
    assert speedrun.seconds_to(points, 16) == float("inf")


RECORDS = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("speedrun-*.json"))]


@pytest.mark.parametrize("found", RECORDS, ids=lambda found: found["machine"]["processor"])
def test_what_the_pages_say_follows_from_the_record(found):
    assert (found["recipes"], found["others"]) == (speedrun.RECIPES, speedrun.OTHERS)
    curves = speedrun.curves_of(found)
    assert list(curves) == speedrun.PROGRAMS
    best = {name: speedrun.best_of(some) for name, some in curves.items()}
    classic, cornell = best[speedrun.TEXTBOOK], list(speedrun.RECIPES)[-1]
    before = list(speedrun.RECIPES)[list(speedrun.RECIPES).index(speedrun.FREQUENCIES) - 1]
    textbook, quick = (speedrun.time_to(curves[name], classic) for name in (speedrun.TEXTBOOK, speedrun.QUICK))
    assert quick < textbook / 5
    assert max(curve[-1][0] for curve in curves[speedrun.QUICK]) < 120  # the minutes that the profiles promise
    assert max(curve[-1][0] for curve in curves[cornell]) < 600
    assert best[cornell] < best[speedrun.QUICK] < classic - 1
    # A fall in every seed, and what prevents it, in ten for the profiles.
    assert min(nats for curve in curves[before] for *_, nats in curve) > classic + 1
    assert best[speedrun.FREQUENCIES] < classic - 1
    assert min(len(curves[name]) for name in (speedrun.QUICK, cornell)) == 10
    for name in (speedrun.FREQUENCIES, speedrun.QUICK, cornell):
        for curve in curves[name]:
            assert max(nats for _, update, nats in curve if update >= 600) < classic


def test_what_notebook_05_says_follows_from_the_record_it_reads():
    curves = speedrun.curves_of(RECORDS[0])
    best = {name: speedrun.best_of(some) for name, some in curves.items()}
    last = {name: statistics.median(curve[-1][0] for curve in some) for name, some in curves.items()}
    classic, (cornell, *_), muon = best[speedrun.TEXTBOOK], reversed(speedrun.RECIPES), "Muon for the matrices"
    assert speedrun.time_to(curves[speedrun.FREQUENCIES], classic) < 60
    assert speedrun.time_to(curves[speedrun.TEXTBOOK], classic) > 240
    assert 0.6 < last["+ bf16 where it is faster"] / last[speedrun.FREQUENCIES] < 0.75
    assert best[cornell] < classic - 3
    assert max(curve[-1][0] for curve in curves[cornell]) < 420
    for name in ("an average of the weights, 0.99", "AdamW, weight decay 0.01", "β₂ 0.98"):
        assert abs(best[name] - best[speedrun.QUICK]) < 0.1
    assert best["batches that grow"] > best[speedrun.QUICK] + 0.1
    assert 0.08 < best[speedrun.QUICK] - best[muon] < 0.15
    assert 1.6 < last[muon] / last[speedrun.QUICK] < 1.9
    assert [round(speedrun.time_to(curves[name], 18)) for name in (muon, speedrun.QUICK)] == [122, 71]


def test_most_seeds_come_to_the_best_whatever_their_number():
    curves = [[(10.0 * seed, 1, 20.0 + seed)] for seed in range(1, 5)]
    for count in range(1, 5):
        some = curves[:count]
        assert speedrun.time_to(some, speedrun.best_of(some)) < float("inf")
