import random
from typing import get_args

import pytest
import torch

from helpers.batches import Pairs
from helpers.decoding import greedy
from helpers.evaluation import replies_of
from helpers.model import Encoder, LuongAttention, Memory, Seq2Seq, new_model, parameter_count
from helpers.settings import Settings
from helpers.text import PAD, Vocabulary
from helpers.training import Trainer
from tests.conftest import TINY

SCORES = get_args(Settings.model_fields["attention"].annotation)


@pytest.fixture(params=[(score, feeding) for score in SCORES for feeding in (False, True)], ids=str)
def model(request, prepared):
    score, feeding = request.param
    return new_model(TINY.change(attention=score, input_feeding=feeding), len(prepared.vocabulary)).eval()


@pytest.fixture
def batch(prepared):
    return prepared.splits["train"].batch(torch.tensor([0, 1, 2, 3, 40, 41]))


@torch.no_grad()
def test_whole_sequence_and_stepwise_logits_are_equal(model, batch):
    whole = model(batch.query, batch.query_lengths, batch.inputs)
    memory, state = model.encode(batch.query, batch.query_lengths)
    for t in range(batch.inputs.size(1)):
        logits, state = model.step(batch.inputs[:, t], state, memory)
        assert torch.allclose(whole[:, t], logits, atol=1e-5)


@torch.no_grad()
def test_logits_do_not_depend_on_padding(model, batch):
    whole = model(batch.query, batch.query_lengths, batch.inputs)
    for row in range(len(batch.query)):
        length = int(batch.query_lengths[row])
        alone = model(
            batch.query[row : row + 1, :length], batch.query_lengths[row : row + 1], batch.inputs[row : row + 1]
        )
        assert torch.allclose(whole[row], alone[0], atol=1e-5)


@torch.no_grad()
def test_attention_weights_are_a_distribution_over_real_words(model, batch):
    memory, state = model.encode(batch.query, batch.query_lengths)
    _, weights, _ = model.decode(batch.inputs, state, memory)
    assert torch.allclose(weights.sum(2), torch.ones(weights.shape[:2]), atol=1e-6)
    assert (weights.masked_select((batch.query == PAD).unsqueeze(1)) == 0).all()


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_the_papers_equations(score):
    torch.manual_seed(0)
    attention = LuongAttention(score, 6)
    hidden, states = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    scores = attention.scores(hidden, attention.keys(states))
    for b, t, s in [(0, 0, 0), (1, 2, 3)]:
        h, h_s = hidden[b, t], states[b, s]
        if score == "dot":
            expected = h @ h_s
        elif score == "general":
            expected = h @ attention.for_keys.weight @ h_s
        elif score == "concat":
            w_a = torch.cat([attention.for_queries.weight, attention.for_keys.weight], 1)
            expected = attention.v @ torch.tanh(w_a @ torch.cat([h, h_s]))
        else:
            pytest.fail(f"write the equation of {score} here")
        assert torch.allclose(scores[b, t, s], expected, atol=1e-5)
    context, weights = attention(hidden, Memory(states, attention.keys(states), torch.ones(2, 4, dtype=torch.bool)))
    assert torch.allclose(weights, torch.softmax(scores, 2))
    assert torch.allclose(context[1, 2], weights[1, 2] @ states[1], atol=1e-5)


def test_the_concat_vector_is_drawn_by_the_seed():
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        values.append(LuongAttention("concat", 50).v.detach())
    assert torch.equal(*values)
    assert values[0].abs().max() <= 50**-0.5
    assert values[0].std() > 0.01


def test_every_layer_and_direction_of_the_encoder_reaches_the_decoders_start():
    encoder = Encoder(4, 5, layers=2, dropout=0.0)
    _, hidden = encoder(torch.randn(3, 6, 4), torch.tensor([6, 2, 4]))
    assert hidden.shape == (2, 3, 5)
    hidden.square().sum().backward()
    for name, parameter in encoder.gru.named_parameters():
        if "weight_hh" in name:
            assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_the_bridge_takes_the_last_forward_and_the_first_backward_state():
    encoder = Encoder(4, 5, layers=1, dropout=0.0)
    embedded, lengths = torch.randn(2, 6, 4), torch.tensor([6, 3])
    _, hidden = encoder(embedded, lengths)
    for row, length in enumerate(lengths):
        outputs, _ = encoder.gru(embedded[row : row + 1, :length])
        ends = torch.cat([outputs[0, -1, :5], outputs[0, 0, 5:]])
        assert torch.allclose(hidden[0, row], torch.tanh(encoder.bridges[0](ends)), atol=1e-6)


def test_tied_weights_are_one_matrix_counted_once():
    tied, untied = (Seq2Seq(TINY.change(tie_weights=tie), 50) for tie in (True, False))
    assert tied.output.weight is tied.embedding.weight
    assert parameter_count(untied) - parameter_count(tied) == 50 * TINY.embedding_size


def test_the_padding_row_of_the_embedding_is_zero():
    for tie in (True, False):
        assert (new_model(TINY.change(tie_weights=tie), 50).embedding.weight[PAD] == 0).all()


COPY_WORDS = [f"{letter}{number}" for letter in "abcde" for number in range(4)]


def copy_task(examples, seed=1):
    """(query, response) pairs of 2 to 8 random words each, where the response repeats the query."""
    randomness = random.Random(seed)
    queries = [randomness.choices(COPY_WORDS, k=randomness.randint(2, 8)) for _ in range(examples)]
    return [(query, query) for query in queries]


@pytest.mark.parametrize("score", SCORES)
def test_each_score_learns_to_copy(score):
    words = Vocabulary(COPY_WORDS)
    train, test = Pairs.from_words(copy_task(3000), words), Pairs.from_words(copy_task(200, seed=2), words)
    settings = Settings(embedding_size=48, hidden_size=48, layers=1, dropout=0.0, learning_rate=8e-3, attention=score)
    model = new_model(settings, len(words))
    trainer = Trainer(model, settings)
    for update, indices in enumerate(torch.randint(len(train), (400, 64), generator=torch.Generator().manual_seed(1))):
        trainer.step(train, indices, update)
    replies = replies_of(model.eval(), test, words, 12, greedy)
    share = sum(reply == query for reply, (query, _) in zip(replies, copy_task(200, seed=2), strict=True)) / 200
    assert share >= 0.8, share
