"""The embedded corpus is what its generator says it is, and its probabilities are what they are said to be."""

import itertools
import math
import os
import random
from collections import Counter, defaultdict

import pytest

from benchmarks import world
from helpers.batches import prepare
from helpers.corpus import CONVERSATIONS, LINES, SAMPLE, read_corpus
from helpers.run import ROOT
from helpers.settings import load_profile
from helpers.text import UNK

DRAWN = 1_000_000 if os.environ.get("CHATBOT_SOAK") else 60_000
AGAIN = "python -m benchmarks.world corpora/sample docs/world.md"


@pytest.fixture(scope="module")
def corpus():
    return read_corpus("sample")


@pytest.fixture(scope="module")
def grammar():
    return world.World()


def test_the_embedded_corpus_and_its_page_are_what_the_generator_makes_byte_for_byte(tmp_path):
    world.write_corpus(tmp_path)
    for name in (LINES, CONVERSATIONS):
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), AGAIN
    assert world.page() == (ROOT / "docs" / "world.md").read_text(encoding="utf-8"), AGAIN


def test_scenes_have_two_to_ten_lines(corpus):
    lengths = Counter(exchange.conversation for exchange in corpus.exchanges)
    assert set(lengths.values()) == set(range(1, world.LONGEST))
    assert len(corpus.exchanges) >= world.EXCHANGES


def test_robin_never_speaks_to_itself():
    """Who says a line is no matter of its text: a meaning that both may come to must sound right from both."""
    lines = itertools.chain.from_iterable(scene[1::2] for movie in world.scenes(5000) for scene in movie)
    assert {line.text for line in lines if "Robin" in line.text} == {
        "My name is Robin.",
        "I am Robin, a small machine.",
    }


def test_a_word_is_of_one_kind_alone(grammar):
    """Else a slot would have fewer fillers than its probability says."""
    words = [word for kind in grammar.fillers.values() for word in kind]
    assert len(set(words)) == len(words)


def test_probabilities_sum_to_one_and_every_meaning_is_reached(grammar):
    reached, waiting = set(), [*grammar.talk, *grammar.grammar["facts"]]
    while waiting:
        meaning = waiting.pop()
        if meaning not in reached:
            reached.add(meaning)
            waiting += grammar.answers[meaning]
    assert reached == set(grammar.ways)
    for meaning, answers in grammar.answers.items():
        assert not answers or math.isclose(sum(answers.values()), 1), meaning
    for meaning in ("how are you", "where name", "lovely colour", "know name"):
        line = grammar.say(meaning, {}, random.Random(2))
        replies = grammar.replies(line)
        assert math.isclose(sum(reply.chance for reply in replies), 1)
        assert len({reply.text for reply in replies}) == len(replies)
        by_hand = -sum(reply.chance * math.log(reply.chance) for reply in replies)
        assert math.isclose(by_hand, grammar.entropy(meaning))


def test_the_same_words_have_the_same_replies(grammar):
    """Whatever a line means, its text alone must decide: the model reads nothing else."""
    found = {}
    for line in itertools.chain.from_iterable(itertools.chain.from_iterable(world.scenes())):
        text = line.text.lower().rstrip(".!?")
        replies = sorted((one.way, *one.words.values(), round(one.chance, 9)) for one in grammar.patterns(line))
        assert found.setdefault(text, replies) == replies, line.text


def test_a_fact_with_one_right_answer_names_what_it_needs(grammar):
    for meaning in grammar.grammar["facts"]:
        for way in grammar.ways[meaning]:
            slots = {"".join(slot) for slot in world._SLOT.findall(way)}
            for reply in grammar.answers[meaning]:
                for answer in grammar.ways[reply]:
                    assert {"".join(slot) for slot in world._SLOT.findall(answer)} <= slots, (way, answer)


def test_drawn_exchanges_come_as_often_as_the_page_says(grammar):
    """Each meaning's answers against the grammar, and the mean cost of a response against the entropy: within five
    standard errors, since there are 200 comparisons; twice that where exchanges of one scene hang together."""
    randomness, counts, costs = random.Random(7), defaultdict(Counter), []
    talk, facts = grammar.talk, grammar.grammar["facts"]
    openings = {meaning: 2.0 * count for meaning, count in facts.items()}
    for meaning, weight in talk.items():
        openings[meaning] = openings.get(meaning, 0) + grammar.grammar["talk_scenes"] * weight / sum(talk.values())
    while len(costs) < DRAWN:
        for meaning in randomness.choices(list(openings), openings.values(), k=100):
            scene = grammar.scene(grammar.say(meaning, {}, randomness), randomness)
            for query, reply in itertools.pairwise(scene):
                counts[query.meaning][reply.meaning] += 1
                costs.append(-math.log(reply.chance))
    often = grammar.expected()
    for meaning, found in counts.items():
        number = found.total()
        expected = often[meaning] / sum(often.values())
        assert abs(number / len(costs) - expected) < 10 * math.sqrt(expected / len(costs)), meaning
        for reply, chance in grammar.answers[meaning].items():
            error = math.sqrt(chance * (1 - chance) / number)
            assert abs(found[reply] / number - chance) <= 5 * error, (meaning, reply)
    entropy = sum(number * grammar.entropy(meaning) for meaning, number in often.items()) / sum(often.values())
    mean = sum(costs) / len(costs)
    spread = math.sqrt(sum((cost - mean) ** 2 for cost in costs) / len(costs))
    assert abs(mean - entropy) < 5 * 2 * spread / math.sqrt(len(costs))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_held_out_was_never_seen_but_its_words_were_seen_often(corpus, seed):
    data = prepare(corpus, load_profile("sample").change(seed=seed))
    known, facts = world.known(data.vocabulary.tokenise), world.World().grammar["facts"]
    train = data.splits["train"]
    training, queries = Counter(), set()
    for query, response in zip(train.queries.tolist(), train.responses.tolist(), strict=True):
        queries.add(tuple(data.vocabulary.decode(query)))
        training.update({*query, *response})
    seen = 0
    for query, response in [*data.texts["validation"], *data.texts["test"]]:
        if known[query, response][0].meaning in facts:
            seen += 1
            words = data.vocabulary.encode([*query.split(), *response.split()])
            assert UNK not in words
            assert all(training[word] >= 20 for word in words)
            assert tuple(query.split()) not in queries
    assert seen > 500


def test_a_larger_corpus_has_new_names_and_the_size_asked_for(tmp_path):
    corpus = read_corpus(world.write_corpus(tmp_path, exchanges=30_000))
    assert 30_000 <= len(corpus.exchanges) < 30_200
    words = {word for exchange in corpus.exchanges for word in exchange.query.split()}
    assert len(words) > 600


def test_made_up_words_are_made_once():
    assert len({world.made_up(index) for index in range(-1000, 21**4 - 1000)}) == 21**4
