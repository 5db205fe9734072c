"""Self-attention in the GRUs' place: PyTorch's own layers compute the same, and all that takes a Seq2Seq takes it."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.replies import replies_of
from benchmarks.transformer import HEADS, attend, new_transformer, waves
from helpers import decoding, evaluation, latency, profiling, training
from helpers.batches import Pairs
from helpers.chat import Chatbot
from helpers.deploy import quantised, script
from helpers.evaluation import evaluate
from helpers.run import Run
from helpers.settings import Settings, UserError
from helpers.text import PAD, SOS, Vocabulary
from tests.conftest import CPU, TINY
from tests.test_faults import equal, timeless
from tests.test_model import (  # noqa: F401 - what holds for the GRUs' model is tested on this one too
    COPY_WORDS,
    copy_task,
    test_attention_weights_are_a_distribution_over_real_words,
    test_logits_do_not_depend_on_padding,
)

SETTINGS = TINY.change(hidden_size=40)


@pytest.fixture
def model(prepared):
    return new_transformer(SETTINGS, len(prepared.vocabulary)).eval()


def pytorchs(layer: nn.Module, from_keys: tuple = ()) -> nn.Module:
    """PyTorch's own layer with the weights of one of ours; `from_keys` are a decoder layer's keys and values."""
    size, inner = layer.merge.in_features, layer.network[0].out_features
    kind = nn.TransformerDecoderLayer if from_keys else nn.TransformerEncoderLayer
    theirs = kind(size, HEADS, inner, dropout=0.0, batch_first=True, norm_first=True)
    parts = {
        "self_attn.in_proj_": layer.project, "self_attn.out_proj.": layer.merge, "linear1.": layer.network[0],
        "linear2.": layer.network[2], "norm1.": layer.before_looking,
        "norm3." if from_keys else "norm2.": layer.before_thinking,
    }  # fmt: skip
    weights = {name + kind: part for name, module in parts.items() for kind, part in module.state_dict().items()}
    if from_keys:
        more = {"multihead_attn.out_proj.": layer.learn, "norm2.": layer.before_asking}
        weights |= {name + kind: part for name, module in more.items() for kind, part in module.state_dict().items()}
        for kind, part in zip(("weight", "bias"), from_keys, strict=True):
            weights[f"multihead_attn.in_proj_{kind}"] = torch.cat([getattr(layer.ask, kind), part])
    theirs.load_state_dict(weights)
    return theirs.eval()


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_is_pytorchs_own(heads):
    torch.manual_seed(heads)
    queries, keys, values = torch.randn(3, 5, 16), torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    visible = torch.rand(3, 5, 7) < 0.7
    visible[:, :, 0] = True
    context, weights = attend(queries, keys, values, visible, heads)
    parts = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (queries, keys, values))
    theirs = functional.scaled_dot_product_attention(*parts, attn_mask=visible.unsqueeze(1))
    assert torch.allclose(context, theirs.transpose(1, 2).flatten(2), atol=1e-6)
    assert torch.allclose(weights.sum(3), torch.ones(3, heads, 5))
    assert (weights.masked_select(~visible.unsqueeze(1)) == 0).all()


def test_an_encoder_layer_is_pytorchs_own_with_its_gradients(model):
    layer = model.encoder.layers[0]
    theirs = pytorchs(layer)
    x = torch.randn(4, 6, SETTINGS.embedding_size, requires_grad=True)
    padding = torch.arange(6) >= torch.tensor([6, 3, 1, 5]).unsqueeze(1)
    expected = theirs(x, src_key_padding_mask=padding)
    found = layer.think(layer.look(x, x.new_zeros(2, 4, 0, x.size(2)), ~padding.unsqueeze(1))[0])
    assert torch.allclose(found[~padding], expected[~padding], atol=1e-5)
    gradients = (torch.autograd.grad(one[~padding].square().sum(), x)[0] for one in (found, expected))
    assert torch.allclose(*gradients, atol=1e-4)


@torch.no_grad()
def test_the_decoder_is_pytorchs_own(model, batch):
    memory, state = model.encode(batch.query, batch.query_lengths)
    x = torch.randn(len(batch.query), 5, SETTINGS.embedding_size)
    found, _, _ = model.decoder(x, state, memory)
    parts = [part.chunk(SETTINGS.layers) for part in model.decoder.attention.keys.parameters()]
    hidden = nn.Transformer.generate_square_subsequent_mask(5)
    for number, layer in enumerate(model.decoder.layers):
        theirs = pytorchs(layer, tuple(part[number] for part in parts))
        x = theirs(x, memory.states, tgt_mask=hidden, memory_key_padding_mask=memory.padding)
    assert torch.allclose(found, model.decoder.norm(x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 9, [9], [4, 1, 4], [2, 7]], ids=str)
def test_words_come_one_by_one_in_pieces_or_all_at_once(model, batch, pieces):
    inputs = batch.inputs[:, :9]
    memory, first = model.encode(batch.query, batch.query_lengths)
    whole, weights, last = model.decode(inputs, first, memory)
    state, found, looked = first, [], []
    for piece in inputs.split(pieces, 1):
        x, seen, state = model.decode(piece, state, memory)
        found.append(x)
        looked.append(seen)
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-5)
    assert torch.allclose(torch.cat(looked, 1), weights, atol=1e-5)
    assert state.hidden.shape == last.hidden.shape == (2 * SETTINGS.layers, len(inputs), 9, SETTINGS.embedding_size)
    assert torch.allclose(state.hidden, last.hidden, atol=1e-5)


def test_no_place_sees_a_later_one(model, batch):
    memory, state = model.encode(batch.query, batch.query_lengths)
    x = torch.randn(len(batch.query), 6, SETTINGS.embedding_size, requires_grad=True)
    found, _, _ = model.decoder(x, state, memory)
    for place in range(6):
        gradient = torch.autograd.grad(found[:, place].sum(), x, retain_graph=True)[0]
        assert (gradient[:, place + 1 :] == 0).all()
        assert gradient[:, : place + 1].any()


@torch.no_grad()
def test_only_the_waves_tell_the_order(model, batch):
    query, lengths = batch.query[:1, : int(batch.query_lengths[0])], batch.query_lengths[:1]
    turned, start = query.flip(1), torch.full((1, 1), SOS)

    def first_words():
        return [model(some, lengths, start) for some in (query, turned)]

    assert not torch.allclose(*first_words(), atol=1e-4)
    with patch("benchmarks.transformer.waves", lambda first, places, size, device: torch.zeros(places, size)):
        assert torch.allclose(*first_words(), atol=1e-5)


def test_waves_tell_distances_and_go_on_for_ever():
    table = waves(0, 200, 32, CPU)
    assert torch.allclose(table[5] @ table[9], table[150] @ table[154], atol=1e-4)
    assert torch.equal(waves(7, 3, 32, CPU), table[7:10])
    assert waves(100_000, 1, 32, CPU).isfinite().all()


def test_half_the_vectors_must_fit_the_heads(prepared):
    with pytest.raises(UserError, match="multiple of 8"):
        new_transformer(SETTINGS.change(embedding_size=20), 50)


def test_it_differs_from_a_seq2seq_in_encoder_and_decoder_alone(model):
    own = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert own == {"embedding", "encoder", "decoder", "output"}
    assert model.output.weight is model.embedding.weight
    optimizer = training.new_optimizer(model, SETTINGS.change(decoder_learning_ratio=3.0))
    counts = [sum(weights.numel() for weights in group["params"]) for group in optimizer.param_groups]
    assert sum(counts) == sum(weights.numel() for weights in model.parameters())
    assert counts[1] == sum(w.numel() for w in [*model.decoder.parameters(), model.output.bias])


@torch.no_grad()
def test_every_decoder_takes_it(model, batch):
    asked = batch.query, batch.query_lengths, 9
    ids = decoding.greedy(model, *asked)
    padded = functional.pad(ids, (0, 9 - ids.size(1)), value=PAD)
    assert torch.equal(decoding.beam_search(model, *asked, beam=1), padded)
    assert torch.equal(decoding.sample(model, *asked, temperature=0), ids)
    likelier = decoding.beam_search(model, *asked, beam=40, length_penalty=0.0)
    score = partial(evaluation.log_probability, model, *asked[:2])
    assert (score(likelier) >= score(ids) - 1e-4).all()
    assert decoding.mmi(model, *asked, candidates=4).size(0) == len(batch.query)
    for row in range(len(ids)):
        alone = decoding.greedy(model, batch.query[row : row + 1], batch.query_lengths[row : row + 1], 9)
        assert torch.equal(functional.pad(alone, (0, 9 - alone.size(1)), value=PAD), padded[row : row + 1])


def test_scripted_and_quantised_it_says_the_same(model, batch):
    asked = batch.query, batch.query_lengths, 9
    assert torch.equal(script(model)(*asked), decoding.greedy(model, *asked))
    assert script(quantised(model))(*asked).size(0) == len(batch.query)


def test_fit_trains_it_and_goes_on_to_the_same_weights(prepared, tmp_path):
    straight, resumed = Run(tmp_path / "straight"), Run(tmp_path / "resumed")

    def interrupt(row):
        if row["update"] == 7:
            raise KeyboardInterrupt

    with patch("helpers.training.new_model", new_transformer), patch("helpers.training.Seq2Seq", new_transformer):
        fit = partial(training.fit, prepared=prepared, settings=SETTINGS, device=CPU, progress_bar=False)
        model = fit(straight)
        with pytest.raises(training.Interrupted):
            fit(resumed, callback=interrupt)
        fit(resumed)
        assert equal(training.Checkpoint.load(resumed.checkpoint), training.Checkpoint.load(straight.checkpoint))
        assert timeless(resumed) == timeless(straight)
        loaded, *rest = training.load_model(straight.checkpoint, CPU)
    assert equal(loaded.state_dict(), model.state_dict())
    bot = Chatbot(loaded, *rest)
    reply = bot.reply("Anna has a red hat and a blue box. What colour is the box?", "greedy")
    assert len(bot.attention(reply)[0]) == len(reply.query)
    assert evaluation.score(loaded, bot.vocabulary, prepared.texts["test"])["pairs"] == len(prepared.splits["test"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_average_of_the_weights_and_16_bits_are_had_too(prepared, precision):
    train, settings = prepared.splits["train"], SETTINGS.change(average=0.9, learning_rate=2e-3)
    model = new_transformer(settings, len(prepared.vocabulary))
    before = evaluate(model, train.first(64)).per_token
    trainer = training.Trainer(model, settings, precision)
    for update in range(30):
        trainer.step(train, torch.arange(64), update)
    for one in (model, trainer.average):
        assert evaluate(one, train.first(64)).per_token < before - 0.5


def test_free_running_training_takes_it(prepared):
    model = new_transformer(SETTINGS, len(prepared.vocabulary))
    total, tokens = evaluation.batch_loss(model, prepared.splits["train"].batch(torch.arange(8)), teacher_forcing=False)
    (total / tokens).backward()
    assert all(weights.grad is not None for weights in model.parameters())


def test_it_learns_to_copy():
    words = Vocabulary(COPY_WORDS)
    train, test = Pairs.from_words(copy_task(3000), words), Pairs.from_words(copy_task(200, seed=2), words)
    settings = Settings(embedding_size=48, hidden_size=96, layers=1, dropout=0.0, learning_rate=3e-3)
    model = new_transformer(settings, len(words))
    trainer = training.Trainer(model, settings)
    for update, indices in enumerate(torch.randint(len(train), (400, 64), generator=torch.Generator().manual_seed(1))):
        trainer.step(train, indices, update)
    replies = replies_of(model.eval(), test, words, 12, decoding.greedy)
    share = sum(reply == query for reply, (query, _) in zip(replies, copy_task(200, seed=2), strict=True)) / 200
    assert share >= 0.8, share


def test_the_profiler_names_its_parts(prepared):
    model, train = new_transformer(SETTINGS, len(prepared.vocabulary)), prepared.splits["train"]
    with profiling.labelled(model):
        prof = profiling.profiled(lambda: evaluation.batch_loss(model, train.batch(torch.arange(8))), CPU, steps=1)
    parts = profiling.part_table(prof, steps=1)
    assert {"embed", "encode", "attend", "decode", "project"} <= set(parts.index)


def test_the_latency_table_takes_it(model, prepared):
    subject = latency.Subject("transformer", model, prepared.splits["test"], 8)
    rows, left_out = latency.table(subject, [1, 4], queries=12, replies=5, compilation=False)
    timed = {row["variant"] for row in rows if "p50 ms" in row}
    assert {"eager", "TorchScript"} <= timed
    assert "TorchScript" not in left_out


def test_silence_is_answered_too(model):
    assert len(decoding.greedy(model, *decoding.silence(3, CPU), 5)) == 3
