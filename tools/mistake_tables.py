"""The tables of docs/mistakes.md, from `results/mistakes-*.json`, and the sentences of notebooks 02 to 04 that name a
mistake's price: fills the page's tables in, as tools/readme_tables.py does README's, and prints the sentences.

python -m tools.mistake_tables
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

from benchmarks.mistakes import EDITS, LONG, RECIPE, prices, spread
from helpers.run import ROOT, write_text
from tools.readme_tables import NOTHING, device, filled, measured, table

PAGE = ROOT / "docs" / "mistakes.md"
SCORES = ("dot", "general", "concat")
# The page's sections: the mistakes that are priced in each.
SECTIONS: dict[str, tuple[str, ...]] = {
    "mask": ("no mask", *(f"no mask, random batches, {score}" for score in SCORES), "no mask when answering"),
    "half": ("the wrong half", "both halves, bridged"),
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
    ("films", "the sum of each step's mean"), ("copying", "no shuffling"), ("films", "more updates"),
    ("films", "clip 0 taken literally"),
)  # fmt: skip
FIGURES = {"nats": (3, 1), "exact": (1, 100), "later": (0, 1)}  # digits, and what they are multiplied by


def cost(row: dict, figure: str) -> str:
    """A difference ± its spread, in brackets where that covers 0; a dash where it was not measured."""
    digits, scale = FIGURES[figure]
    mean, width = row.get(figure), row.get(f"{figure} ±")
    if mean is None or mean != mean:
        return "–"
    told = f"{scale * mean:+.{digits}f} ± {scale * width:.{digits}f}"
    return told if abs(mean) > width else f"({told})"


def rows_of(one: dict) -> list[dict]:
    """The rows of `prices`, without what was not measured."""
    return [{key: value for key, value in row.items() if value == value} for row in prices(one).to_dict("records")]


def price(names: tuple[str, ...]) -> str:
    """What some mistakes cost, a row per task and mistake, a table per machine."""
    parts = []
    for name, one in measured("mistakes").items():
        lines = [
            [row["task"], row["mistake"], f"{row['nats, right']:.3f}" if "nats, right" in row else "–",
             cost(row, "nats"), f"{row['exact, right']:.1%}" if "exact, right" in row else "–", cost(row, "exact"),
             cost(row, "later")]
            for row in sorted(rows_of(one), key=lambda row: list(one["tasks"]).index(row["task"]))
            if row["mistake"] in names
        ]  # fmt: skip
        header = ["task", f"mistake ({name})", "nats per token, right", "the mistake adds", "exact, right", "points",
                  "updates later"]  # fmt: skip
        parts.append(table(header, lines))
    return "\n\n".join(parts) or NOTHING


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
    parts = []
    for name, one in measured("mistakes").items():
        lines = []
        for task in one["tasks"]:
            for way in SECTIONS["mask"]:
                runs = [run for run in runs_of(one, task, way) if "alone" in run]
                if runs:
                    lines.append([
                        task, way, f"{mean(runs, 'weight on padding'):.1%}", f"{mean(runs, 'test'):.3f}",
                        f"{mean(runs, 'alone'):.3f}", f"{mean(runs, 'exact'):.1%}", f"{mean(runs, 'exact alone'):.1%}",
                        f"{mean(runs, 'other replies alone'):.1%}",
                    ])  # fmt: skip
        header = ["task", f"trained ({name})", "weight on padding", "nats in company", "nats alone", "exact in company",
                  "exact alone", "replies that change"]  # fmt: skip
        parts.append(table(header, lines))
    return "\n\n".join(parts) or NOTHING


def looks() -> str:
    """The split by exchange: by how much the same held-out exchanges look better, and what unseen movies say."""
    parts = []
    for name, one in measured("mistakes").items():
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
                    cost({"nats": statistics.mean(gains), "nats ±": spread(gains)}, "nats"),
                    cost({"nats": statistics.mean(unseen), "nats ±": spread(unseen)}, "nats"),
                ])  # fmt: skip
        header = ["task", f"updates ({name})", "validation by movie", "by exchange", "looks better by",
                  "on unseen movies"]  # fmt: skip
        parts.append(table(header, lines))
    return "\n\n".join(parts) or NOTHING


def said() -> str:
    """What is said past the end, and how often UNK is."""
    parts = []
    for name, one in measured("mistakes").items():
        lines = []
        for task in one["tasks"]:
            found = [run["answering"] for run in runs_of(one, task, RECIPE)]
            if found:
                ends, unknown = ([run[key] for run in found] for key in ("past the end", "UNK and PAD spoken"))
                lines.append([task, f"{mean(ends, 'words of the right reply'):.1f}", f"{mean(ends, 'words'):.1f}",
                              f"{mean(unknown, 'replies with UNK'):.1%}"])  # fmt: skip
        header = ["task", f"words of a reply ({name})", "past the end", "replies with UNK, if it may be said"]
        parts.append(table(header, lines))
    return "\n\n".join(parts) or NOTHING


TABLES: dict[str, Callable[[], str]] = {"setup": setup, "alone": alone, "looks": looks, "said": said}
TABLES |= {f"price_{name}": partial(price, names) for name, names in SECTIONS.items()}
TABLES |= {
    f"diff_{name}": partial(diff, mistake)
    for name, mistake in {
        "mask": "no mask", "half": "the wrong half", "steps": "the sum of each step's mean",
        "optimisers": "one embedding in two optimisers", "clip": "clip 0 taken literally", "end": "past the end",
        "unknown": "UNK and PAD spoken", "zeros": "SOS fed as zeros", "dropout": "dropout on",
        "shuffling": "no shuffling",
    }.items()
}  # fmt: skip


def main() -> int:
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), TABLES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
