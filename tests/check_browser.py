"""A reader's visit: real JupyterLab, real Chromium, notebook 04 run from the top, its chat used by keyboard, and the
page with the bot in its frame.

Works on copies of the notebooks, since JupyterLab saves by itself, and needs a run's checkpoint (`make check` gives a
copy of one in CHATBOT_RUNS). CHATBOT_SCREENSHOT=FILE.png keeps the picture of the chat.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from helpers.run import ROOT, Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LINES = ["Hello!", "Hello, who are you?", "Anna has a red hat and a blue box. What colour is the box?"]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SETTINGS = {
    "notification": {"fetchNews": "false", "checkForUpdates": False},
    "tracker": {"windowingMode": "none"},  # every cell is drawn, wherever the page is scrolled to
}
READY = """() => {
    const app = window.jupyterapp, context = app?.shell.currentWidget?.sessionContext;
    const kernel = context?.isReady && context.session?.kernel;
    return !!kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle'
        && app.commands.hasCommand('notebook:run-all-cells');
}"""

WIDTHS = """all => Promise.all(all.map(async picture => {
    while (!picture.complete || !picture.src) await new Promise(resolve => setTimeout(resolve, 50));
    return picture.naturalWidth;
}))"""

DARKNESS = "all => all.map(one => Number(getComputedStyle(one).backgroundColor.match(/[\\d.]+\\)$/)?.[0].slice(0, -1)))"


@pytest.fixture
def lab(tmp_path):
    """JupyterLab's address, serving copies from a root as `make lab` does, with settings of its own."""
    root = tmp_path / "root"
    for folder in ("benchmarks", "docs", "notebooks", "images", "helpers", "results"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copytree(Run.named("sample").folder, root / "runs" / "sample")
    settings = tmp_path / "settings" / "@jupyterlab"
    for plugin, name in (("apputils-extension", "notification"), ("notebook-extension", "tracker")):
        (settings / plugin).mkdir(parents=True)
        (settings / plugin / f"{name}.jupyterlab-settings").write_text(json.dumps(SETTINGS[name]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "PYTHONPATH": str(ROOT),
        "CHATBOT_RUNS": str(root / "runs"),  # where the server reaches the page that the notebook shows
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               "--IdentityProvider.token=reader", "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    with open(tmp_path / "lab.log", "wb") as log:
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api/status?token=reader", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "lab.log").read_text()[-2000:]
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_reader_runs_the_notebook_and_talks_to_the_bot(lab, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(180_000)
        page.goto(f"{lab}/lab/tree/notebooks/04_decoding_and_chat.ipynb?token=reader")
        page.wait_for_function(READY)
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        line = page.get_by_placeholder("Say something and press Enter")
        line.wait_for()
        chat = page.locator(".jp-OutputArea-output", has=line).last
        turns, opened = page.locator(".chat-bot"), page.locator(".chat-bot details[open] table")
        line.focus()
        for number, text in enumerate(LINES, 1):
            page.keyboard.type(text)  # the line keeps the focus
            page.keyboard.press("Enter")
            expect(turns).to_have_count(number)
        replies, place = turns.all_inner_texts(), line.bounding_box()
        turns.last.locator("summary").focus()
        page.keyboard.press("Space")
        expect(opened).to_have_count(1)
        assert opened.locator("td").count() >= 50, "a cell for every pair of words"
        assert max(opened.locator("td").evaluate_all(DARKNESS)) > 0.5
        assert turns.last.locator("table").evaluate("table => getComputedStyle(table).fontSize") == "12px"
        chat.screenshot(path=os.environ.get("CHATBOT_SCREENSHOT") or tmp_path / "chat.png")
        suggestion = chat.locator(".chat-row button").first
        suggestion.focus()
        page.keyboard.press("Enter")
        expect(turns).to_have_count(4)
        expect(opened).to_have_count(1)  # it stays beside its reply
        assert line.bounding_box() == place, "the line stays where it is, the conversation scrolls above it"
        window = chat.locator(".chat-window")
        assert window.evaluate("one => one.scrollHeight > one.clientHeight && one.scrollTop === 0"), "at its end"
        drawn = []
        chat.locator("select").select_option("sampling")
        for seed in "1", "1", "2":
            chat.get_by_role("button", name="New conversation").press("Enter")
            expect(turns).to_have_count(0)
            chat.locator("input[type=number]").fill(seed)
            chat.locator("input[type=number]").press("Enter")
            line.fill(LINES[0])
            line.press("Enter")
            expect(turns).to_have_count(1)
            drawn.append(turns.inner_text())
        errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
        framed = page.frame_locator("iframe[title='The bot, word by word']")
        in_the_frame = framed.locator("#log .bot button").inner_text()
        browser.close()
    assert [bool(re.fullmatch(r"bot\s+\S.+\s+what it looked at", reply)) for reply in replies] == [True] * 3, replies
    assert drawn[0] == drawn[1], "a seed draws the same reply again"
    assert in_the_frame == "The box is blue."
    assert not errors


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_every_picture_is_seen_and_every_link_leads_somewhere(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        for name in ("02_model", "04_decoding_and_chat"):
            page = browser.new_page()
            page.goto(f"{lab}/lab/tree/notebooks/{name}.ipynb?reset&token=reader")
            page.wait_for_function(READY)
            prose = page.locator(".jp-MarkdownOutput")
            widths = prose.locator("img").evaluate_all(WIDTHS)
            assert widths, name
            assert all(widths), name
            links = prose.locator("a").evaluate_all("all => all.map(a => a.href)")
            files = [link for link in links if link.startswith(f"{lab}/files/")]
            assert files, links
            assert all(page.request.get(link).ok for link in files), files
            page.close()
        browser.close()
