"""The house itself: import directions, notebooks, dependency lists."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

import helpers
from helpers.run import ROOT

# The rooms of the house from floor to roof, as `helpers/__init__.py` names them; each imports only those above it.
GROUND = [
    "__init__", "settings", "run", "tracking", "text", "corpus", "batches", "model", "evaluation", "training",
    "decoding", "chat",
]  # fmt: skip
STUDIES = ["sweep", "importance", "profiling", "deploy", "latency"]
FACES = ["plots", "__main__"]
PLAN = [line.split()[0] for line in (helpers.__doc__ or "").splitlines() if line.startswith("    ")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
SOLUTIONS = ROOT / "notebooks" / "solutions.ipynb"
sys.path.insert(0, str(ROOT / "tools"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("helpers"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "helpers").glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    for name in imported(path):
        assert PLAN.index(name) < PLAN.index(path.stem), f"{path.stem} imports {name}"
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (benchmarks|tools|tests)\b", text, re.MULTILINE), "helpers stand alone"


def test_the_plan_of_the_house_names_every_room_once():
    rooms = {path.stem for path in (ROOT / "helpers").glob("*.py")}
    assert sorted(PLAN) == sorted(rooms - {"__init__"}) == sorted({*GROUND, *STUDIES, *FACES} - {"__init__"})


@pytest.mark.parametrize(
    ("rooms", "most"),
    [(GROUND, 2400), (STUDIES, 1060), (FACES, 480), (GROUND + STUDIES + FACES, 3700)],
    ids=["chapters 01 to 04 with their ground", "the studies of 05 to 07", "commands and pictures", "all of helpers"],
)
def test_the_package_stays_small(rooms, most):
    lines = {room: len((ROOT / "helpers" / f"{room}.py").read_text(encoding="utf-8").splitlines()) for room in rooms}
    assert sum(lines.values()) <= most, lines


def test_there_are_eight_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(1, 9)]


def prose(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("path", [*NOTEBOOKS, SOLUTIONS], ids=lambda path: path.stem)
def test_a_notebook_is_whole(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert "papermill" not in json.dumps(notebook.metadata), "run 'make outputs'"
    assert all(cell.execution_count for cell in code), "run 'make outputs'"
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            text = json.dumps(output)
            assert "Warning" not in text
            assert "was trained with other" not in text, "remove runs/sample, then run 'make outputs'"
            assert str(ROOT) not in text
            assert "/home/" not in text
        assert len(cell.source.splitlines()) <= 25, cell.source
    text = prose(path)
    for part in ("**Time to run**", "**Needs**"):
        assert part in text
    for part in ("**You will learn**", "## Summary", "## Exercises"):
        assert part in text or path == SOLUTIONS
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / link).is_file(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_exercise_has_a_solution(path):
    number = int(path.stem[:2])
    exercises = re.findall(rf"^### {number}\.(\d) (●+) (.*)", prose(path).partition("## Exercises")[2], re.MULTILINE)
    solved = re.findall(rf"^### {number}\.(\d) (.*)", prose(SOLUTIONS), re.MULTILINE)
    assert [level for _, level, _ in exercises] == ["●", "●●", "●●●"]
    assert solved == [(place, title) for place, _, title in exercises]


def test_a_parameter_that_no_notebook_has_is_refused(tmp_path):
    from run_notebook import declared, run

    assert declared(NOTEBOOKS[0])["corpus"] == "sample"
    problem = run(NOTEBOOKS[0], tmp_path / "out.ipynb", {"corpuss": "sample"}, None)
    assert "corpuss" in problem
    assert "corpus" in problem
    assert not (tmp_path / "out.ipynb").exists()


def test_a_parameter_keeps_its_type(tmp_path):
    notebook = nbformat.v4.new_notebook()
    tagged = nbformat.v4.new_code_cell('tracking = "offline"')
    tagged.metadata.tags = ["parameters"]
    notebook.cells = [tagged, nbformat.v4.new_code_cell('assert tracking == "off"')]
    source = tmp_path / "typed.ipynb"
    nbformat.write(notebook, source)
    command = [
        sys.executable,
        ROOT / "tools" / "run_notebook.py",
        source,
        tmp_path / "out.ipynb",
        "-p",
        "tracking",
        "off",
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_failing_notebook_is_named_with_its_cell(tmp_path):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell("one"), nbformat.v4.new_code_cell("1 / 0")]
    source = tmp_path / "broken.ipynb"
    nbformat.write(notebook, source)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_notebook.py", source, tmp_path / "out" / "broken.ipynb"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "broken.ipynb failed: cell 2 raised ZeroDivisionError" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_notebook_without_its_input_says_which_one_makes_it(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_notebook.py", NOTEBOOKS[3], tmp_path / "out.ipynb"],
        capture_output=True, text=True, check=False, env=os.environ | {"CHATBOT_RUNS": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "01_data_preparation" in done.stderr
    assert "Traceback" not in done.stderr


def test_pages_show_formulas_without_a_network():
    from make_pages import page, with_mathml

    assert with_mathml("`$x$` is $x$").startswith("`$x$` is <math")
    text = page(ROOT / "notebooks" / "02_model.ipynb")
    assert "../images" not in text  # pictures are inside the page
    assert text.count("<math") > 5
    assert "\\frac" not in text
    assert "MathJax.js" not in text
    assert 'href="03_training.html"' in text
    assert 'href="solutions.html"' in text


def test_the_page_with_the_bot_lies_beside_the_pages(tmp_path, monkeypatch):
    import make_pages

    shown = nbformat.v4.new_code_cell("1", execution_count=1)
    frame = '<iframe width="100%" height="720" src="../../anywhere/bot.html" title="The bot"></iframe>'
    slider = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "VBox(children=…"}
    shown.outputs = [
        nbformat.v4.new_output("display_data", {"text/html": frame, "text/plain": "a frame"}),
        nbformat.v4.new_output("display_data", slider),
    ]
    linked = nbformat.v4.new_markdown_cell("Here is [the page](../docs/bot.html).")
    path = tmp_path / "notebooks" / "04.ipynb"
    path.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[shown, linked]), path)
    (tmp_path / "bot.html").write_text("the bot")
    monkeypatch.setattr(sys, "argv", ["make_pages.py", str(tmp_path / "html"), str(path)])
    assert make_pages.main() == 0
    text = (tmp_path / "html" / "04.html").read_text(encoding="utf-8")
    assert 'src="bot.html"' in text
    assert 'href="bot.html"' in text
    assert "VBox" not in text, "a page shows no widget that nobody can move"
    assert (tmp_path / "html" / "bot.html").read_text() == "the bot"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The project's results in a folder of the test's own: `results(name)` reads one, `results(name, new)` writes."""
    from tools import tables

    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.setattr(tables, "ROOT", tmp_path)

    def file(name, new=None):
        path = tmp_path / "results" / name
        if new is not None:
            path.write_text(json.dumps(new))
        return json.loads(path.read_text())

    file.folder = tmp_path / "results"
    return file


def test_readme_hides_no_way_that_failed_or_was_left_out(results):
    from tools.tables import latency

    found = results("latency-cpu-amd.json")
    untimed = {"identical": 9, "compared": 10, "parity": False}
    rows = [row | untimed if row["variant"] == "TorchScript int8" else row for row in found["rows"]]
    rows = [{key: value for key, value in row.items() if row["parity"] or key != "p50 ms"} for row in rows]
    rows = [row for row in rows if (row["variant"], row["model"][:7]) != ("AOTInductor", "classic")]
    left_out = found["left out"] | {"AOTInductor": "RuntimeError: no compiler"}
    results("latency-cpu-amd.json", found | {"rows": rows, "left out": left_out})
    for path in results.folder.glob("latency-*.json"):
        if "amd" not in path.name:
            path.unlink()
    text = latency()
    assert "| TorchScript int8 | failed parity | failed parity |" in text
    assert "| AOTInductor | left out | left out |" in text
    assert "RuntimeError: no compiler" in text
    assert "| CUDA graphs | – | – |" in text  # a CPU cannot
    results("latency-cpu-amd.json", found | {"left out": {"C++": "CMake is not installed (cmake)"}})
    assert "| C++ | – | – |" in latency()


def test_machines_stand_side_by_side_and_what_nobody_measured_says_so(results):
    from tools.tables import TABLES, latency

    found = results("latency-cpu-amd.json")
    other = found | {
        "machine": found["machine"] | {"name": "NVIDIA H1", "device": "cuda"},
        "rows": [row for row in found["rows"] if row["variant"] != "torch.compile"],
        "left out": {"torch.compile": "compilation was not asked for"},
    }
    results("latency-cuda.json", other)
    lines = latency().splitlines()
    assert "NVIDIA H1, batch 1" in lines[0]
    row = next(line for line in lines if line.startswith("| torch.compile |"))
    assert row.endswith("| not measured | not measured |")
    for path in results.folder.glob("*-c*-*.json"):
        path.unlink()
    for path in results.folder.glob("*-cuda.json"):
        path.unlink()
    for name in ("bench", "latency", "profile", "gpu"):
        assert TABLES[name]().startswith("Not measured")


def test_the_share_of_the_limit_is_what_reading_the_weights_takes_at_least():
    from tools.tables import least_milliseconds, numbers_read

    grus = 2 * (3 * 500 * (500 + 500) + 2 * 1500)
    assert numbers_read() == grus + (1000 * 500 + 500) + (500 * 7800 + 7800)
    assert least_milliseconds("eager", 40.0) == pytest.approx(1e3 * 10 * 4 * numbers_read() / 40e9)
    assert least_milliseconds("CUDA graphs bf16", 40.0) == least_milliseconds("eager", 80.0)
    assert least_milliseconds("TorchScript int8", 40.0) == least_milliseconds("eager", 160.0)


def test_the_packages_ask_for_what_they_import():
    named = {"sklearn": "scikit-learn", "yaml": "PyYAML", "IPython": "ipython"}
    imports = set()
    for path in [*(ROOT / "helpers").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imports |= {name.partition(".")[0] for name in names if name}
    foreign = imports - set(sys.stdlib_module_names) - {"helpers", "benchmarks"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(named.get(name, name) for name in foreign) == sorted(project["dependencies"])


def test_conda_and_pip_read_the_same_list():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert {"pip": ["-r requirements.txt"]} in environment["dependencies"]
    assert (ROOT / "requirements.txt").read_text().split() == ["-c", "constraints.txt", "-r", "requirements.in"]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    for line in (ROOT / "requirements.in").read_text().splitlines():
        name = line.split("#")[0].strip().split("==")[0].lower()
        assert not name or name in pinned, name
