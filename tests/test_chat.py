import dataclasses
import html
import io
import re

import pytest
import torch

from helpers.__main__ import converse
from helpers.chat import NO_WORDS, NOTHING_SAID, Chatbot, Reply
from helpers.decoding import beam_search, greedy, mmi, sample
from helpers.plots import chat_box
from helpers.settings import UserError
from tests.conftest import CPU


@pytest.fixture(scope="module")
def bot(trained):
    return Chatbot.load(trained, CPU)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "   ",
        "\n",
        "🙂🙂",
        "?!",
        "...",
        "zebra xylophone",
        "\x00\x01",
        "\u202eabc",
        "\ud800",
        "a" * 10_000,
        "word " * 10_000,
        "¿Qué?",
    ],
)
@pytest.mark.parametrize("decoder", ["mmi", "greedy", "beam", "sampling"])
def test_any_line_gets_an_answer_or_a_kind_word(bot, line, decoder):
    assert bot.reply(line, decoder).text


def test_kind_words_say_what_is_the_matter(bot):
    assert bot.reply(" ").text == NOTHING_SAID
    assert bot.reply("«»").text == NO_WORDS


def test_a_reply_shows_what_was_understood(bot):
    reply = bot.reply("Hello, ZEBRA!")
    assert reply.query == ["hello", "zebra", "!"]


def test_an_unknown_decoder_is_refused(bot):
    with pytest.raises(UserError, match="sampling"):
        bot.reply("Hello", "magic")


def test_attention_has_a_row_a_word_and_a_column_a_word(bot):
    reply = bot.reply("Hello, how are you?")
    query, said, weights = bot.attention(reply)
    assert weights.shape == (len(said), len(query)) == (len(reply.words) + 1, len(reply.query))


def test_a_conversation_is_a_line_in_and_a_line_out_until_quit(bot):
    out = io.StringIO()
    converse(bot, ["Hello.", "", "/quit", "never read"], out)
    assert len(out.getvalue().splitlines()) == 2


@pytest.mark.parametrize("decoder", ["mmi", "sampling"])
def test_drawn_replies_can_be_repeated(bot, decoder):
    assert bot.reply("Hello.", decoder, seed=3) == bot.reply("Hello.", decoder, seed=3)
    assert len({bot.reply("Hello.", decoder, seed=seed).text for seed in range(8)}) > 1


def test_mmi_is_recommended_where_the_model_was_trained_for_it_and_else_refused(bot):
    assert bot.reply("Hello.") == bot.reply("Hello.", "mmi")
    other = dataclasses.replace(bot, settings=bot.settings.change(query_dropout=0.0))
    assert other.reply("Hello.") == other.reply("Hello.", "greedy")
    with pytest.raises(UserError, match="query_dropout"):
        other.reply("Hello.", "mmi")
    assert list(bot.decoders()) == ["mmi", "greedy", "beam", "sampling"]
    assert list(other.decoders()) == ["greedy", "beam", "sampling"]


def test_the_decoders_are_what_the_names_say(bot, prepared):
    batch = prepared.splits["test"].batch(torch.arange(5))
    for name, search in bot.decoders(seed=3, temperature=0.5).items():
        given = (bot.model, batch.query, batch.query_lengths, 8)
        assert torch.equal(search(*given), bot.search(name, 3, 0.5)(*given))
        expected = {
            "mmi": lambda given: mmi(*given, seed=3), "greedy": lambda given: greedy(*given),
            "beam": lambda given: beam_search(*given, beam=5),
            "sampling": lambda given: sample(*given, temperature=0.5, top_p=0.9, seed=3),
        }  # fmt: skip
        assert torch.equal(search(*given), expected[name](given)), name


def test_attention_of_the_last_reply_in_a_terminal(bot):
    out = io.StringIO()
    converse(bot, ["/attention", "Hello, how are you?", "/attention"], out)
    first, _, columns, *rows = out.getvalue().splitlines()
    assert "no reply" in first
    assert columns.split() == bot.reply("Hello, how are you?").query
    assert len(rows) == len(bot.reply("Hello, how are you?", seed=1).words) + 1
    assert all(98 <= sum(map(int, row.split()[1:])) <= 102 for row in rows)


def test_raw_words_on_request(bot):
    out = io.StringIO()
    converse(bot, ["Hello."], out, raw=True)
    assert out.getvalue().split() == bot.reply("Hello.").words


def parts(box):
    """The turns, the line, the suggestions, and decoder, seed, temperature and the button for a new conversation."""
    _, window, line, suggestions, controls = box.children
    return window.children[0], line, suggestions.children, controls.children


def test_the_box_shows_what_was_said_without_running_it(bot):
    turns, line, _, (decoder, *_) = parts(chat_box(bot))
    line.value = "<script>alert(1)</script>"
    said = turns.children[0].value
    assert "<script>" not in said
    assert "&lt;script&gt;" in said
    assert line.value == ""
    assert decoder.value == next(iter(bot.decoders()))


def test_what_a_reply_looked_at_stays_with_it(bot):
    turns, line, _, _ = parts(chat_box(bot))
    line.value = "Hello there."
    first, reply = turns.children[0], bot.reply("Hello there.")
    query, words, weights = bot.attention(reply)
    assert re.findall("<th>(.*?)</th>", first.value) == ["", *map(html.escape, [*query, *words])]
    shares = [float(share) for share in re.findall(r"rgba\(0,114,178,([\d.]+)\)", first.value)]
    assert shares == pytest.approx(weights.flatten().tolist(), abs=0.006)
    line.value = " "  # no words, so there is nothing to look at
    assert turns.children[0] is first
    assert "<table>" not in turns.children[1].value


def test_the_box_begins_anew_and_repeats_itself_by_its_seed(bot):
    turns, line, _, (decoder, seed, temperature, anew) = parts(chat_box(bot))
    assert temperature.disabled
    decoder.value, seed.value, temperature.value = "sampling", 5, 1.5
    assert not temperature.disabled
    line.value, expected = "Hello there.", bot.reply("Hello there.", "sampling", 5, 1.5)
    assert html.escape(expected.text) in turns.children[0].value
    anew.click()
    assert turns.children == ()


def test_suggestions_stand_below_the_line_and_are_said_at_a_click(bot):
    turns, _, suggestions, _ = parts(chat_box(bot))
    assert [button.description for button in suggestions] == bot.examples
    suggestions[0].click()
    assert bot.reply(bot.examples[0]).text in html.unescape(turns.children[0].value)


def test_a_model_with_context_reads_the_line_before(bot):
    said = Reply("Well, how are you?", ["well", "how", "are", "you", "?"], [])
    assert bot.reply("Hello.", before=said) == bot.reply("Hello.")
    reader = dataclasses.replace(bot, settings=bot.settings.change(context_words=3))
    assert reader.reply("Hello.", before=said).query == ["are", "you", "?", "<eos>", "hello", "."]
    assert reader.reply("Hello.", before=reader.reply("🙈\u200b")).query[-2:] == ["hello", "."]
    assert reader.reply("Hello.", before=reader.reply("")).query == ["hello", "."], "its kind words are not context"
