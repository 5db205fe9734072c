"""README's tables of measured figures, from the files in `results/`: fills them in, or with --check compares.

A table stands in README between `<!-- NAME -->` and `<!-- /NAME -->`; NAME is a function of this file.
"""

import json
import re
import sys

from helpers.run import ROOT, write_text

README = ROOT / "README.md"


def result(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def device(machine: dict) -> str:
    return f"{machine['processor']}, {machine['threads']} threads, PyTorch {machine['torch']}, {machine['time'][:10]}"


def quality() -> str:
    """The classic recipe beside ours."""
    found = result("compare-cornell_excerpt.json")
    rows = []
    for name, model in found["models"].items():
        for decoder, figures in model["decoders"].items():
            rows.append([
                name, f"{model['short']['nats per response']:.1f} ({model['short']['perplexity']:.1f})", decoder,
                f"{figures['commonest share']:.1%}", f"{figures['distinct-2']:.2f}", f"{figures['BLEU']:.2f}",
                f"{figures['mean words']:.1f}",
            ])  # fmt: skip
    header = ["recipe", "nats a response (perplexity)", "decoder", "commonest reply", "distinct-2", "BLEU", "words"]
    return f"""{table(header, rows)}

`make compare CORPUS=…` on an excerpt of the Cornell corpus ({found["corpus"]["lines"]:,} lines): likelihood on
{found["short test exchanges"]:,} short held-out exchanges, replies to {found["queries"]} held-out queries.
{device(found["machine"])}."""


def filled(text: str) -> str:
    """README's text with every table as `results/` has it now."""

    def fill(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


TABLES = {"quality": quality}


def main() -> int:
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("error: README's tables differ from results/; run 'make images'", file=sys.stderr)
        return int(before != after)
    write_text(README, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
