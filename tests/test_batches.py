import dataclasses
import shutil

import pytest
import torch

from helpers.batches import BucketedSampler, Pairs, Prepared, padding_share, prepare, prepared_data, split
from helpers.corpus import Corpus, Exchange, read_corpus
from helpers.run import read_tensors, write_tensors
from helpers.settings import Settings, UserError
from helpers.text import EOS, PAD, SOS, UNK, tokenise
from tests.conftest import TINY


def corpus_of(*pairs, movies=None):
    exchanges = [Exchange(q, r, f"L{i}", (movies or {}).get(i, f"m{i}")) for i, (q, r) in enumerate(pairs)]
    return Corpus("made", exchanges, 2 * len(pairs), len(pairs), 0, "digest")


def test_every_movie_has_one_part_and_every_part_its_share(corpus_folder):
    exchanges = read_corpus(corpus_folder).exchanges
    for seed in range(3):
        chosen = split(exchanges, 0.15, seed)
        assert set(chosen) == {exchange.movie for exchange in exchanges}
        for name in ("test", "validation"):
            assert sum(chosen[exchange.movie] == name for exchange in exchanges) >= 0.15 * len(exchanges)


def test_the_same_movies_are_held_out_whatever_the_filters_drop():
    texts = [" ".join(["word"] * (1 + i % 30)) for i in range(400)]
    corpus = corpus_of(*((text, f"reply {i}") for i, text in enumerate(texts)))
    all_kept = prepare(corpus, Settings(max_query_words=30)).texts["test"]
    short = prepare(corpus, Settings(max_query_words=9)).texts["test"]
    assert short == [(query, response) for query, response in all_kept if len(query.split()) <= 9]


def test_filters_are_counted_and_emptiness_is_seen_after_normalising():
    pairs = [("Hello there.", "Yes.")] * 30 + [("«»", "Yes."), ("Hi.", "🙂"), ("Hi.", "a " * 30), ("b " * 30, "No.")]
    report = prepare(corpus_of(*pairs), Settings(min_count=1)).report
    assert (report["no word left"], report["response too long"], report["query too long"]) == (2, 1, 1)
    assert report["train"] + report["validation"] + report["test"] == 30


def test_a_long_query_can_be_cut_to_its_end_instead():
    pairs = [("one two three four", "yes")] * 30
    data = prepare(corpus_of(*pairs), Settings(max_query_words=2, long_queries="cut", min_count=1))
    assert data.texts["test"][0] == ("three four", "yes")


def test_rare_words_become_unk_or_their_pairs_are_dropped():
    pairs = [("hello", "yes")] * 40 + [("hello", f"rare{i}") for i in range(20)]
    kept = prepare(corpus_of(*pairs), Settings(min_count=2))
    assert UNK in kept.splits["train"].responses
    assert kept.vocabulary.unknown_types > 5
    dropped = prepare(corpus_of(*pairs), Settings(min_count=2, rare_words="drop"))
    assert all(UNK not in part.responses for part in dropped.splits.values())
    assert dropped.report["rare word"] == 20


def test_too_little_for_three_parts_is_an_error():
    with pytest.raises(UserError, match="No exchange is left"):
        prepare(corpus_of(("hello", "yes"), ("hi", "no")), Settings(min_count=1))


def test_a_batch_is_padded_shifted_and_masked(prepared):
    train = prepared.splits["train"]
    batch = train.batch(torch.tensor([3, 0, 5]))
    assert batch.query.shape == (3, int(batch.query_lengths.max()))
    for row, index in enumerate([3, 0, 5]):
        length, words = train.query_lengths[index], train.response_lengths[index]
        assert batch.query[row, :length].tolist() == train.queries[index, :length].tolist()
        assert (batch.query[row, length:] == PAD).all()
        assert batch.targets[row, words - 1] == EOS
        assert batch.inputs[row, 0] == SOS
        assert batch.inputs[row, 1:words].tolist() == batch.targets[row, : words - 1].tolist()
        assert batch.target_mask[row].sum() == words


def test_an_epoch_has_every_example_once_and_depends_on_seed_and_epoch_alone(prepared):
    train = prepared.splits["train"]
    sampler = BucketedSampler(train, 32, seed=1)
    epoch = sampler.epoch(0)
    assert sorted(torch.cat(epoch).tolist()) == list(range(len(train)))
    assert len(epoch) == sampler.batches_per_epoch
    again = BucketedSampler(train, 32, seed=1).epoch(0)
    assert all(torch.equal(a, b) for a, b in zip(epoch, again, strict=True))
    for other in (sampler.epoch(1), BucketedSampler(train, 32, seed=2).epoch(0)):
        assert not all(torch.equal(a, b) for a, b in zip(epoch, other, strict=False))


def test_batches_go_on_from_any_update(prepared):
    sampler = BucketedSampler(prepared.splits["train"], 32, seed=1)
    whole = [indices for indices, _ in zip(sampler.from_update(0), range(40), strict=False)]
    later = next(sampler.from_update(37))
    assert torch.equal(whole[37], later)


def test_buckets_waste_less_padding(prepared):
    train = prepared.splits["train"]
    random_batches = list(torch.randperm(len(train)).split(16))
    assert padding_share(BucketedSampler(train, 16, 1).epoch(0), train) < 0.5 * padding_share(random_batches, train)


def test_prepared_data_survives_saving(prepared, tmp_path):
    path = tmp_path / "data.pt"
    prepared.save(path)
    again = Prepared.load(path)
    assert again.vocabulary.words == prepared.vocabulary.words
    assert (again.settings, again.report, again.texts, again.digest) == (
        prepared.settings, prepared.report, prepared.texts, prepared.digest,
    )  # fmt: skip
    for name, pairs in prepared.splits.items():
        for field in dataclasses.fields(Pairs):
            assert torch.equal(getattr(again.splits[name], field.name), getattr(pairs, field.name))


def test_missing_and_damaged_data_say_what_to_do(tmp_path, prepared):
    path = tmp_path / "data.pt"
    with pytest.raises(UserError, match="01_data_preparation"):
        Prepared.load(path)
    prepared.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="prepare the data again"):
        Prepared.load(path)


def test_the_digest_tells_data_settings_apart_and_ignores_the_rest(corpus_folder):
    corpus = read_corpus(corpus_folder)
    base = prepare(corpus, TINY).digest
    assert prepare(corpus, TINY.change(hidden_size=32, updates=7)).digest == base
    assert prepare(corpus, TINY.change(min_count=3)).digest != base


def test_an_empty_query_is_silence(prepared):
    pairs = Pairs.from_words([([], ["yes"])], prepared.vocabulary)
    assert pairs.queries.tolist() == [[EOS]]


def test_openers_answer_silence_and_are_trained_on_only(corpus_folder):
    corpus = read_corpus(corpus_folder)
    without, with_openers = (prepare(corpus, TINY.change(openers=openers)) for openers in (False, True))
    added = len(with_openers.splits["train"]) - len(without.splits["train"])
    assert added == with_openers.report["openers"] > 0
    queries = with_openers.splits["train"].queries
    assert ((queries[-added:, 0] == EOS) & (queries[-added:, 1:] == PAD).all(1)).all()
    first = {}
    for exchange in corpus.exchanges:
        first.setdefault(exchange.conversation, exchange.query)
    openers = {tuple(with_openers.vocabulary.encode(tokenise(line))) for line in first.values()}
    for row in with_openers.splits["train"].responses[-added:].tolist():
        assert tuple(row[: row.index(EOS)]) in openers
    assert torch.equal(without.splits["test"].responses, with_openers.splits["test"].responses)


def test_dropped_queries_are_silence_and_dropped_words_unknown(prepared):
    batch = prepared.splits["train"].batch(torch.arange(64))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    same = batch.dropped(0.0, 0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(same, batch, strict=True))
    fewer = batch.dropped(0.5, 0.3)
    silent = (fewer.query == EOS)[:, 0]
    assert 16 < silent.sum() < 48
    assert (fewer.query_lengths[silent] == 1).all()
    assert (fewer.query[silent, 1:] == PAD).all()
    assert torch.equal((fewer.query != PAD).sum(1), fewer.query_lengths)
    assert torch.equal(fewer.targets, batch.targets)
    changed = fewer.inputs != batch.inputs
    assert (fewer.inputs[changed] == UNK).all()
    assert 0.2 < changed.sum() / (batch.inputs > UNK).sum() < 0.4


def test_the_line_before_can_precede_the_query():
    lines = [f"word{i} is here" for i in range(6)]
    exchanges = [
        Exchange(lines[i], lines[i + 1], f"L{movie}", f"m{movie}") for movie in range(12) for i in range(len(lines) - 1)
    ]
    corpus = Corpus("made", exchanges, 72, 12, 0, "digest")
    data = prepare(corpus, Settings(context_words=2, min_count=1))
    words = [[data.vocabulary.words[i] for i in row if i] for row in data.splits["train"].queries.tolist()]
    assert words[0] == ["word0", "is", "here"]
    assert words[1] == ["is", "here", "<eos>", "word1", "is", "here"]
    assert words[5] == words[0]  # the next conversation begins
    assert data.texts["test"][1][0] == "word1 is here"


def test_prepared_data_is_kept_under_a_key_of_files_and_settings(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.batches.DATA", tmp_path)
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_folder, corpus)
    first = prepared_data(corpus, TINY)
    kept = lambda: sorted(tmp_path.glob("cache/*.pt"))  # noqa: E731
    assert len(kept()) == 1
    monkeypatch.setattr("helpers.batches.prepare", lambda *_: pytest.fail("was prepared again"))
    again = prepared_data(corpus, TINY.change(hidden_size=8))
    assert again.settings.hidden_size == 8
    assert (again.digest, again.texts, again.counts) == (first.digest, first.texts, first.counts)
    assert torch.equal(again.splits["train"].queries, first.splits["train"].queries)
    monkeypatch.undo()
    monkeypatch.setattr("helpers.batches.DATA", tmp_path)
    assert prepared_data(corpus, TINY.change(min_count=5)).digest != first.digest
    lines = corpus / "movie_lines.txt"
    lines.write_bytes(lines.read_bytes().replace(b"London", b"Leeds"))
    assert prepared_data(corpus, TINY).digest != first.digest
    assert len(kept()) == 3
    for path in kept():
        path.write_bytes(b"torn")
    assert "leeds" in prepared_data(corpus, TINY).counts


def test_data_that_was_tampered_with_is_named(prepared, tmp_path):
    path = tmp_path / "data.pt"
    prepared.save(path)
    state = read_tensors(path, "")
    for spoilt in ("[" * 100_000, "{", "[1]"):  # nested too deep, torn, of another kind
        write_tensors(path, state | {"texts": spoilt})
        with pytest.raises(UserError, match="is incomplete"):
            Prepared.load(path)


def test_a_folder_of_a_corpus_file_s_name_is_none_of_the_corpus(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.batches.DATA", tmp_path / "data")
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_folder, corpus)
    (corpus / "extra" / "movie_lines.txt").mkdir(parents=True)
    assert prepared_data(corpus, TINY).report["train"] > 0
