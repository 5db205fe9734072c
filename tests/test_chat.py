import io

import pytest

from helpers.chat import NO_WORDS, NOTHING_SAID, Chatbot, chat_box, converse
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
@pytest.mark.parametrize("decoder", ["greedy", "beam", "sampling"])
def test_any_line_gets_an_answer_or_a_kind_word(bot, line, decoder):
    assert bot.reply(line, decoder).text


def test_kind_words_say_what_is_the_matter(bot):
    assert bot.reply(" ").text == NOTHING_SAID
    assert bot.reply("🙂").text == NO_WORDS


def test_a_reply_shows_what_was_understood(bot):
    reply = bot.reply("Hello, ZEBRA!")
    assert reply.query == ["hello", "zebra", "!"]
    assert reply.unknown == ["zebra"]


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


def test_sampling_can_be_repeated(bot):
    assert bot.reply("Hello.", "sampling", seed=3) == bot.reply("Hello.", "sampling", seed=3)


def test_the_box_shows_what_was_said_without_running_it(bot):
    box = chat_box(bot)
    history, (line, decoder) = box.children[0], box.children[1].children
    line.value = "<script>alert(1)</script>"
    assert "<script>" not in history.value
    assert "&lt;script&gt;" in history.value
    assert line.value == ""
    assert decoder.value == "greedy"
