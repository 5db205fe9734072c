import random
from typing import get_args

import pytest
import torch
from torch import nn

from benchmarks.replies import replies_of
from helpers.batches import Pairs
from helpers.decoding import greedy
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
            expected = h @ attention.keys.weight @ h_s
        elif score == "concat":
            w_a = torch.cat([attention.for_queries.weight, attention.keys.weight], 1)
            expected = attention.v @ torch.tanh(w_a @ torch.cat([h, h_s]))
        else:
            pytest.fail(f"write the equation of {score} here")
        assert torch.allclose(scores[b, t, s], expected, atol=1e-5)
    context, weights = attention(hidden, Memory(states, attention.keys(states), torch.zeros(2, 4, dtype=torch.bool)))
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
    for name, parameter in encoder.named_parameters():
        if "weight_hh" in name:
            assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_the_bridge_takes_the_last_forward_and_the_first_backward_state():
    encoder = Encoder(4, 5, layers=1, dropout=0.0)
    embedded, lengths = torch.randn(2, 6, 4), torch.tensor([6, 3])
    _, hidden = encoder(embedded, lengths)
    for row, length in enumerate(lengths):
        words, (layer,) = embedded[row : row + 1, :length], encoder.layers
        ends = [gru(some)[1][0, 0] for gru, some in ((layer.along, words), (layer.against, words.flip(1)))]
        assert torch.allclose(hidden[0, row], torch.tanh(layer.bridge(torch.cat(ends))), atol=1e-6)


def packed_twin(encoder, inputs):
    """An nn.GRU of both directions with the encoder's own weights."""
    count, hidden = len(encoder.layers), encoder.layers[0].along.hidden_size
    twin = nn.GRU(inputs, hidden, count, batch_first=True, bidirectional=True)
    for name, _ in list(twin.named_parameters()):
        kind, number = name.removesuffix("_reverse").rsplit("_l", 1)
        layer = encoder.layers[int(number)]
        gru = layer.against if name.endswith("_reverse") else layer.along
        twin.get_parameter(name).data.copy_(gru.get_parameter(f"{kind}_l0"))
    return twin


@pytest.mark.parametrize("layers", [1, 3])
def test_the_encoder_is_a_gru_of_both_directions_on_packed_queries(layers):
    torch.manual_seed(0)
    encoder = Encoder(12, 16, layers, 0.0)
    twin, lengths = packed_twin(encoder, 12), torch.tensor([9, 1, 4, 7, 2])
    embedded = torch.randn(5, 9, 12)
    words = (torch.arange(9) < lengths.unsqueeze(1)).unsqueeze(2)
    packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
    expected, ends = twin(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    expected = expected[:, :, :16] + expected[:, :, 16:]
    ends = ends.view(layers, 2, 5, 16)
    bridged = [torch.tanh(layer.bridge(torch.cat([*ends[n]], 1))) for n, layer in enumerate(encoder.layers)]
    outputs, hidden = encoder(embedded, lengths)
    assert torch.allclose(outputs * words, expected, atol=1e-6)
    assert torch.allclose(hidden, torch.stack(bridged), atol=1e-6)
    (outputs * words).square().sum().add(hidden.sum()).backward()
    bridge = [layer.bridge.weight.grad.clone() for layer in encoder.layers]
    for layer in encoder.layers:
        layer.bridge.zero_grad()
    expected.square().sum().add(torch.stack(bridged).sum()).backward()
    for number, layer in enumerate(encoder.layers):
        assert torch.allclose(layer.bridge.weight.grad, bridge[number], atol=1e-5)
        for gru, suffix in ((layer.along, ""), (layer.against, "_reverse")):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                own, other = gru.get_parameter(f"{kind}_l0"), twin.get_parameter(f"{kind}_l{number}{suffix}")
                assert torch.allclose(own.grad, other.grad, rtol=1e-4, atol=1e-5), (kind, number, suffix)


@torch.no_grad()
def test_what_stands_at_padding_changes_nothing():
    encoder, lengths = Encoder(4, 5, layers=2, dropout=0.0), torch.tensor([6, 3, 1])
    embedded = torch.randn(3, 6, 4)
    words = (torch.arange(6) < lengths.unsqueeze(1)).unsqueeze(2)
    other = torch.where(words, embedded, torch.full_like(embedded, 99.0))
    (outputs, hidden), (again, state) = (encoder(given, lengths) for given in (embedded, other))
    assert torch.equal(outputs * words, again * words)
    assert torch.equal(hidden, state)


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
