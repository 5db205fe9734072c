"""README and the pages of docs/: their tables, links and commands, and what stands beside them for visitors and CI."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from helpers.run import ROOT
from tools.tables import PAGES, TABLES, filled

README = ROOT / "README.md"
sys.path.insert(0, str(ROOT / "tools"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, "run 'make images'"


def test_every_table_has_its_place():
    marked = {name for page in PAGES for name in re.findall(r"<!-- (\w+) -->", page.read_text(encoding="utf-8"))}
    assert marked == set(TABLES)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_leads_to_every_page():
    text = README.read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_commands_exist(page):
    import series

    text = page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    for target in re.findall(r"^(?:[A-Z_]+=\S+ )*make ([a-z][a-z-]*)", code, re.MULTILINE):
        assert target in series.TARGETS, target
    for module in re.findall(r"(?:python|python3) -m ([a-z_.]+)", code):
        assert importlib.util.find_spec(module), module
    for command in re.findall(r"-m (?:-- )?helpers ([a-z]+)", code):
        assert command in ("train", "score", "chat", "latency", "page"), command


def test_readme_fits_a_screen_or_three():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_what_moves_is_light():
    assert (ROOT / "images" / "attention.gif").stat().st_size < 500_000


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "license", "version"} <= set(citation)
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_make_test(path):
    workflow = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # which leaves the key `on` a word
    assert {"name", "on", "permissions", "jobs"} <= set(workflow)
    for job in workflow["jobs"].values():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert job["steps"][-1]["run"] == "make test"


def test_ci_tries_pull_requests_on_the_oldest_and_the_newest_python_and_goes_on_by_itself():
    workflows = [yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) for path in WORKFLOWS]
    asked = [one for one in workflows if "pull_request" in one["on"]]
    versions = {version for one in asked for job in one["jobs"].values()
                for version in job["strategy"]["matrix"]["python"]}  # fmt: skip
    assert versions == {"3.11", "3.14"}
    assert any(part["cron"] for one in workflows if "schedule" in one["on"] for part in one["on"]["schedule"])


def test_the_pages_tell_the_blind_judging_as_it_came_out():
    verdicts = json.loads((ROOT / "results" / "judging-cornell_excerpt.json").read_text(encoding="utf-8"))["verdicts"]
    counts = {bot: Counter(one for row in rows.values() for one in row) for bot, rows in verdicts.items()}
    classic, ours = counts["classic greedy"], counts["cornell mmi"]
    assert classic.total() == ours.total() == 90
    fits = f"{classic['fits']} of 90 by the classic one, {ours['fits']} by *mmi*"
    assert fits in " ".join(README.read_text(encoding="utf-8").split())
    told = f"{classic['fits']} of the classic's were *fits* and {classic['nonsense']} *nonsense*, of *mmi*'s"
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    assert f"{told} {ours['fits']} and {ours['nonsense']}" in page
    notebook = json.loads((ROOT / "notebooks" / "04_decoding_and_chat.ipynb").read_text(encoding="utf-8"))
    told = " ".join("".join(cell["source"]) for cell in notebook["cells"]).replace("\n", " ")
    assert f"({ours['fits']} in ninety against {classic['fits']})" in told
    assert f"({ours['nonsense']} against {classic['nonsense']})" in told
    assert f"fits {counts['cornell sampling']['fits']} times in ninety" in told
    assert all(0.75 < counts[f"cornell {way}"]["safe"] / 90 < 0.86 for way in ("greedy", "beam"))  # four in five
    models = json.loads((ROOT / "results" / "compare-cornell_excerpt.json").read_text(encoding="utf-8"))["models"]
    same = [f"{models[name]['decoders']['greedy']['commonest share']:.0%}" for name in ("cornell", "classic")]
    assert f"one and the same reply to {same[0]} of the 500 test queries, on the classic one to {same[1]}" in told


def test_no_result_tells_where_things_lay_on_the_machine():
    for path in (ROOT / "results").glob("*.json"):
        assert not re.search(r'"(/|[A-Z]:\\)', path.read_text(encoding="utf-8")), path.name
