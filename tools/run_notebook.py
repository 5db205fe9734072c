"""Run one notebook with papermill: python tools/run_notebook.py IN.ipynb OUT.ipynb [-p name value …]

What papermill leaves to its caller is done here: a parameter that no notebook has is refused, a value that is the
notebook's own default is not injected again (so a run with defaults equals the committed notebook), and a failure
or a stop names the notebook and the cell in one sentence.
"""

from __future__ import annotations

import argparse
import ast
import logging
import os
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")

import nbformat  # noqa: E402
import papermill  # noqa: E402
import yaml  # noqa: E402
from papermill.clientwrap import PapermillNotebookClient  # noqa: E402
from papermill.engines import NBClientEngine, papermill_engines  # noqa: E402

logging.getLogger("papermill").setLevel(logging.ERROR)  # its own reading of parameters, which ours replaces


def declared(path: Path) -> dict[str, object]:
    """The parameters of a notebook and their defaults: the assignments of the cell tagged `parameters`."""
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assigned = [node for node in ast.parse("\n".join(tagged)).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}


class Watched(NBClientEngine):
    """Papermill's own engine, of which the caller sees the notebook and the kernel while it works."""

    manager = client = None

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, execution_timeout=None, **_):
        cls.manager = nb_man
        cls.client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, timeout=execution_timeout)
        return cls.client.execute()

    @classmethod
    def cell(cls) -> str:
        """The cell at work, or the last one that was."""
        cells = cls.manager.nb.cells if cls.manager else []
        begun = [number for number, cell in enumerate(cells, 1) if cell.metadata.papermill.get("start_time")]
        return f"cell {begun[-1]}" if begun else "its start"

    @classmethod
    def end(cls) -> None:
        """No kernel goes on alone."""
        if cls.client and cls.client.km and cls.client.km.has_kernel:
            os.kill(cls.client.km.provisioner.pid, signal.SIGKILL)


papermill_engines.register("watched", Watched)


def run(source: Path, target: Path, parameters: dict[str, object], timeout: int | None) -> str | None:
    """Execute; returns None, or one sentence on what failed. A KeyboardInterrupt comes at once."""
    notebooks = sorted((ROOT / "notebooks").glob("0*.ipynb"))
    own = declared(source)
    everywhere = set(own).union(*(declared(path) for path in notebooks))
    for name in parameters:
        if name not in everywhere:
            return f"no notebook has a parameter {name!r}; there are: {', '.join(sorted(everywhere))}"
    chosen = {name: value for name, value in parameters.items() if name in own and value != own[name]}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.stem + ".partial.ipynb")
    ended: list[BaseException] = []

    def execute() -> None:
        try:
            papermill.execute_notebook(
                str(source), str(partial), chosen, kernel_name="python3", language="python", engine_name="watched",
                cwd=str(ROOT / "notebooks"), progress_bar=False, execution_timeout=timeout,
            )  # fmt: skip
            partial.replace(target)
        except BaseException as error:
            ended.append(error)

    # In a thread, since nbclient would take the main one's signals, and answers them at length.
    work = threading.Thread(target=execute, daemon=True)
    work.start()
    work.join()
    if not ended:
        return None
    error = ended[0]
    if isinstance(error, papermill.PapermillExecutionError):
        where = f"{partial.name} in {target.parent}"
        return f"cell {error.cell_index + 1} raised {error.ename}: {error.evalue}\nEverything run so far: {where}"
    Watched.end()
    return f"{Watched.cell()}: {error if isinstance(error, OSError) else f'{type(error).__name__}: {error}'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters")
    parser.add_argument("--timeout", type=int, default=None, help="seconds a cell may take")
    options = parser.parse_args()
    try:
        nbformat.read(options.source, as_version=4)
    except Exception as error:
        print(f"{options.source} is not a notebook: {error}", file=sys.stderr)
        return 1
    own = declared(options.source)
    parameters = {  # off is no False where the notebook's own value is a text
        name: value if isinstance(own.get(name), str) else yaml.safe_load(value) for name, value in options.parameters
    }
    try:
        problem = run(options.source, options.target, parameters, options.timeout)
    except KeyboardInterrupt:
        print(f"{options.source.name} stopped in {Watched.cell()}; the next run begins it again", file=sys.stderr)
        Watched.end()
        sys.stderr.flush()
        os._exit(130)  # the thread has nothing more to say
    if problem:
        print(f"{options.source.name} failed: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
