import dataclasses
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import world
from helpers.batches import SIZES, BucketedSampler, Pairs, Prepared, prepare, split
from helpers.corpus import Corpus, Exchange, read_corpus
from helpers.settings import Settings, UserError, load_profile
from helpers.text import EOS, PAD, SOS, UNK, tokenise
from tests.conftest import TINY


def corpus_of(*pairs, movies=None):
    exchanges = [Exchange(q, r, f"L{i}", (movies or {}).get(i, f"m{i}")) for i, (q, r) in enumerate(pairs)]
    return Corpus("made", "made", exchanges, 2 * len(pairs), len(pairs), 0, 0, "digest")


def talks(*conversations):
    """A corpus of whole conversations, given as lists of lines, each in a movie of its own."""
    exchanges = [
        Exchange(query, response, f"L{number}", f"m{number}", before)
        for number, lines in enumerate(conversations)
        for before, query, response in zip([None, *lines], lines, lines[1:], strict=False)
    ]
    return Corpus("made", "made", exchanges, sum(map(len, conversations)), len(conversations), 0, 0, "digest")


def in_words(pairs, vocabulary):
    """The rows of a split as (query, response), UNK and EOS spelt out; what follows a row's length must be PAD."""
    rows = []
    for query, words, response, more in zip(
        pairs.queries, pairs.query_lengths, pairs.responses, pairs.response_lengths, strict=True
    ):
        assert (query[words:] == PAD).all()
        assert (response[more:] == PAD).all()
        sides = (query[:words].tolist(), response[:more].tolist())
        rows.append(tuple(" ".join(vocabulary.words[index] for index in side) for side in sides))
    return rows


def test_every_movie_has_one_part_and_every_part_its_share(tmp_path):
    exchanges = read_corpus(world.write_corpus(tmp_path, exchanges=1500)).exchanges
    for seed in range(3):
        parts, unit = split(exchanges, 0.15, seed)
        assert unit == "movie"
        chosen = dict(zip([exchange.movie for exchange in exchanges], parts, strict=True))
        assert parts == [chosen[exchange.movie] for exchange in exchanges]
        assert all(parts.count(name) >= 0.15 * len(exchanges) for name in ("test", "validation"))


def test_the_same_movies_are_held_out_whatever_the_filters_drop():
    texts = [" ".join(["word"] * (1 + i % 30)) for i in range(400)]
    corpus = corpus_of(*((text, f"reply {i}") for i, text in enumerate(texts)))
    all_kept = prepare(corpus, Settings(max_query_words=30)).texts["test"]
    short = prepare(corpus, Settings(max_query_words=9)).texts["test"]
    assert short == [(query, response) for query, response in all_kept if len(query.split()) <= 9]


def test_filters_are_counted_and_emptiness_is_seen_after_normalising():
    pairs = [("Hello there.", "Yes.")] * 30 + [("«»", "Yes."), ("Hi.", "…"), ("Hi.", "a " * 30), ("b " * 30, "No.")]
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


@pytest.mark.parametrize(("movies", "talks_", "unit"), [(12, 12, "movie"), (1, 12, "conversation"), (1, 1, "exchange")])
def test_what_is_split_is_the_largest_unit_of_which_there_are_enough(movies, talks_, unit):
    exchanges = [Exchange("Hi.", f"Word{i}.", f"L{i % talks_}", f"m{i % movies}") for i in range(24)]
    corpus = Corpus("made", "made", exchanges, 48, talks_, 0, 0, "digest")
    data = prepare(corpus, Settings(min_count=1))
    assert data.corpus["unit"] == unit
    assert f"split by {unit}" in data.account()
    assert sum(len(part) for part in data.splits.values()) == 24


def test_with_nothing_held_out_all_is_trained_on_and_looked_at():
    data = prepare(corpus_of(*[(f"one{i}", f"two{i}") for i in range(20)]), Settings(min_count=1, held_out_share=0.0))
    for pairs in data.splits.values():
        assert len(pairs) == 20
    assert data.texts["test"][0] == ("one0", "two0")
    assert "none held out" in data.account()


def test_one_sentence_says_what_became_of_the_exchanges():
    pairs = [("Hello there.", "Yes.")] * 30 + [("«»", "Yes.")] * 3 + [("Hi.", "a " * 30)] * 4
    told = prepare(corpus_of(*pairs), Settings(min_count=20)).account()
    assert told.startswith("37 exchanges read from made; dropped: 3 for no word left, 4 for response too long; kept: ")
    assert told.endswith("split by movie; 4 of 4 words known")


def test_words_are_written_as_they_mostly_are_inside_sentences():
    pairs = [("Hello there.", "Well, I met Marco in rome. Marco met McCoy.")] * 30 + [("Hi.", "so marco SAID")]
    spelling = prepare(corpus_of(*pairs), Settings(min_count=1)).vocabulary.spelling
    assert spelling["marco"] == "Marco"
    assert spelling["mccoy"] == "McCoy"
    assert spelling["i"] == "I"
    assert "rome" not in spelling
    assert "well" not in spelling


def test_a_vocabulary_to_build_on_keeps_its_ids_and_gets_the_new_words():
    base = prepare(corpus_of(*[("hello there", "yes")] * 20), Settings(min_count=1)).vocabulary
    more = prepare(corpus_of(*[("hello moon", "no")] * 20), Settings(min_count=1), base).vocabulary
    assert more.words[: len(base)] == base.words
    assert set(more.words[len(base) :]) == {"moon", "no"}


def test_jumbled_queries_are_answered_by_nothing(prepared):
    batch = prepared.splits["train"].batch(torch.arange(64))
    torch.manual_seed(0)
    strange = batch.with_dropout(0.0, 0.0, 0.5)
    silent = strange.targets[:, 0] == EOS
    assert 16 < silent.sum() < 48
    assert (strange.targets[silent, 1:] == PAD).all()
    assert (strange.inputs[silent, 1:] == PAD).all()
    for old, new in zip(batch, strange, strict=True):
        assert torch.equal(old[~silent], new[~silent])
    assert torch.equal(strange.query == PAD, batch.query == PAD)
    assert (strange.query != batch.query)[silent & (batch.query_lengths > 3)].any(1).float().mean() > 0.9


def test_too_little_for_three_parts_is_an_error():
    with pytest.raises(UserError, match="Too little is left to split"):
        prepare(corpus_of(("hello", "yes"), ("hi", "no")), Settings(min_count=1))


def test_a_batch_is_padded_shifted_and_masked(prepared):
    train = prepared.splits["train"]
    batch = train.batch(torch.tensor([3, 0, 5]))
    for ids, lengths in ((batch.query, train.query_lengths), (batch.targets, train.response_lengths)):
        longest = int(lengths[[3, 0, 5]].max())
        assert ids.shape == (3, min(size for size in SIZES if size >= longest))
    assert torch.equal(batch.query_lengths, train.query_lengths[[3, 0, 5]])
    for row, index in enumerate([3, 0, 5]):
        length, words = train.query_lengths[index], train.response_lengths[index]
        assert batch.query[row, :length].tolist() == train.queries[index, :length].tolist()
        assert (batch.query[row, length:] == PAD).all()
        assert batch.targets[row, words - 1] == EOS
        assert batch.inputs[row, 0] == SOS
        assert batch.inputs[row, 1:words].tolist() == batch.targets[row, : words - 1].tolist()
        assert (batch.targets[row, words:] == PAD).all()


@pytest.mark.parametrize("size", [1, 7, 32, 10_000])
def test_an_epoch_has_every_example_and_twice_only_what_fills_the_last_batch(prepared, size):
    train = prepared.splits["train"]
    sampler = BucketedSampler(train, size, seed=1)
    twice = []
    for number in range(3):
        epoch = sampler.epoch(number)
        assert len(epoch) == sampler.batches_per_epoch == -(-len(train) // size)
        assert {len(batch) for batch in epoch} == {min(size, len(train))}
        counts = torch.cat(epoch).bincount(minlength=len(train))
        assert set(counts.tolist()) <= {1, 2}
        twice.append((counts == 2).nonzero().flatten().tolist())
        assert len(twice[-1]) == -len(train) % min(size, len(train))
    assert not twice[0] or twice[0] != twice[1], "others in each epoch"


def test_an_epoch_depends_on_seed_and_epoch_alone(prepared):
    train = prepared.splits["train"]
    sampler = BucketedSampler(train, 32, seed=1)
    epoch = sampler.epoch(0)
    again = BucketedSampler(train, 32, seed=1).epoch(0)
    assert all(torch.equal(a, b) for a, b in zip(epoch, again, strict=True))
    for other in (sampler.epoch(1), BucketedSampler(train, 32, seed=2).epoch(0)):
        assert not all(torch.equal(a, b) for a, b in zip(epoch, other, strict=False))


def test_batches_go_on_from_any_update(prepared):
    sampler = BucketedSampler(prepared.splits["train"], 32, seed=1)
    whole = [indices for indices, _ in zip(sampler.from_update(0), range(40), strict=False)]
    later = next(sampler.from_update(37))
    assert torch.equal(whole[37], later)


def padding_share(batches, pairs):
    """The share of places, in queries and responses, that hold padding in these batches."""
    made = [pairs.batch(indices) for indices in batches]
    sides = [side for batch in made for side in (batch.query, batch.targets)]
    return sum(int((side == PAD).sum()) for side in sides) / sum(side.numel() for side in sides)


def test_buckets_waste_less_padding(prepared):
    train = prepared.splits["train"]
    random_batches = list(torch.randperm(len(train)).split(16))
    assert padding_share(BucketedSampler(train, 16, 1).epoch(0), train) < 0.5 * padding_share(random_batches, train)


def test_an_epoch_of_the_series_own_corpus_has_few_shapes():
    train = prepare(read_corpus("sample"), load_profile("sample")).splits["train"]
    shapes = {train.shape(indices) for indices in BucketedSampler(train, 64, 1).epoch(0)}
    assert {time for shape in shapes for time in shape} <= set(SIZES)
    assert len(shapes) <= 40, sorted(shapes)  # of 249 batches
    one = train.batch(torch.tensor([0]))
    assert (one.query.size(1), one.targets.size(1)) == train.shape(torch.tensor([0]))


def test_the_longest_line_that_settings_allow_has_a_size(prepared):
    words = ["yes"] * 2001  # a query, EOS and the line before it
    pairs = Pairs.from_words([(words, words[:1000])], prepared.vocabulary)
    assert pairs.queries.size(1) >= 2001
    assert sorted(set(SIZES)) == SIZES


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
    with pytest.raises(UserError, match=r"data\.pt cannot be loaded .*01_data_preparation"):
        Prepared.load(path)


def test_the_digest_tells_data_settings_apart_and_ignores_the_rest(corpus_folder):
    corpus = read_corpus(corpus_folder)
    base = prepare(corpus, TINY).digest
    assert prepare(corpus, TINY.change(hidden_size=32, updates=7)).digest == base
    assert prepare(corpus, TINY.change(min_count=3)).digest != base


def test_the_digest_tells_the_files_contents_apart_wherever_they_lie(corpus_folder, prepared, tmp_path):
    copy = shutil.copytree(corpus_folder, tmp_path / "copy")
    assert prepare(read_corpus(copy), TINY).digest == prepared.digest
    lines = copy / "movie_lines.txt"
    lines.write_bytes(lines.read_bytes().replace(b"London", b"Leeds"))
    changed = prepare(read_corpus(copy), TINY)
    assert changed.digest != prepared.digest
    assert "leeds" in changed.counts
    assert "leeds" not in prepared.counts


def test_an_empty_query_is_silence(prepared):
    pairs = Pairs.from_words([([], ["yes"])], prepared.vocabulary)
    assert pairs.queries.tolist() == [[EOS, PAD]]
    assert pairs.query_lengths.tolist() == [1]


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


def test_of_a_conversation_the_first_line_alone_is_an_opener():
    plain = [[f"opener{n}", f"second{n}", f"third{n}", f"fourth{n}"] for n in range(20)]
    odd = [
        ["second1 second2", "far too long for a reply", "third1"],  # an opener, though its answer is dropped
        ["far too long for a reply", "second3", "third3"],  # none: nothing that may be replied is so long
        ["«»", "third4", "fourth4"],  # none: no word is left of it
    ]
    choices = Settings(openers=True, max_response_words=4, min_count=1, held_out_share=0.15, seed=13)
    data = prepare(talks(*plain, *odd), choices)
    rows = in_words(data.splits["train"], data.vocabulary)
    opened = [response for query, response in rows if query == "<eos>"]
    exchanges = talks(*plain, *odd).exchanges
    chosen = dict(zip([e.movie for e in exchanges], split(exchanges, 0.15, choices.seed)[0], strict=True))
    expected = [f"opener{n} <eos>" for n in range(20) if chosen[f"m{n}"] == "train"]
    assert sorted(opened) == sorted([*expected, "second1 second2 <eos>"])
    assert chosen["m20"] == chosen["m21"] == chosen["m22"] == "train"  # so that all three count here
    assert len(opened) == data.report["openers"]
    assert [row for row in rows if row[0] != "<eos>"] == in_words(
        prepare(talks(*plain, *odd), choices.change(openers=False)).splits["train"], data.vocabulary
    )


def test_dropped_queries_are_silence_and_dropped_words_unknown(prepared):
    batch = prepared.splits["train"].batch(torch.arange(64))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    same = batch.with_dropout(0.0, 0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(same, batch, strict=True))
    fewer = batch.with_dropout(0.5, 0.3)
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
    data = prepare(talks(*[lines] * 12), Settings(context_words=2, min_count=1))
    words = [[data.vocabulary.words[i] for i in row if i] for row in data.splits["train"].queries.tolist()]
    assert words[0] == ["word0", "is", "here"]
    assert words[1] == ["is", "here", "<eos>", "word1", "is", "here"]
    assert words[5] == words[0]  # the next conversation begins
    assert data.texts["test"][1][0] == "word1 is here"


def test_context_never_reaches_across_conversations():
    talk = talks(*([f"a{n} b{n}", f"c{n} d{n}", f"e{n} f{n}"] for n in range(30)))
    one_movie = [exchange._replace(movie=f"m{number // 12}") for number, exchange in enumerate(talk.exchanges)]
    corpus = dataclasses.replace(talk, exchanges=one_movie)  # many conversations one after another in each movie
    data = prepare(corpus, Settings(context_words=50, min_count=1, held_out_share=0.15))
    for pairs in data.splits.values():
        assert set(pairs.query_lengths.tolist()) == {2, 5}, "two words; or two, EOS and two"
    rows = in_words(data.splits["train"], data.vocabulary)
    numbers = [response.split()[0][1:] for _, response in rows[::2]]
    assert rows == [
        row
        for n in numbers
        for row in ((f"a{n} b{n}", f"c{n} d{n} <eos>"), (f"a{n} b{n} <eos> c{n} d{n}", f"e{n} f{n} <eos>"))
    ]


def test_the_line_before_counts_though_its_own_exchange_was_dropped():
    lines = ["hello there", "one two three four five", "yes", "no"]
    corpus = talks(*([lines] * 12))
    data = prepare(corpus, Settings(context_words=2, max_response_words=3, max_query_words=3, min_count=1))
    row = ("<unk> <unk> <eos> yes", "no <eos>")  # "four five", which no kept exchange holds
    assert set(in_words(data.splits["train"], data.vocabulary)) == {row}
    assert data.report["response too long"] == data.report["query too long"] == 12


STRANGE = st.text(st.sampled_from("aB 'é’İßΣ<u>/i≮.!?\n\r\u0301\x85\u2028 9"), max_size=12)


@settings(deadline=None)
@given(st.lists(st.tuples(STRANGE, STRANGE), max_size=20))
def test_every_row_holds_what_tokenising_its_lines_gives(texts):
    corpus = corpus_of(*[("Hello there.", "Good day!")] * 200, *texts)  # some of them in every part
    parts, _ = split(corpus.exchanges, 0.1, 1)
    data = prepare(corpus, Settings(min_count=1))
    for name, pairs in data.splits.items():
        own = [exchange for exchange, part in zip(corpus.exchanges, parts, strict=True) if part == name]
        words = [(tokenise(exchange.query), tokenise(exchange.response)) for exchange in own]
        kept = [(query, response) for query, response in words if query and response]
        known = lambda said: " ".join(word if word in data.vocabulary else "<unk>" for word in said)  # noqa: E731
        assert in_words(pairs, data.vocabulary) == [(known(q), f"{known(r)} <eos>") for q, r in kept]
        if name != "train":
            assert data.texts[name] == [(" ".join(query), " ".join(response)) for query, response in kept]


def test_data_that_was_tampered_with_is_named(prepared, tmp_path):
    path = tmp_path / "data.pt"
    prepared.save(path)
    state = torch.load(path, weights_only=True)
    for spoilt in ("[" * 100_000, "{", "[1]"):  # nested too deep, torn, of another kind
        torch.save(state | {"texts": spoilt}, path)
        with pytest.raises(UserError, match="is incomplete"):
            Prepared.load(path)
    for other in (state | {"format": state["format"] + 1}, {"format": state["format"]}, {}):
        torch.save(other, path)
        with pytest.raises(UserError, match=r"data\.pt .*(format|incomplete)"):
            Prepared.load(path)
