"""Notebooks as HTML pages that need no network: formulas become MathML, which browsers draw by themselves.

python tools/make_pages.py OUTPUT_FOLDER NOTEBOOK.ipynb …

The page with the bot, which notebook 4 shows in a frame, is copied beside them from the run's folder, above the
notebooks'.
"""

import base64
import re
import shutil
import sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

WIDGET = "application/vnd.jupyter.widget-view+json"
IMAGES = Path(__file__).resolve().parent.parent / "images"
# Code in backquotes is left alone; then a formula of its own line, or one in the text.
FORMULA = re.compile(r"(`+[^`]*`+)|\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def with_mathml(markdown: str) -> str:
    """Markdown whose $…$ and $$…$$ are MathML elements."""

    def element(match: re.Match) -> str:
        code, display, inline = match.groups()
        if code:
            return code
        return convert(display, display="block") if display else convert(inline)

    return FORMULA.sub(element, markdown)


def with_pictures(markdown: str) -> str:
    """Markdown whose pictures of ../images are inside it. (nbconvert's embed_images takes MathML apart.)"""

    def embed(match: re.Match) -> str:
        return f"](data:image/png;base64,{base64.b64encode((IMAGES / match[1]).read_bytes()).decode()})"

    return re.sub(r"\]\(\.\./images/(\w+\.png)\)", embed, markdown)


def page(path: Path) -> str:
    """A notebook's page."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            # Links between notebooks lead to the pages beside this one.
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.html)", with_mathml(cell.source))
            cell.source = with_pictures(cell.source).replace("](../docs/bot.html)", "](bot.html)")
        else:  # a page has no kernel, so a slider would be dead, and its text/plain is no reading
            cell.outputs = [shown for shown in cell.get("outputs", []) if WIDGET not in shown.get("data", {})]
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="")
    html = exporter.from_notebook_node(notebook, resources={"metadata": {"name": path.stem}})[0]
    html = re.sub(r'(<iframe[^>]* src=")[^"]*/(bot\.html")', r"\1\2", html)
    # nbconvert's style gives code that is an output the font of prose, in which 120 characters are too wide.
    style = "<style>.jp-RenderedMarkdown .highlight pre { font: 12px/1.4 monospace }</style>"
    return html.replace("</head>", f"{style}</head>", 1)


def main() -> int:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for bot in {path.resolve().parent.parent / "bot.html" for path in map(Path, sys.argv[2:])}:
        if bot.is_file():
            shutil.copy(bot, folder)
    for path in map(Path, sys.argv[2:]):
        (folder / f"{path.stem}.html").write_text(page(path), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
