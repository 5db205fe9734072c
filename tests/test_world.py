from collections import Counter

import pytest

from benchmarks import world
from helpers.batches import prepare
from helpers.corpus import CONVERSATIONS, LINES, SAMPLE, read_corpus
from helpers.settings import load_profile
from helpers.text import tokenise


@pytest.fixture(scope="module")
def corpus():
    return read_corpus("sample")


def test_the_embedded_corpus_is_what_the_generator_makes_byte_for_byte(tmp_path):
    world.write_corpus(tmp_path)
    for name in (LINES, CONVERSATIONS):
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), (
            "python -m benchmarks.world corpora/sample"
        )


def test_it_is_large_enough(corpus):
    assert len(corpus.exchanges) >= 4000
    words = {word for exchange in corpus.exchanges for word in tokenise(exchange.query) + tokenise(exchange.response)}
    assert len(words) >= 300
    assert max(Counter(exchange.conversation for exchange in corpus.exchanges).values()) > 1


def test_a_query_has_one_reply(corpus):
    replies = {}
    for exchange in corpus.exchanges:
        assert replies.setdefault(exchange.query, exchange.response) == exchange.response


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_held_out_was_never_seen_but_its_words_were_seen_often(corpus, seed):
    data = prepare(corpus, load_profile("sample").change(seed=seed))
    decode = data.vocabulary.decode
    training = Counter()
    queries = set()
    train = data.splits["train"]
    for query, response in zip(train.queries.tolist(), train.responses.tolist(), strict=True):
        queries.add(tuple(decode(query)))
        training.update(set(decode(query) + decode(response)))
    for name in ("validation", "test"):
        for query, response in data.texts[name]:
            assert tuple(query.split()) not in queries
            assert all(training[word] >= 20 for word in query.split() + response.split())


def test_a_larger_corpus_has_new_names_and_the_size_asked_for(tmp_path):
    corpus = read_corpus(world.write_corpus(tmp_path, exchanges=30_000))
    assert 30_000 <= len(corpus.exchanges) < 30_200
    movies = {}
    for exchange in corpus.exchanges:
        assert movies.setdefault(exchange.query, exchange.movie) == exchange.movie
    words = {word for exchange in corpus.exchanges for word in exchange.query.split()}
    assert len(words) > 600
