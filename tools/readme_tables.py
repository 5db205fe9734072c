"""README's tables of measured figures, from the files in `results/`: fills them in, or with --check compares.

A table stands in README between `<!-- NAME -->` and `<!-- /NAME -->`; NAME is a function of this file. What is measured
on a device, in `results/NAME-DEVICE.json`, gets one table a device.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable

from benchmarks.bench import compared
from helpers.run import ROOT, write_text

README = ROOT / "README.md"


def result(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def device(machine: dict) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine.get('name', machine['processor'])}, {threads}, PyTorch {machine['torch']}, {machine['time'][:10]}"


def summary() -> str:
    """The figure of each table that a visitor asks for first."""
    models = result("compare-cornell_excerpt.json")["models"]
    classic, cornell = models["classic"], models["cornell"]
    nats = [f"{model['short']['nats per response']:.1f}" for model in (classic, cornell)]
    same = [f"{model['decoders'][decoder]['commonest share']:.0%}"
            for model, decoder in ((cornell, "mmi"), (classic, "greedy"), (cornell, "greedy"))]  # fmt: skip
    tokens = {way: statistics.median(rates["tokens"]) for way, rates in result("bench-cpu.json")["training"].items()}
    faster = {way: f"{tokens[way] / tokens['textbook']:.2f}" for way in ("fp32", "bf16")}
    rows = result("latency-cpu.json")["rows"]
    classics = [row for row in rows if row["model"].startswith("classic") and row["batch"] == 1 and row["parity"]]
    textbook, fastest = classics[0], min(classics, key=lambda row: row["p50 ms"])
    first = result("sweep-excerpt.json")["importance"]["all trials"][0]
    explained = first["correlation"] ** 2
    return f"""- **Talks better**: a held-out response costs {nats[1]} nats, the classic recipe's model {nats[0]}.
  Of 500 replies the commonest makes up {same[0]} with our decoder, *mmi*, and {same[1]} with the classic's, greedy
  search (with which ours would have {same[2]}).
- **Trains faster** than the textbook way: {faster["fp32"]}× in fp32 and {faster["bf16"]}× in bf16 on a CPU.
- **Answers faster**: {fastest["p50 ms"]:.1f} ms a reply with {fastest["variant"]} at the classic size, the textbook way
  {textbook["p50 ms"]:.1f} ms ({fastest["vs textbook"]:.1f}×).
- **What mattered** in the sweep: the {first["parameter"]}, which explains {explained:.0%} of the loss's variance."""


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


def replies() -> str:
    """What the two models answer, good and bad, to queries that we wrote ourselves."""
    models = result("compare-cornell_excerpt.json")["models"]
    columns = {"classic": "greedy", "cornell": "mmi"}
    rows = [
        [query, *(models[name]["replies"][query][decoder] for name, decoder in columns.items())]
        for query in models["cornell"]["replies"]
    ]
    return table(["query", *(f"{name}, {decoder}" for name, decoder in columns.items())], rows)


def sweep() -> str:
    """What moved the validation loss."""
    found = result("sweep-excerpt.json")
    everything, adam = (
        {row["parameter"]: row for row in found["importance"][part]} for part in ("all trials", "adam alone")
    )
    ways = ("fANOVA", "PED-ANOVA", "forest")
    rows = [
        [
            name.replace("_", " "),
            *(f"{everything[name][way]:.3f}" for way in ways),
            f"{adam[name]['fANOVA']:.2f}" if name in adam else "",
        ]
        for name in everything
    ]
    header = ["parameter", "fANOVA", "PED-ANOVA", "random forest", "fANOVA, Adam alone"]
    return f"""{table(header, rows)}

Three measures of importance for the validation loss, each scaled to a sum of 1 (notebook 05 says what each asks), over
{found["states"]["complete"]} random trials of {found["starting point"]["updates"]} updates on an excerpt of the Cornell
corpus: `make sweep CORPUS=…`, `make sweep-worker SWEEP=id`, then
`python -m benchmarks.sweep_report ID --run runs/sweep --results results/sweep-excerpt`. In the last column,
Adam's trials that trained to the very same loss count once; notebook 05 says how sure its shares are.
{device(found["machine"])}."""


def profile(found: dict) -> str:
    """The parts of a training step, stepwise and whole-sequence."""
    before, after = found["before"], found["after"]
    rows = [
        [part, f"{before[part]['ms']:.1f}" if part in before else "", f"{row['ms']:.1f}", row["bound by"]]
        for part, row in after.items()
    ]
    total = found["milliseconds"]
    rows.append(["**whole step**", f"{total['before']:.0f}", f"{total['after']:.0f}", ""])
    settings = found["settings"]
    size = f"{settings['hidden_size']} units and {settings['layers']} layers in {settings['precision']}"
    peaks = f"{found['peaks']['GFLOP/s']:.0f} GFLOP/s and {found['peaks']['GB/s']:.0f} GB/s"
    return f"""{table(["part", "stepwise ms", "whole sequence ms", "bound by"], rows)}

`make profile RUN=classic`, on a model of {size} (`python -m helpers train --run runs/classic
--corpus … --profile classic --set updates=1 precision=fp32`). Peaks measured in the same run: {peaks}.
{device(found["machine"])}."""


def bench(found: dict) -> str:
    """This project against the textbook way."""
    rows = [
        [
            name, f"{row['textbook']:,.1f}", f"{row['ours']:,.1f}", f"{row['ratio']:.2f}",
            f"{row['low']:.2f} – {row['high']:.2f}", f"{row['share of peak']:.0%}" if row["share of peak"] > 0 else "",
        ]
        for name, row in compared(found).iterrows()
    ]  # fmt: skip
    header = ["measured", "textbook", "ours", "ratio", "from – to", "of the matrix peak"]
    scale = [f"{at['lines']:,} lines in {at['seconds']:.1f} s and {at['MB']:,.0f} MB" for at in found["scale"]]
    peaks = ", ".join(f"{value:,.0f} {unit}" for unit, value in found["peaks"].items())
    return f"""{table(header, rows)}

Medians over the rounds of one run in which both ways take turns, their ratio, and the rounds' ratios. Generated
corpora are prepared at {"; ".join(scale)}. Measured peaks of this machine: {peaks}.
`make bench`, {found["seconds"] / 60:.0f} minutes. {device(found["machine"])}."""


def latency(found: dict) -> str:
    """Every way of answering: median milliseconds a reply, and how many times as fast as the textbook's."""
    cells = {(row["model"], row["variant"], row["batch"]): row for row in found["rows"]}
    models, ways, sizes = (list(dict.fromkeys(key[i] for key in cells)) for i in range(3))

    def cell(*key: str | int) -> str:
        if key not in cells:
            return "left out"
        row = cells[key]
        return f"{row['p50 ms']:.2f} ({row['vs textbook']:.1f}×)" if row.get("p50 ms") else "failed parity"

    rows = [[model, way, *(cell(model, way, size) for size in sizes)] for model in models for way in ways]
    header = ["model", "way", *(f"batch {size}" for size in sizes)]
    left = "; ".join(f"{name}: {why}" for name, why in found["left out"].items())
    compared = found["rows"][0]["compared"]
    return f"""{table(header, rows)}

Median milliseconds a reply and, in brackets, how many times as fast as the textbook; *run's* is the bot of the first
table, *classic* a model of the tutorial's size that says ten words; *textbook* answers one query at a time and always
goes on to the longest reply. Every way was first compared with eager on {compared} held-out queries. Left out:
{left}.
`make latency RUN=name`; the 95th percentiles, replies a second and parity are in `results/` and in
notebook 07. {device(found["machine"])}."""


def filled(text: str) -> str:
    """README's text with every table as `results/` has it now."""

    def fill(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


def on_every_device(function: Callable[[dict], str]) -> Callable[[], str]:
    files = sorted((ROOT / "results").glob(f"{function.__name__}-*.json"))
    return lambda: "\n\n".join(function(result(file.name)) for file in files)


TABLES = {function.__name__: function for function in (summary, quality, replies, sweep)}
TABLES |= {function.__name__: on_every_device(function) for function in (profile, bench, latency)}


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
