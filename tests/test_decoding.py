import itertools

import pytest
import torch

from helpers.decoding import (
    GreedySearch,
    _repeats,
    attention_weights,
    beam_search,
    filtered,
    greedy,
    mmi,
    mutual_information,
    sample,
    silence,
)  # fmt: skip
from helpers.evaluation import batch_loss, log_probability
from helpers.model import new_model
from helpers.settings import UserError
from helpers.text import EOS, PAD, SOS, UNK
from helpers.training import load_model
from tests.conftest import CPU, TINY


@pytest.fixture(scope="module")
def model(trained):
    return load_model(trained.checkpoint, CPU)[0]


@pytest.fixture(scope="module")
def batch(prepared):
    return prepared.splits["test"].batch(torch.arange(20))


def finished(ids):
    """Nothing but PAD after each row's first EOS, and neither SOS nor UNK anywhere."""
    assert not (ids == SOS).any()
    assert not (ids == UNK).any()
    for row in ids.tolist():
        end = row.index(EOS) if EOS in row else len(row)
        assert all(i == PAD for i in row[end + 1 :])
        assert PAD not in row[:end]


SEARCHES = {
    "greedy": greedy,
    "beam": beam_search,
    "sampling": lambda *a: sample(*a, temperature=1.5, seed=3),
    "mmi": lambda *a: mmi(*a, candidates=4, seed=3),
    "nucleus": lambda *a: sample(*a, top_p=0.8, top_k=20, seed=3),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_reply_ends_at_eos_and_never_holds_unk(model, batch, name):
    ids = SEARCHES[name](model, batch.query, batch.query_lengths, 15)
    assert ids.shape[0] == 20
    assert ids.shape[1] <= 15
    finished(ids)


def test_greedy_takes_the_likeliest_word_at_every_step(model, batch):
    ids = greedy(model, batch.query, batch.query_lengths, 15)
    inputs = torch.cat([torch.full((20, 1), SOS), ids[:, :-1]], 1)
    with torch.no_grad():
        logits = model(batch.query, batch.query_lengths, inputs)
    logits[:, :, [PAD, SOS, UNK]] = float("-inf")
    best = logits.argmax(2)
    said = ids != PAD
    assert torch.equal(best[said], ids[said])


def test_greedy_stops_when_all_have_ended(model, batch):
    with torch.no_grad():
        model.output.bias[EOS] += 100  # every reply ends at once
    try:
        assert greedy(model, batch.query, batch.query_lengths, 1000).tolist() == [[EOS]] * 20
    finally:
        with torch.no_grad():
            model.output.bias[EOS] -= 100


def test_a_reply_does_not_depend_on_the_batch(model, batch):
    for name, search in {"greedy": greedy, "beam": beam_search}.items():
        together = search(model, batch.query, batch.query_lengths, 12)
        for row in range(len(batch.query)):
            length = int(batch.query_lengths[row])
            alone = search(model, batch.query[row : row + 1, :length], batch.query_lengths[row : row + 1], 12)[0]
            alone = [i for i in alone.tolist() if i != PAD]
            assert [i for i in together[row].tolist() if i != PAD] == alone, (name, row)


def test_a_beam_of_one_is_greedy(model, batch):
    a = greedy(model, batch.query, batch.query_lengths, 12)
    b = beam_search(model, batch.query, batch.query_lengths, 12, beam=1)
    assert torch.equal(a, b[:, : a.shape[1]])
    assert (b[:, a.shape[1] :] == PAD).all()


@torch.no_grad()
def test_a_wide_beam_finds_the_best_reply_of_all():
    """With 3 sayable words and at most 3 steps all replies can be listed."""
    model = new_model(TINY.change(seed=4), 6).eval()
    query, lengths, steps = torch.tensor([[4, 5]]), torch.tensor([2]), 3
    words = (EOS, 4, 5)
    best = (-float("inf"), ())
    for length in range(1, steps + 1):
        for reply in itertools.product(words, repeat=length):
            if EOS in reply[:-1] or (length < steps and reply[-1] != EOS):
                continue
            logits = model(query, lengths, torch.tensor([[SOS, *reply[:-1]]]))[0]
            logits[:, [PAD, SOS, UNK]] = float("-inf")
            total = torch.log_softmax(logits, 1).gather(1, torch.tensor(reply).unsqueeze(1)).sum().item()
            best = max(best, (total / length, reply))
    found = beam_search(model, query, lengths, steps, beam=3)
    wide = beam_search(model, query, lengths, steps, beam=27)
    assert tuple(i for i in wide[0].tolist() if i != PAD) == best[1]
    assert found.shape == wide.shape


def test_a_beam_is_rarely_less_likely_than_greedy(model, batch):
    def likelihood(ids):
        inputs = torch.cat([torch.full((20, 1), SOS), ids[:, :-1]], 1)
        with torch.no_grad():
            logits = model(batch.query, batch.query_lengths, inputs)
        logits[:, :, [PAD, SOS, UNK]] = float("-inf")
        chosen = torch.log_softmax(logits, 2).gather(2, ids.unsqueeze(2)).squeeze(2)
        return chosen.masked_fill(ids == PAD, 0).sum(1)

    a = likelihood(greedy(model, batch.query, batch.query_lengths, 12))
    b = likelihood(beam_search(model, batch.query, batch.query_lengths, 12, beam=8, length_penalty=0.0))
    assert (b >= a - 1e-4).float().mean() >= 0.9


def test_sampling_is_seeded_and_a_temperature_of_zero_is_greedy(model, batch):
    arguments = (model, batch.query, batch.query_lengths, 12)
    assert torch.equal(sample(*arguments, seed=1), sample(*arguments, seed=1))
    assert not torch.equal(sample(*arguments, seed=1), sample(*arguments, seed=2))
    assert torch.equal(sample(*arguments, temperature=0.0), greedy(*arguments))
    assert torch.equal(sample(*arguments, top_k=1), greedy(*arguments))
    assert torch.equal(sample(*arguments, top_p=1e-6), greedy(*arguments))


def test_filtered_keeps_top_k_and_the_nucleus():
    probability = torch.tensor([[0.1, 0.5, 0.1, 0.3]])
    assert filtered(probability, 2, 1.0).tolist() == [pytest.approx([0, 0.5, 0, 0.3])]
    assert filtered(probability, 0, 0.6).tolist() == [pytest.approx([0, 0.5, 0, 0.3])]
    assert filtered(probability, 0, 0.5).tolist() == [pytest.approx([0, 0.5, 0, 0])]
    assert filtered(probability, 0, 1.0).tolist() == [pytest.approx([0.1, 0.5, 0.1, 0.3])]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_sampling_out_of_range_is_refused(model, batch, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        sample(model, batch.query, batch.query_lengths, 5, **wrong)


def test_a_beam_of_none_is_refused(model, batch):
    with pytest.raises(UserError, match="beam"):
        beam_search(model, batch.query, batch.query_lengths, 5, beam=0)


def test_attention_weights_belong_to_the_reply(model, batch):
    ids = greedy(model, batch.query, batch.query_lengths, 12)
    weights = attention_weights(model, batch.query, batch.query_lengths, ids)
    assert weights.shape == (20, ids.shape[1], batch.query.shape[1])


def test_the_search_module_has_no_weights_of_its_own(model):
    assert set(GreedySearch(model).state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_log_probability_is_the_training_loss(model, prepared, batch):
    logits = model(batch.query, batch.query_lengths, batch.inputs)
    expected = -torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.targets, ignore_index=PAD, reduction="none"
    ).sum(1)
    found = log_probability(model, batch.query, batch.query_lengths, batch.targets)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(found.sum(), -batch_loss(model, batch)[0], rtol=1e-5)


def test_mutual_information_takes_off_what_a_reply_is_worth_to_silence(model, batch):
    given = log_probability(model, batch.query, batch.query_lengths, batch.targets)
    alone = log_probability(model, *silence(len(batch.query), CPU), batch.targets)
    found = mutual_information(model, batch.query, batch.query_lengths, batch.targets, weight=0.3, word_reward=0.5)
    assert torch.allclose(found, given - 0.3 * alone + 0.5 * (batch.targets != PAD).sum(1))


def test_mmi_takes_the_candidate_with_the_most_information(model, batch):
    query, lengths = batch.query[:1], batch.query_lengths[:1]
    drawn = sample(model, query.repeat(6, 1), lengths.repeat(6), 12, temperature=0.7, top_k=100, top_p=0.9, seed=5)
    scores = mutual_information(model, query.repeat(6, 1), lengths.repeat(6), drawn)
    chosen = mmi(model, query, lengths, 12, candidates=6, seed=5)[0]
    words = drawn[scores.argmax()]
    pairs = list(itertools.pairwise(words[words != PAD].tolist()))
    assert len(set(pairs)) < len(pairs) or torch.equal(chosen, words)
    with pytest.raises(UserError, match="candidate"):
        mmi(model, query, lengths, 12, candidates=0)


def test_a_candidate_that_repeats_itself_is_taken_only_if_all_do():
    replies = torch.tensor([[5, 6, 5, 6, EOS], [5, 6, 7, 6, EOS], [5, 5, EOS, PAD, PAD], [5, 5, 5, EOS, PAD]])
    assert _repeats(replies).tolist() == [1, 0, 0, 1]
