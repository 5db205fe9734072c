"""What is said of the prices of mistakes, from `results/mistakes-*.json`: the tables of docs/mistakes.md, which are
filled in as tools/tables.py does the other pages', and the cells of notebooks 02 to 04 that name a price.

python -m tools.mistake_tables
"""

import statistics
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbformat

from benchmarks.mistakes import ALONE, BRIDGED, EDITS, LONG, RECIPE, SCORES, prices, spread, told, ways
from helpers.run import ROOT, write_text
from tools.tables import NOTHING, device, filled, measured, table

PAGE = ROOT / "docs" / "mistakes.md"
UNMASKED = ("no mask", *(f"no mask, random batches, {score}" for score in SCORES))
# The page's sections: the mistakes that are priced in each.
SECTIONS: dict[str, tuple[str, ...]] = {
    "mask": (*UNMASKED, *(f"{name}{ALONE}" for name in UNMASKED), "no mask when answering"),
    "half": ("the wrong half", BRIDGED),
    "steps": ("the sum of each step's mean",),
    "optimisers": ("one embedding in two optimisers",),
    "clip": ("clip 0 taken literally", "no clip"),
    "split": ("split by exchange",),
    "spoken": ("past the end", "UNK and PAD spoken"),
    "figures": (
        "dropout on", *(f"mean of the batches' perplexities, {how}" for how in ("by length", "at random")),
    ),
    "others": ("no shuffling", "SOS fed as zeros"),
}  # fmt: skip
# Whose curves the page's riddle shows, A to D: a task's way.
RIDDLE = (
    ("movies", "the sum of each step's mean"), ("copying", "no shuffling"), ("movies", "more updates"),
    ("movies", "clip 0 taken literally"),
)  # fmt: skip


def per_machine(header: list[str], rows: Callable[[dict], list[list]]) -> str:
    """A table of `rows` of each machine's results, whose name takes the place of {} in the header."""
    parts = [
        table([name.format(machine) for name in header], rows(one)) for machine, one in measured("mistakes").items()
    ]
    return "\n\n".join(parts) or NOTHING


def price(names: tuple[str, ...]) -> str:
    """What some mistakes cost, a row per task and mistake."""

    def rows(one: dict) -> list[list]:
        found = prices(one)
        return [
            [row["task"], row["mistake"], f"{row['nats, right']:.3f}".replace("nan", "–"), told(row, "nats") or "–",
             f"{row['exact, right']:.1%}".replace("nan%", "–"), told(row, "exact") or "–", told(row, "later") or "–"]
            for row in found[found["mistake"].isin(names)].to_dict("records")
        ]  # fmt: skip

    header = ["task", "mistake ({})", "nats per token, right", "the mistake adds", "exact, right", "points",
              "updates later"]  # fmt: skip
    return per_machine(header, rows)


def diff(name: str) -> str:
    """A mistake's edit of helpers, as it runs."""
    return "```diff\n" + "\n\n".join(edit.diff() for edit in EDITS[name]) + "\n```"


def setup() -> str:
    """What was trained in the right way, and how well."""
    parts = []
    for one in measured("mistakes").values():
        lines = []
        for name, facts in one["tasks"].items():
            settings, least = facts["settings"], facts["least"]
            right = [run for run in one["runs"] if (run["task"], run["way"]) == (name, RECIPE)]
            lines.append([
                name, f"{facts['exchanges']['train']:,}", settings["attention"],
                f"{settings['embedding_size']}, {settings['hidden_size']}", f"{settings['updates']:,}", len(right),
                f"{mean(right, 'test'):.3f}", "unknown" if least is None else f"{least:.3f}",
                f"{mean(right, 'exact'):.1%}",
            ])  # fmt: skip
        header = ["task", "exchanges", "attention", "embedding, hidden", "updates", "seeds", "nats per token",
                  "least possible", "exact replies"]  # fmt: skip
        parts += [table(header, lines), device(one["machine"]) + "."]
    return "\n\n".join(parts) or NOTHING


def mean(runs: list[dict], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def runs_of(one: dict, task: str, way: str) -> list[dict]:
    """The runs of one way in the order of their seeds."""
    found = [run for run in one["runs"] if (run["task"], run["way"]) == (task, way) and "failed" not in run]
    return sorted(found, key=lambda run: run["seed"])


def alone() -> str:
    """Models trained without the mask: in batches as in training, and asked alone."""

    def rows(one: dict) -> list[list]:
        ways = [(task, way, runs_of(one, task, way)) for task in one["tasks"] for way in UNMASKED]
        asked = [(task, way, [run for run in runs if "alone" in run]) for task, way, runs in ways]
        return [
            [task, way, f"{mean(runs, 'weight on padding'):.1%}", f"{mean(runs, 'test'):.3f}",
             f"{mean(runs, 'alone'):.3f}", f"{mean(runs, 'exact'):.1%}", f"{mean(runs, 'exact alone'):.1%}",
             f"{mean(runs, 'other replies alone'):.1%}"]
            for task, way, runs in asked if runs
        ]  # fmt: skip

    header = ["task", "trained ({})", "weight on padding", "nats in company", "nats alone", "exact in company",
              "exact alone", "replies that change"]  # fmt: skip
    return per_machine(header, rows)


def looks() -> str:
    """The split by exchange: by how much the same held-out exchanges look better, and what unseen movies say."""

    def rows(one: dict) -> list[list]:
        lines = []
        for task in one["tasks"]:
            right = runs_of(one, task, LONG) or runs_of(one, task, RECIPE)
            wrong = runs_of(one, task, "split by exchange")
            both = [(a, b) for a in right for b in wrong if a["seed"] == b["seed"]]
            if both:
                best = [[min(point[1] for point in run["curve"]) for run in pair] for pair in both]
                gains, unseen = [b - a for a, b in best], [b["test"] - a["test"] for a, b in both]
                lines.append([
                    task, f"{right[0]['curve'][-1][0]:,}", f"{statistics.mean(a for a, _ in best):.3f}",
                    f"{statistics.mean(b for _, b in best):.3f}",
                    told({"nats": statistics.mean(gains), "nats ±": spread(gains)}, "nats"),
                    told({"nats": statistics.mean(unseen), "nats ±": spread(unseen)}, "nats"),
                ])  # fmt: skip
        return lines

    header = ["task", "updates ({})", "validation by movie", "by exchange", "by exchange it adds", "on unseen movies"]
    return per_machine(header, rows)


def said() -> str:
    """What is said past the end, and how often UNK is."""

    def rows(one: dict) -> list[list]:
        lines = []
        for task in one["tasks"]:
            found = [run["answering"] for run in runs_of(one, task, RECIPE)]
            if found:
                ends, unknown = ([run[key] for run in found] for key in ("past the end", "UNK and PAD spoken"))
                lines.append([task, f"{mean(ends, 'words of the right reply'):.1f}", f"{mean(ends, 'words'):.1f}",
                              f"{mean(unknown, 'replies with UNK'):.1%}"])  # fmt: skip
        return lines

    return per_machine(["task", "words of a reply ({})", "past the end", "replies with UNK, if it may be said"], rows)


def verdict(names: tuple[str, ...]) -> str:
    """A line per mistake: its price in words."""
    lines = []
    for name in names:
        for figure in ("nats", "exact"):
            if text := priced((name,), figure):
                lines.append(f"- *{name}*: {text}.")
                break
    return "\n".join(lines)


PLACES = {"world": "in the embedded world", "copying": "in copying", "movies": "on movies"}
SEEDS = "three"  # the least that any of the results has; a test holds them to it
UNITS = {"nats": " nats per token", "exact": " points of exact replies", "later": " updates"}


def first_machine() -> dict:
    """The results of the first machine: sentences are about one."""
    return next(iter(measured("mistakes").values()))


def listed(parts: list[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def priced(names: tuple[str, ...], figure: str = "nats") -> str:
    """What a mistake costs where the seeds tell, and where they do not; of several names each task's first counts."""
    one, sure, nothing = first_machine(), [], []
    rows = [row for row in prices(one).to_dict("records") if row["mistake"] in names and told(row, figure)]
    rows.sort(key=lambda row: names.index(row["mistake"]))
    for task in one["tasks"]:
        row = next((row for row in rows if row["task"] == task), None)
        if row and told(row, figure)[0] != "(":
            sure.append(f"{told(row, figure)}{UNITS[figure] * (not sure)} {PLACES[task]}")
        elif row:
            nothing.append(PLACES[task])
    parts = [*sure, f"nothing that {SEEDS} seeds tell from 0 {listed(nothing)}" if nothing else ""]
    return "; ".join(filter(None, parts))


def share(task: str, way: str, key: str, mistake: str = "") -> str:
    """A share that the runs of one way have noted, or noted of a mistake when answering: the mean over the seeds."""
    runs = runs_of(first_machine(), task, way)
    return f"{mean([run['answering'][mistake] for run in runs] if mistake else runs, key):.1%}"


# The notebooks' cells of prices by their ids; what stands in braces is a key of `values`.
CELLS = {
    "02_model": {
        "price-half": "**What the wrong half costs:** {half}. {all}",
        "price-mask": """**What the missing mask costs:** in batches of mixed lengths, as in its training, {mask}. The
            damage is in what such a model says alone. {company} {all}""",
    },
    "03_training": {
        "price-steps": "**What the first of them costs:** {steps}. {all}",
        "price-optimisers": "**What the second optimiser costs:** {optimisers}. {all}",
        "price-clip": """**What a limit of 0 costs**, taken literally: {literally}. No clipping at all costs
            {unclipped}. {all}""",
        "price-figures": """**Two ways to get such a figure wrong:** dropout left on while evaluating adds {dropout}.
            And who prints the mean of the batches' perplexities, batches by length, in the place of the perplexity of
            all tokens, prints a loss that differs by {batches}. {all}""",
    },
    "04_decoding_and_chat": {
        "price-end": """**What it costs** to go on past the end: {end}. Where UNK may be said, {unknown} of the greedy
            replies on movies have one. {all}""",
        "price-company": "And without the mask? {company} {all}",
    },
}


def values() -> dict[str, str]:
    """What the cells of CELLS say of the results."""
    mixed = "no mask, random batches, dot"
    alone = [share("copying", mixed, key) for key in ("exact", "exact alone", "other replies alone")]
    clip, figures = SECTIONS["clip"], SECTIONS["figures"]
    return {
        "half": priced(SECTIONS["half"][:1]), "mask": priced(UNMASKED[1:]),
        "company": f"Trained without it, a model copies {alone[0]} of the lines in mixed company and {alone[1]} when "
        f"it is asked alone: {alone[2]} of its replies change. In the embedded world "
        f"{share('world', mixed, 'other replies alone')} do.",
        "steps": priced(SECTIONS["steps"]), "optimisers": priced(SECTIONS["optimisers"]),
        "literally": priced(clip[:1]), "unclipped": priced(clip[1:]), "dropout": priced(figures[:1]),
        "batches": priced(figures[1:2]), "end": priced(SECTIONS["spoken"][:1], "exact"),
        "unknown": share("movies", RECIPE, "replies with UNK", "UNK and PAD spoken"),
        "all": "[All prices](../docs/mistakes.md).",
    }  # fmt: skip


def lengths() -> str:
    """The share of lines that are copied exactly, by their length, for each way to train."""
    asked = ("2", "4", "6", "8", "9", "10", "11", "12", "13", "14", "16")

    def rows(one: dict) -> list[list]:
        there = {way: runs for way in ways(SCORES) if (runs := runs_of(one, "copying", way))}
        return [
            [way, *(f"{statistics.mean(run['kinds'][n] for run in runs):.0%}" for n in asked)]
            for way, runs in there.items()
        ]

    return per_machine(["trained ({})", *asked], rows)


TABLES: dict[str, Callable[[], str]] = {
    "setup": setup, "alone": alone, "looks": looks, "said": said, "lengths": lengths,
}  # fmt: skip
TABLES |= {f"price_{name}": partial(price, names) for name, names in SECTIONS.items()}
TABLES |= {f"verdict_{name}": partial(verdict, names) for name, names in SECTIONS.items()}
TABLES |= {
    f"diff_{name}": partial(diff, mistake)
    for name, mistake in {
        "mask": "no mask", "half": "the wrong half", "steps": "the sum of each step's mean",
        "optimisers": "one embedding in two optimisers", "clip": "clip 0 taken literally", "end": "past the end",
        "unknown": "UNK and PAD spoken", "zeros": "SOS fed as zeros", "dropout": "dropout on",
        "shuffling": "no shuffling",
    }.items()
}  # fmt: skip


def with_prices(path: Path) -> nbformat.NotebookNode:
    """A notebook, its cells of CELLS as `results/` has them now."""
    notebook, texts, found = nbformat.read(path, as_version=4), CELLS[path.stem], values()
    cells = {cell.id: cell for cell in notebook.cells}
    for name, text in texts.items():  # a KeyError where a notebook has lost the cell
        words = text.format(**found).split()
        cells[name].source = "\n".join(textwrap.wrap(" ".join(words), 118, break_on_hyphens=False))
    return notebook


def main() -> int:
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), TABLES))
    for name in CELLS:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        nbformat.write(with_prices(path), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
