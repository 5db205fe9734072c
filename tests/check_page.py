"""The page of deploy/page.html in real Chromium: what it says is what Python says, and nothing that is typed harms it.

Needs a finished run of the embedded corpus (`make check` gives a copy of one in CHATBOT_RUNS). CHATBOT_SCREENSHOTS=DIR
keeps pictures of the page at the widths of a desk and of a phone.
"""

import copy
import dataclasses
import functools
import html.entities
import http.server
import json
import os
import random
import re
import shutil
import threading
import unicodedata
from pathlib import Path

import pytest
import torch

from helpers.__main__ import main
from helpers.batches import Prepared
from helpers.chat import Chatbot
from helpers.decoding import beam_search, greedy, never_spoken
from helpers.evaluation import score
from helpers.model import new_model
from helpers.run import Run
from helpers.settings import Settings, load_profile
from helpers.text import EOS, SOS, spell
from helpers.text import tokenise as words_of
from helpers.training import Checkpoint, load_model
from tests.check_browser import CHROMIUM, QUIET
from tests.conftest import CPU, TINY
from tests.test_model import SCORES
from tests.test_text import STRANGE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
RUN = Run.named("sample")
OWN = Path(__file__).parent / "own"
COUNT = 300  # held-out queries
tokenise = functools.partial(words_of, marks=load_profile("sample").marks)
ANSWERS = "lines => lines.map(line => { const {text, words} = answer(line); return {text, words}; })"
LIKELIHOOD = """pairs => pairs.map(([query, response]) => {
    const memory = encode(tokenise(query));
    let before = memory.start, sum = 0;
    for (const word of [...tokenise(response), '<eos>']) {
        const next = step(before, memory), id = IDS.get(word);
        sum += next.logs[id] + next.share;
        before = {...next, word: id};
    }
    return sum;
})"""
STEPS = """lines => lines.map(line => answer(line).steps.map(
    ({word, logs, weights}) => ({word, shares: Array.from(logs, Math.exp), weights})))"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Opens the page of a run's copy, some settings of which may be changed; returns it with the copy and, as they
    grow, the addresses that it asked for and what went wrong in it."""
    pages = []

    def open_page(run: Run = RUN, precision: str = "half", changes: dict | None = None, **options):
        folder = tmp_path_factory.mktemp("page")
        shutil.copy(run.checkpoint, folder)
        if run.manifest.exists():
            shutil.copy(run.manifest, folder)
        if changes:
            state = Checkpoint.load(folder / "checkpoint.pt")
            dataclasses.replace(state, settings=state.settings | changes).save(folder / "checkpoint.pt")
        assert main(["page", "--run", str(folder), "--precision", precision]) == 0
        page = browser.new_page(**options)
        pages.append(page)
        page.asked, page.wrong = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda message: page.wrong.append(message.text))
        page.on("dialog", lambda dialog: page.wrong.append(dialog.message) or dialog.dismiss())
        page.goto(Run(folder).page.as_uri())
        page.wait_for_selector("#log .bot")
        page.run = Run(folder)
        return page

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def half(opened):
    return opened()


@pytest.fixture(scope="module")
def held_out():
    return Prepared.load(RUN.data).texts["test"][:COUNT]


def rounded(model, precision):
    """A copy with the weights that a page of this precision holds."""
    model = copy.deepcopy(model)
    for weight in model.parameters():
        if precision == "half" or weight.dim() == 1:
            weight.data = weight.data.half().float()
        else:
            scale = weight.data.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
            weight.data = (weight.data / scale).round() * scale
    return model


@torch.no_grad()
def compare_steps(page, model, bot, lines) -> float:
    """The largest difference between the page's probabilities and a model's, of attention and of all words."""
    largest = 0.0
    for line, steps in zip(lines, page.evaluate(STEPS, lines), strict=True):
        words = [step["word"] for step in steps]
        query, lengths = bot.encode(bot.vocabulary.tokenise(line)[-bot.settings.max_query_words :])
        memory, state = model.encode(query, lengths)
        inputs = torch.tensor([[SOS, *words[:-1]]])
        attentional, weights, _ = model.decode(inputs, state, memory)
        shares = torch.softmax(model.output(attentional)[0] + never_spoken(len(bot.vocabulary), CPU), 1)
        for name, expected in (("shares", shares), ("weights", weights[0])):
            found = torch.tensor([step[name] for step in steps])
            largest = max(largest, (found - expected).abs().max().item())
    return largest


def test_in_half_precision_it_says_what_python_says(half, held_out):
    bot = Chatbot.load(half.run, CPU)
    lines = [query for query, _ in held_out]
    expected = [bot.reply(line, "greedy") for line in lines]
    found = half.evaluate(ANSWERS, lines)
    assert [reply["text"] for reply in found] == [reply.text for reply in expected]
    assert [reply["words"] for reply in found] == [reply.words for reply in expected]
    same, exact = (compare_steps(half, m, bot, lines[:60]) for m in (rounded(bot.model, "half"), bot.model))
    print(f"half: {len(lines)} of {len(lines)} replies, probabilities within {same:.1e} of Python's with its weights")
    print(f"  and to {exact:.1e} of those with the checkpoint's, from which 16 bits take something")
    assert same < 1e-4
    assert exact < 3e-3


def test_in_int8_it_says_much_the_same_with_the_same_perplexity(opened, half, held_out):
    page, bot = opened(precision="int8"), Chatbot.load(half.run, CPU)
    lines = [query for query, _ in held_out]
    same = [
        reply["words"] == bot.reply(line, "greedy").words
        for line, reply in zip(lines, page.evaluate(ANSWERS, lines), strict=True)
    ]
    assert compare_steps(page, rounded(bot.model, "int8"), bot, lines[:60]) < 1e-3
    exact = score(bot.model, bot.vocabulary, held_out)
    tokens = exact["tokens"]
    per_token = {name: -sum(p.evaluate(LIKELIHOOD, held_out)) / tokens for name, p in (("half", half), ("int8", page))}
    perplexity = {name: float(torch.tensor(nll).exp()) for name, nll in per_token.items()}
    print(f"int8: {sum(same)} of {len(same)} replies; perplexity {exact['perplexity']:.5f}, {perplexity}")
    assert sum(same) >= 0.98 * len(same)
    assert perplexity["half"] == pytest.approx(exact["perplexity"], rel=1e-3)
    assert perplexity["int8"] == pytest.approx(exact["perplexity"], rel=1e-2)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("feeding", [False, True])
def test_every_kind_of_model_runs(opened, tmp_path, score, feeding):
    sizes = {"layers": 1 + feeding, "hidden_size": 30 - feeding}
    settings = TINY.change(attention=score, input_feeding=feeding, tie_weights=not feeding, **sizes)
    vocabulary = Prepared.load(RUN.data).vocabulary
    weights = new_model(settings, len(vocabulary)).state_dict()
    parts = {"model": weights, "average": weights, "best_model": weights, "optimizer": {}, "progress": {}}
    state = Checkpoint(settings.to_dict(), vocabulary.to_json(), ["Hello!"], "", "fp32", **parts)
    state.save(tmp_path / "checkpoint.pt")
    page = opened(Run(tmp_path))
    model, *_ = load_model(tmp_path / "checkpoint.pt", CPU)
    for weight in model.parameters():
        weight.data = weight.data.half().float()
    bot = Chatbot(model, vocabulary, settings, [])
    lines = ["Hello!", "Who has the red hat?", "x", "Where is Anna, and what did she buy at the market? Tell me!"]
    assert compare_steps(page, model, bot, lines) < 1e-5
    assert not page.wrong


def test_beams_end_where_pythons_end(half, held_out):
    bot = Chatbot.load(half.run, CPU)
    lines = [query for query, _ in held_out[:100]]
    script = "lines => lines.map(line => wordsOf(beamSearch(encode(tokenise(line))).finished[0].steps))"
    expected = [bot.reply(line, "beam").words for line in lines]
    assert half.evaluate(script, lines) == expected


def test_a_reply_takes_a_moment(half, opened, held_out):
    page = opened()
    first = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    script = """lines => lines.map(line => {
        const began = performance.now();
        answer(line);
        return performance.now() - began;
    })"""
    taken = sorted(half.evaluate(script, [query for query, _ in held_out]))
    print(f"first reply {first:.0f} ms after opening; then {taken[len(taken) // 2]:.1f} ms per reply in the median")
    assert first < 1000
    assert taken[len(taken) // 2] < 30


# Text


def tricky(seed: int) -> str:
    """A text of what tokenisers stumble over, put together by chance."""
    luck = random.Random(seed)
    pieces = [
        "a", "Z", "é", "e\u0301", "İ", "I\u0307", "ı", "ß", "ẞ", "ﬁ", "Σ", "ΟΔΟΣ", "ǅ", "'", "’", "´", "-",
        " ", "  ", "\t", "\u00a0", "\u0085", "\x1c", "\ufeff", "\u200d", "\u200c", "\u200b", "\u00ad",
        "\ufe0f", "\ufe00", "\u0301", "\u0323", "\u0301" * 12, "7", "٣", "²", "½", "Ⅷ", "你", "々", "〇", "ー",
        "ァ", "が", "か\u3099", "ไ", "ก็", "ລາວ", "ខ្មែរ", "မြန်မာ", "한", "한", "क्षि", "की", "مر\u064eحبا",
        "שָׁלוֹם", "ა", "Ა", "Ⴀ", "Ꭰ", "ꭰ", "🙂", "👍🏽", "🏽", "👨\u200d👩\u200d👧", "🇩🇪", "🇩", "❤\ufe0f", "©", "™",
        "‼", "⁉", "1\ufe0f\u20e3", ".", "!", "?", "。", "！", "؟", "।", "¿", "¡", ",", "…", "«", "<b>", "</i >",
        "<br/>", "<u class='x'>", "<1>", "<", ">", "&amp;", "&lt;b&gt;", "&#39;", "&#x41;", "&#0;", "&#1;",
        "&#x110000;", "&nosuch;", "&notit;", "&NewLine;", "&#٣;", "&", ";", "\x00", "\x07", "𝒳", "𐐀", "𞤀",
        "\U000e0061", "\u2028", "ſ", "K", "Å",
    ]  # fmt: skip
    return "".join(luck.choice(pieces) for _ in range(luck.randrange(1, 12)))


def read(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def known(char: str) -> bool:
    """Whether Python knows the character; which browser knows later ones is not ours to say."""
    return unicodedata.category(char) not in ("Cn", "Co", "Cs")


def test_words_are_pythons_in_every_script(half):
    lines = [line for path in sorted(OWN.iterdir()) for line in read(path)]
    assert len(lines) > 200
    lines += [line for line in STRANGE if line.isprintable()] + [tricky(seed) for seed in range(20_000)]
    lines += [f"a&{name}b" for name in html.entities.html5 if name.endswith(";")]
    codes = [code for code in (*range(0x3000), *range(0xD700, 0x10000)) if code < 32 or known(chr(code))]
    lines += [text for code in codes for text in (f"a&#{code};b", f"&#x{code:x};")]
    found = half.evaluate("lines => lines.map(tokenise)", lines)
    wrong = [(line, words, tokenise(line)) for line, words in zip(lines, found, strict=True) if words != tokenise(line)]
    assert not wrong, (len(wrong), wrong[:10])


def test_every_character_that_python_knows_is_read_alike(half):
    """Alone, inside a word, before a mark, and twice."""
    all_known = [char for char in map(chr, range(0x110000)) if known(char)]
    script = "chars => chars.map(char => tokenise(`${char} a${char}B ${char}\\u0301 ${char}${char}`).join(' '))"
    wrong = []
    for start in range(0, len(all_known), 20_000):
        chars = all_known[start : start + 20_000]
        for char, words in zip(chars, half.evaluate(script, chars), strict=True):
            if words != " ".join(tokenise(f"{char} a{char}B {char}\u0301 {char}{char}")):
                wrong.append(f"U+{ord(char):04X} {unicodedata.name(char, '')}")
    print(f"{len(all_known)} characters, {len(wrong)} read otherwise: {wrong[:20]}")
    assert not wrong


def test_replies_are_spelt_as_pythons(half):
    lines = [tokenise(tricky(seed)) for seed in range(5000)]
    spelling = Chatbot.load(half.run, CPU).vocabulary.spelling
    lines += [luck.sample([*spelling, ".", "!", "¿", "?", "i"], 8) for luck in map(random.Random, range(500))]
    lines += [[char] for char in map(chr, range(0x110000)) if known(char) and tokenise(char) == [char]]
    found = half.evaluate("lines => lines.map(spell)", lines)
    compared = [(text, spell(line, spelling)) for text, line in zip(found, lines, strict=True)]
    later = [text for text, expected in compared if text != expected and not known(text[0])]  # of a newer Unicode
    assert [pair for pair in compared if pair[0] != pair[1] and pair[0] not in later] == []
    assert len(later) < 20


# Conversations


def test_it_declines_as_python_does(opened, held_out):
    page = opened(changes={"decline_below": 0.97})
    bot = Chatbot.load(page.run, CPU)
    lines = [line for query, _ in held_out[:60] for line in (query, query.rstrip(" .!?"), f"zebra {query} xylophone")]
    lines += ["", "  ", "«»", "🙂", "?", "zebra", *read(OWN / "german_strange.txt")]
    expected = [bot.reply(line, "greedy") for line in lines]
    found = page.evaluate(ANSWERS, lines)
    assert [reply["text"] for reply in found] == [reply.text for reply in expected]
    declined = sum(not reply.words for reply in expected)
    assert 10 < declined < len(lines) - 10, declined


def test_a_model_with_context_reads_the_line_before(opened, held_out):
    page = opened(changes={"context_words": 3})
    bot, before = Chatbot.load(page.run, CPU), None
    for query, _ in [("Hello!", ""), ("", ""), *held_out[:20]]:
        reply = bot.reply(query, "greedy", before=before)
        words = before.words if before else []
        assert page.evaluate("([line, before]) => answer(line, before).text", [query, words]) == reply.text
        before = reply


HOSTILE = [
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "</script><script>alert(1)</script>",
    "<svg onload=alert(1)>", "javascript:alert(1)", "${alert(1)}", "constructor __proto__ toString",
    "\u202eevil\u202c", "👩‍👩‍👧‍👦" * 500, "a\u0301" * 5000, "a" + "\u0301\u0323" * 20_000, "word " * 20_000,
    "x" * 100_000, "<" * 100_000, "&amp;" * 20_000, "<b " * 33_000, "。" * 100_000, "Zebra? " + "\ud800",
    "\x00\x07", "&#1;" * 25_000,
]  # fmt: skip


def test_hostile_lines_do_no_harm(opened):
    page = opened()
    before = page.evaluate("document.querySelectorAll('script, img, iframe, object, a').length")
    for line in HOSTILE:
        page.evaluate("line => { document.getElementById('line').value = line; }", line)
        page.locator("#ask button").click()
    said = page.locator("#log .you p")
    assert said.count() == len(HOSTILE) + 1
    assert page.locator("#log .bot").count() == len(HOSTILE) + 1
    assert page.evaluate("[...document.querySelectorAll('#log p')].every(p => !p.children.length)")
    assert said.nth(1).inner_text() == HOSTILE[0]
    assert max(len(text) for text in said.all_inner_texts()) < 5000
    assert page.evaluate("document.querySelectorAll('script, img, iframe, object, a').length") == before
    assert not page.wrong
    assert page.asked == [page.run.page.as_uri()]


def test_hostile_lines_are_answered_as_by_python(half):
    bot = Chatbot.load(half.run, CPU)
    lines = [line for line in HOSTILE if "\ud800" not in line]
    expected = [bot.reply(line, "greedy").text for line in lines]
    assert [reply["text"] for reply in half.evaluate(ANSWERS, lines)] == expected


def test_nothing_is_fetched_even_by_what_should_get_in(opened):
    page, asked = opened(), []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        refused = page.evaluate("address => fetch(address, {mode: 'no-cors'}).then(() => false, () => true)", address)
        page.evaluate("""address => {
            for (const [tag, name] of [['img', 'src'], ['script', 'src'], ['iframe', 'src'], ['link', 'href']]) {
                const element = document.createElement(tag);
                if (tag === 'link') element.rel = 'stylesheet';
                element[name] = address + tag;
                document.body.append(element);
            }
            const script = document.createElement('script');
            script.textContent = 'window.ran = true';
            document.body.append(script);
        }""", address)  # fmt: skip
        page.wait_for_timeout(500)
        server.shutdown()
    assert refused
    assert not asked
    assert not page.evaluate("window.ran")
    assert len(page.wrong) >= 5  # each of them is refused with a line on the console


# What is seen


def test_a_click_on_an_alternative_goes_on_from_there(opened):
    page = opened()
    own = page.locator("#reply .word").all_inner_texts()
    assert own == ["the", "box", "is", "blue", ".", "end"]
    assert page.locator("#where").inner_text() == "word 4 of 6"  # the one that it was least sure of
    assert page.locator("#arcs path").count() >= 1
    choices = page.locator("#choices button")
    assert choices.count() == 5
    other = choices.nth(1).locator("span").inner_text()
    choices.nth(1).click()
    assert page.locator("#reply .word").nth(3).inner_text() == other
    assert page.locator("#news").inner_text().startswith(f"What if it had said “{other}”? The box is {other}")
    page.locator("#own").click()
    assert page.locator("#reply .word").all_inner_texts() == own
    assert page.locator("#own").is_hidden()


def test_it_works_by_keyboard_alone(opened):
    page = opened()
    page.keyboard.press("Tab")  # the conversation, which can be scrolled
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "line"
    page.keyboard.type("Hello!")
    page.keyboard.press("Enter")
    assert page.locator("#log .bot").count() == 2
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.parentElement.id") == "reply":
            break
    current = functools.partial(page.evaluate, "select => shown.at")
    page.keyboard.press("Home")
    assert current() == 0
    page.keyboard.press("ArrowRight")
    assert current() == 1
    page.keyboard.press("End")
    assert current() == page.evaluate("shown.steps.length - 1")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Back
    assert current() == page.evaluate("shown.steps.length - 2")
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the second alternative
    assert page.locator("#news").inner_text().startswith("What if")
    assert page.evaluate("document.activeElement.parentElement.id") == "reply", "the focus is not lost"


def test_a_screen_reader_hears_names_for_all_that_can_be_used(opened):
    page = opened()
    page.wait_for_selector("#beam li")
    used = "button, input, [tabindex], [role]:not([role=status]), section, table"
    nameless = page.evaluate("""used => [...document.querySelectorAll(used)].filter(
        e => !e.hidden && !e.ariaLabel && !e.getAttribute('aria-labelledby') && !e.labels?.length
            && !e.textContent.trim()).map(e => e.outerHTML.slice(0, 100))""", used)  # fmt: skip
    assert not nameless
    label = page.locator("#reply .word").nth(3).get_attribute("aria-label")
    assert re.match(r"blue, \d\d%, looks at blue \d+(\.\d)?%", label), label
    assert page.locator("#reply .word[aria-current='step']").count() == 1
    assert page.locator("#matrix tbody tr").count() == 6
    assert page.locator("#matrix thead th[scope='col']").count() == 16


@pytest.mark.parametrize("width", [1200, 390])
def test_it_fits_a_desk_and_a_phone(opened, tmp_path, width):
    folder = Path(os.environ.get("CHATBOT_SCREENSHOTS") or tmp_path)
    for scheme in ("light", "dark"):
        page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.wait_for_selector("#beam li")
        page.locator("#reply .word").nth(3).hover()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=folder / f"page-{width}-{scheme}.png", full_page=True)
        assert page.evaluate("shown.at") == 3


def test_settings_vocabulary_and_licence_are_in_plain_sight(opened, tmp_path):
    page = opened()
    facts = page.locator("#facts").inner_text()
    bot = Chatbot.load(page.run, CPU)
    for told in ("generated by this project", "MIT", f"{len(bot.vocabulary) - 4} words", "half precision"):
        assert told in facts, facts
    assert page.locator("#settings li").count() == len(Settings.model_fields)
    manifest = json.loads(RUN.manifest.read_text(encoding="utf-8"))
    manifest["corpus"] |= {"name": "<script>shop", "source": "/home/xyzzy/<script>shop.tsv"}
    shutil.copy(RUN.checkpoint, tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    page = opened(Run(tmp_path))
    facts = page.locator("#facts").inner_text()
    assert "<script>shop.tsv" in facts
    assert "not recorded: ask whoever gave the text" in facts
    assert "xyzzy" not in page.content()


def test_a_bare_template_says_what_to_do(browser):
    page = browser.new_page()
    page.goto((Path(__file__).resolve().parent.parent / "deploy" / "page.html").as_uri())
    assert "python -m helpers page" in page.locator("#notice").inner_text()
    assert page.locator("main").is_hidden()
    page.close()


def test_greedy_is_what_is_compared(held_out):
    """The page says greedy replies, those of `greedy` with a word more than the longest response."""
    bot = Chatbot.load(RUN, CPU)
    ids = greedy(bot.model, *bot.encode(tokenise(held_out[0][0])), bot.settings.max_response_words + 1)
    assert bot.vocabulary.decode(ids[0].tolist()) == bot.reply(held_out[0][0], "greedy").words
    assert ids[0, -1] == EOS
    best = beam_search(bot.model, *bot.encode(tokenise(held_out[0][0])), bot.settings.max_response_words + 1)
    assert bot.vocabulary.decode(best[0].tolist()) == bot.reply(held_out[0][0], "beam").words
