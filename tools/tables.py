"""The tables of measured figures on README and the pages of docs/, from the files in `results/`: fills them in.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; NAME is a function of this file. What is measured on
several machines, in `results/NAME-MACHINE.json`, stands side by side, a column for each machine.
"""

import functools
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable

import pandas as pd
import torch

from benchmarks.bench import compared
from benchmarks.classic import CLASSIC, REPLY, WORDS
from benchmarks.mistakes import BRIDGED, prices, told
from benchmarks.race import summary as of_race
from benchmarks.speedrun import QUICK, TEXTBOOK, best_of, curves_of, time_to
from helpers.model import new_model
from helpers.run import ROOT, write_text
from helpers.sweep import LOSS

PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "mistakes.md"})]
NOTHING = "Not measured yet: see `make help`."


def result(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def measured(name: str) -> dict[str, dict]:
    """The results of one kind by the machine's name, from all the files that there are."""
    found = [result(file.name) for file in sorted((ROOT / "results").glob(f"{name}-*.json"))]
    return {short(one["machine"]): one for one in found}


def short(machine: dict) -> str:
    """A machine's name without what makers add: Intel Xeon, NVIDIA H200."""
    return re.sub(r"\(\w+\)| (CPU|Processor|@).*", "", machine.get("name", machine["processor"])).strip()


def device(machine: dict) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{short(machine)}, {threads}, PyTorch {machine['torch']}, {machine['time'][:10]}"


def devices(found: dict[str, dict]) -> str:
    return "; ".join(device(one["machine"]) for one in found.values()) + "."


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def times(ratio: float) -> str:
    return f"{ratio:.{0 if ratio >= 99.5 else 1 if ratio >= 9.95 else 2}f}×"


def renamed(recipe: str) -> str:
    """A way's name in `results/` as the pages say it: what the files call the textbook is the classic tutorial."""
    return recipe.replace("textbook", "classic tutorial")


def summary() -> str:
    """The classic recipe beside ours, in one table."""
    models = result("compare-cornell_excerpt.json")["models"]
    classic, cornell = models["classic"], models["cornell"]
    nats = [f"{model['short']['nats per response']:.1f}" for model in (classic, cornell)]
    same = [f"{model['decoders'][decoder]['commonest share']:.0%}"
            for model, decoder in ((classic, "greedy"), (cornell, "mmi"), (cornell, "greedy"))]  # fmt: skip
    rows = [
        ["a held-out response, nats (the fewer, the likelier)", *nats],
        ["the commonest of 500 replies", f"{same[0]} (greedy)", f"{same[1]} (*mmi*); {same[2]} (greedy)"],
    ]
    for name, one in measured("speedrun").items():
        curves = curves_of(one)
        best = best_of(curves[TEXTBOOK])
        after = [time_to(curves[recipe], best) for recipe in (TEXTBOOK, QUICK)]
        rows.append([f"from the start to {best:.2f} nats, the classic's best: {name}", *(f"{t:.0f} s" for t in after)])
    rows += [[f"training, words per second: {name}", *trains(one)] for name, one in measured("bench").items()]
    rows += [[f"one reply: {name}", *answers(one)] for name, one in measured("latency").items()]
    return table(["", "classic tutorial", "ours"], rows)


def trains(found: dict) -> list[str]:
    """Target tokens per second of the classic tutorial, and of our fastest way at its batch size and at any."""
    rates = {way: statistics.median(values["tokens"]) for way, values in found["training"].items()}
    textbook = rates.pop("textbook")
    best = max(rates, key=rates.get)
    said = [f"{rates[best]:,.0f}, **{times(rates[best] / textbook)}** ({best})"]
    if larger := found.get("larger batches"):
        best = max(larger, key=lambda way: larger[way]["tokens"])
        said.append(f"**{times(larger[best]['tokens'] / textbook)}** at {best.rpartition(', ')[2]}")
    return [f"{textbook:,.0f}", ", ".join(said)]


def answers(found: dict) -> list[str]:
    """Milliseconds per reply of the classic tutorial and of our fastest way, one query at a time."""
    rows = [row for row in found["rows"] if row["model"].startswith("classic") and row["batch"] == 1 and row["parity"]]
    textbook, fastest = rows[0], min(rows, key=lambda row: row["p50 ms"])
    ours = f"{fastest['p50 ms']:.1f} ms, **{times(fastest['vs textbook'])}** ({fastest['variant']})"
    return [f"{textbook['p50 ms']:.1f} ms", ours]


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
    header = ["recipe", "nats per response (perplexity)", "decoder", "commonest reply", "distinct-2", "BLEU", "words"]
    return f"""{table(header, rows)}

`make compare CORPUS=…` on an excerpt of the Cornell corpus ({found["corpus"]["lines"]:,} lines): likelihood on
{found["short test exchanges"]:,} short held-out exchanges, replies to {found["queries"]} held-out queries.
{device(found["machine"])}."""


def mistakes() -> str:
    """The mistakes that cost most nats per token on movies, and those that cost nothing that the seeds can tell."""
    if not (found := measured("mistakes")):
        return NOTHING
    one = next(iter(found.values()))
    rows = prices(one)
    rows = rows[(rows["task"] == "movies") & rows["nats"].notna() & (rows["mistake"] != BRIDGED)]
    sure = rows[rows["nats"] > rows["nats ±"]].sort_values("nats", ascending=False)
    lines = [
        [row["mistake"], f"{row['nats, right']:.2f}", told(row, "nats"), f"{math.expm1(row['nats']):+.0%}"]
        for row in sure.head(5).to_dict("records")
    ]
    nothing = list(rows[rows["nats"].abs() <= rows["nats ±"]]["mistake"])
    masked = ", *no mask* among them" * ("no mask" in nothing)
    said = f"""Means over {rows["seeds"].max()} seeds ± half of the 95% interval, each against a right way that differs
in nothing else. {len(nothing)} more cost nothing that the seeds can tell{masked}."""
    header = ["mistake, on movies", "nats per token, right", "the mistake adds", "perplexity"]
    return f"""{table(header, lines)}

{textwrap.fill(said, 118)}
{device(one["machine"])}."""


def speedrun() -> str:
    """Seconds to a loss, from the classic tutorial's program to our recipes, and what else was tried."""
    return "\n\n".join(raced(name, one) for name, one in measured("speedrun").items()) or NOTHING


def raced(name: str, found: dict) -> str:
    """One machine's part of it."""
    curves = curves_of(found)
    limits = [best_of(curves[TEXTBOOK]), 18.5, 18.0, 17.5, 17.0]

    def row(recipe: str) -> list[str]:
        lowest = [min(nats for *_, nats in curve) for curve in curves[recipe]]
        spread = f" ({min(lowest):.2f} – {max(lowest):.2f})" * (len(lowest) > 1)
        after = [time_to(curves[recipe], nats) for nats in limits]
        cells = [f"{seconds:.0f} s" if seconds < math.inf else "–" for seconds in after]
        return [renamed(recipe), str(len(lowest)), f"{best_of(curves[recipe]):.2f}{spread}", *cells]

    columns, ours = ["seeds", "best, nats", *(f"to {nats:.2f}" for nats in limits)], [TEXTBOOK, *found["recipes"]]
    parts = [table([name, *columns], [row(recipe) for recipe in curves if recipe in ours])]
    if tried := [row(recipe) for recipe in curves if recipe not in ours]:
        parts.append(table(["one more change of the profile quick", *columns], tried))
    said = f"""Nats per response on {found["exchanges"]} short test exchanges; seconds from the process's start; medians
over the seeds (of nats: lowest – highest); a program is stopped after {found["limit"]} seconds, or
{found["patience"]} after its best; a dash: not reached. {device(found["machine"])}."""
    return "\n\n".join([*parts, textwrap.fill(said, 118, break_long_words=False, break_on_hyphens=False)])


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
    """What moved the validation loss: among Adam's trainings first, then over the whole space."""
    found = result("sweep-excerpt.json")
    everything, adam = (
        {row["parameter"]: row for row in found["importance"][part]} for part in ("all trials", "adam alone")
    )
    sure = {
        row["parameter"]: f"{row['low']:.2f} to {row['high']:.2f}" for row in found["fANOVA interval"]["adam alone"]
    }
    rows = [
        [
            name.replace("_", " "), *([f"{adam[name]['fANOVA']:.2f}", sure[name]] if name in adam else ["–", "–"]),
            *(f"{everything[name][way]:.3f}" for way in ("fANOVA", "PED-ANOVA", "forest")),
        ]
        for name in [*adam, *(name for name in everything if name not in adam)]
    ]  # fmt: skip
    header = ["parameter", "Adam alone: fANOVA", "in 90% of draws", "whole space: fANOVA", "PED-ANOVA", "random forest"]
    return f"""{table(header, rows)}

Measures of importance for the validation loss, each scaled to a sum of 1 (notebook 05 says what each asks), over
{found["states"]["complete"]} random trials of {found["starting point"]["updates"]} updates on an excerpt of the Cornell
corpus: `make sweep CORPUS=…`, `make sweep-worker SWEEP=id`, then
`python -m benchmarks.sweep_report ID --run runs/sweep --results results/sweep-excerpt`. In the columns of Adam alone,
trials that trained to the very same loss count once.
{device(found["machine"])}."""


def recipe() -> str:
    """What the sweep of the whole recipe tried, where its best trials lie, and what moved the loss."""
    found = result("sweep-recipe.json")
    trials = pd.read_csv(ROOT / "results" / "sweep-recipe.csv").nsmallest(5, LOSS)
    measures = {row["parameter"]: row for row in found["importance"]["all trials"]}

    rows = []
    for name, given in found["spec"]["parameters"].items():
        if name not in measures:
            continue
        tried, best, five = given.get("values"), found["best"][name], trials[name]
        if tried:
            cells = [", ".join(map(str, tried)), str(best), ", ".join(map(str, five.unique()))]
        else:
            cells = [f"{given['min']:g} – {given['max']:g}", f"{best:.2g}", f"{five.min():.2g} – {five.max():.2g}"]
        rows.append(
            [name.replace("_", " "), *cells, *(f"{measures[name][way]:.3f}" for way in ("fANOVA", "PED-ANOVA"))]
        )
    header = ["parameter", "tried", "the best trial", "the five best", "fANOVA", "PED-ANOVA"]
    seeds = pd.DataFrame(found["seeds"]).groupby("settings", sort=False)[LOSS].agg(["mean", "min", "max", "count"])
    anew = [
        [name.replace("_", " "), f"{row['mean']:.3f}", f"{row['min']:.3f} – {row['max']:.3f}"]
        for name, row in seeds.iterrows()
    ]
    ended = found["states"]
    told = f"""{ended["complete"]} trials came to their end, {ended["pruned"]} were stopped early. An end is after as
many examples as {found["starting point"]["updates"]} updates of the profile *cornell* see; the starting point is that
profile as it was before. The second table: the loss on validation, in nats per token, over {seeds["count"].min():.0f}
seeds that the sweep did not have. On the test's movies, once: {found["held out"]["test"]:.3f}.
{device(found["machine"])}."""
    tables = table(header, rows), table(["trained anew", "mean", "lowest – highest"], anew)
    return "\n\n".join([*tables, textwrap.fill(told, 118, break_on_hyphens=False)])


def transformer() -> str:
    """GRU and Transformer in each task, on one machine after the other."""
    header = [
        "task",
        "model",
        "layers, rate, dropout",
        "parameters",
        "nats per response",
        "exact",
        "seconds",
        "tokens/s",
    ]
    parts = []
    for found in measured("transformer").values():
        rows = [
            [row["task"], row["model"], f"{row['layers']}, {row['learning rate']:g}, {row['dropout']:g}",
             f"{row['parameters']:,}", f"{row['nats']:.3f} ± {row['±']:.3f}",
             f"{row['exact']:.1%}".replace("nan%", "–"), f"{row['seconds']:.0f}", f"{row['tokens/s']:,.0f}"]
            for row in of_race(found).to_dict("records")
        ]  # fmt: skip
        parts.append(f"{table(header, rows)}\n\n{device(found['machine'])}.")
    return "\n\n".join(parts) or NOTHING


def profile() -> str:
    """The parts of a training step, stepwise and whole-sequence."""
    if not (found := measured("profile")):
        return NOTHING

    def cell(one: dict, part: str) -> str:
        before, after = one["before"].get(part, {}).get("ms"), one["after"][part]["ms"]
        return f"{before or 0:.{1 if after > 0.1 else 2}f} → {after:.{1 if after > 0.1 else 2}f}"

    rows, whole = [], ["**whole step**"]
    for part in dict.fromkeys(part for one in found.values() for part in one["after"]):
        rows.append([part])
        for one in found.values():
            rows[-1] += [cell(one, part), one["after"][part]["bound by"]] if part in one["after"] else ["", ""]
    for one in found.values():
        whole += ["{before:.0f} → {after:.0f}".format(**one["milliseconds"]), ""]
    header = ["part", *(name for machine in found for name in (f"{machine}: ms", "bound by"))]
    settings = next(iter(found.values()))["settings"]
    size = f"{settings['hidden_size']} units and {settings['layers']} layers in {settings['precision']}"
    peaks = "; ".join(
        f"{name} {one['peaks']['GFLOP/s']:,.0f} GFLOP/s and {one['peaks']['GB/s']:,.0f} GB/s"
        for name, one in found.items()
    )
    return f"""{table(header, [*rows, whole])}

Milliseconds stepwise → as a whole sequence. On a GPU a part's are its kernels' time, the whole step's the clock's: the
rest is the price of launching them one by one. `make profile RUN=classic`, on a model of {size}
(`python -m helpers train --run runs/classic --corpus … --profile classic --set updates=1 precision=fp32`).
Peaks measured in the same run: {peaks}. {devices(found)}"""


def bench() -> str:
    """This project against the classic tutorial's way."""
    if not (found := measured("bench")):
        return NOTHING
    tables = {name: compared(one) for name, one in found.items()}
    larger = {name: one["larger batches"] for name, one in found.items() if "larger batches" in one}

    def cell(rows, measurement: str) -> str:
        if measurement not in rows.index:
            return ""
        row = rows.loc[measurement]
        digits = 1 if row["ours"] < 1000 else 0
        share = f", {row['share of peak']:.1%} of peak" if row["share of peak"] > 0 else ""
        spread = f" ({row['low']:.2f} – {row['high']:.2f})" if row["low"] < row["high"] else ""
        return f"{row['textbook']:,.{digits}f} → {row['ours']:,.{digits}f}, **{times(row['ratio'])}**{spread}{share}"

    names = dict.fromkeys(name for rows in tables.values() for name in rows.index)
    rows = [[name, *(cell(one, name) for one in tables.values())] for name in names]
    scale = "; ".join(
        f"{name} " + ", ".join(f"{at['lines']:,} lines in {at['seconds']:.1f} s" for at in one["scale"])
        for name, one in found.items() if "scale" in one
    )  # fmt: skip
    peaks = "; ".join(
        f"{name} " + ", ".join(f"{value:,.0f} {unit}" for unit, value in one["peaks"].items())
        for name, one in found.items()
    )
    parts = [table(["measured", *tables], rows)]
    for name, ways in larger.items():
        textbook = statistics.median(found[name]["training"]["textbook"]["tokens"])
        lines = {}
        for way, one in ways.items():
            kind, _, batch = way.rpartition(", ")
            told = f"{one['tokens']:,.0f}, **{times(one['tokens'] / textbook)}**, {one['device MB'] / 1e3:.1f} GB"
            lines.setdefault(kind, {})[batch] = told
        batches = list(dict.fromkeys(batch for line in lines.values() for batch in line))
        rows = [[kind, *(line.get(batch, "") for batch in batches)] for kind, line in lines.items()]
        parts += [f"{name}, larger batches: target tokens/s, times the tutorial's at batch 64, memory of the device",
                  table(["training", *batches], rows)]  # fmt: skip
    parts.append(f"""Medians over the rounds of one run in which both ways take turns: the classic tutorial → ours,
their ratio and the rounds' ratios; *of peak* is the share of the measured matrix peak, *graphs* is each update as a
CUDA graph. An empty cell was not measured. Time to prepare generated corpora: {scale}.
Measured peaks: {peaks}.
`make bench`, on a GPU `make gpu`. {devices(found)}""")
    return "\n\n".join(parts)


@functools.cache
def numbers_read() -> int:
    """How many weights a step of the classic model's decoder reads: GRUs, combination and output matrix."""
    with torch.device("meta"):
        model = new_model(CLASSIC, WORDS)
    return sum(weights.numel() for part in (model.decoder, model.output) for weights in part.parameters())


def least_milliseconds(way: str, copied: float) -> float:
    """What a reply of the classic model takes at least at batch 1, if reading weights is all there is to do.

    Each of its steps reads the decoder's weights once: 4 bytes a number, in bf16 2 and in int8 1. The encoder and all
    that is no weight is left out. `copied` are the machine's GB/s of a large copy, which count what is read and what is
    written alike; reading alone at that rate is the best that this figure allows.
    """
    size = {"bf16": 2, "int8": 1}.get(way.rpartition(" ")[2], 4)
    return 1e3 * REPLY * numbers_read() * size / (copied * 1e9)


def latency() -> str:
    """Every way of answering at the classic size: milliseconds per reply, times the tutorial's, share of the limit."""
    if not (found := measured("latency")):
        return NOTHING
    limits = measured("bench")
    rows = {
        (name, row["variant"], row["batch"]): row
        for name, one in found.items() for row in one["rows"] if row["model"].startswith("classic")
    }  # fmt: skip
    ways = dict.fromkeys([way for _, way, _ in rows] + [way for one in found.values() for way in one["left out"]])

    def cell(name: str, way: str, size: int) -> str:
        if (name, way, size) not in rows:
            return absent(found[name], way)
        row = rows[name, way, size]
        if not row.get("p50 ms"):
            return "failed parity"
        said = f"{row['p50 ms']:.{2 if row['p50 ms'] >= 0.1 else 3}f} ({times(row['vs textbook'])}"
        if size == 1 and name in limits:
            share = least_milliseconds(way, limits[name]["peaks"]["copy GB/s"]) / row["p50 ms"]
            said += f", {share:.{0 if share >= 0.095 else 1}%}"
        return said + ")"

    lines = [[renamed(way), *(cell(name, way, size) for name in found for size in (1, 64))] for way in ways]
    header = ["way", *(f"{name}, batch {size}" for name in found for size in (1, 64))]
    left = "; ".join(
        f"{way} on the {name}: {why}" for name, one in found.items() for way, why in one["left out"].items()
        if absent(one, way) == "left out"
    )  # fmt: skip
    compared = ", ".join(f"{one['rows'][0]['compared']} ({name})" for name, one in found.items())
    copies = ", ".join(f"{name} {limits[name]['peaks']['copy GB/s']:,.0f}" for name in found if name in limits)
    return f"""{table(header, lines)}

Median milliseconds per reply of the classic model ({CLASSIC.hidden_size} units, {CLASSIC.layers} layers, {WORDS:,}
words, replies of {REPLY} words) and, in brackets, how many times as fast as the *classic tutorial*, which answers one
query at a time and always goes on to the longest reply. The percentage is the share of the machine's limit: at batch 1
each step reads the decoder's {numbers_read() / 1e6:.1f} million weights once (4 bytes each, 2 in bf16, 1 in int8),
at the rate of a large copy at best: in GB/s, read and written counted alike, {copies}.
The encoder is left out; weights that stay in a cache may be read faster than that. Every way was first compared with
eager on held-out queries: {compared}. A dash: that machine cannot.{f" Left out: {left}." if left else ""}
`make latency RUN=name`; other sizes, the run's own model, the 95th percentiles and parity are in `results/` and in
notebook 07. {devices(found)}"""


def absent(found: dict, way: str) -> str:
    """Why a machine has no figure for a way: it cannot, nobody asked for it, or it was tried and left out."""
    reason = found["left out"].get(way, "")
    cannot = any(why in reason for why in ("are for CPUs", "works on a CPU", "not installed"))
    if (found["machine"]["device"] == "cpu" and way.startswith("CUDA")) or cannot:
        return "–"
    return "left out" if reason and "not asked for" not in reason else "not measured"


def gpu() -> str:
    """What was checked on a GPU, and what was not."""
    if not (ROOT / "results" / "gpu-cuda.json").is_file():
        return "Not measured on a GPU yet: `make gpu` measures everything in one call of minutes."
    found = result("gpu-cuda.json")
    checks, trained = found.get("checks", {}), found.get("training", {})
    bits = [value for name, value in checks.items() if name.endswith("bit for bit")]
    losses = [value for name, value in checks.items() if name.endswith("from the CPU's")]
    replies = [value for name, value in checks.items() if "replies equal" in name and not name.endswith("seconds")]
    failed = [name for name, value in checks.items() if value is False or str(value).startswith("FAILED")]
    said = []
    if losses and replies and not failed:
        equal = min(value[search] for value in replies for search in ("greedy", "beam"))
        said.append(f"""the losses of three updates are within {max(losses):.0e} of the CPU's;
{equal:.0%} of the greedy and beam replies are the CPU's; the same training twice, and with CUDA graphs or without, ends
with the same weights bit for bit ({sum(bits)} of {len(bits)} comparisons in fp32, TF32 and bf16)""")
    said += [f"failed: {name}" for name in failed]
    if "seconds" in trained:
        facts, progress = trained["manifest"], trained["manifest"]["progress"]
        said.append(f"""the corpus {facts["corpus"]["name"]} trained by the command, {progress["update"]:,} updates in
{facts["precision"]}, in {trained["seconds"]:.0f} s to a validation loss of {progress["best_loss"]:.2f}""")
    names = {
        "resume": "going on after a kill", "notebooks": "notebooks 03, 04, 06 and 07 as a whole",
        "compile": "`torch.compile`, AOTInductor and compiled cells in CUDA graphs",
    }  # fmt: skip
    missing = [names.get(stage, stage) for stage, how in found["stages"].items() if not how.startswith("done")]
    rest = f"\nNot measured there: {'; '.join(missing)}." if missing else ""
    return f"{device(found['facts']['machine'])}: {'; '.join(said)}.{rest}"


def filled(text: str, tables: dict[str, Callable[[], str]] | None = None) -> str:
    """A page's text with every table as `results/` has it now; the tables are those below unless others are given."""

    def fill(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{(tables or TABLES)[match[1]]()}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


TABLES = {
    function.__name__: function
    for function in (
        summary,
        speedrun,
        quality,
        replies,
        mistakes,
        sweep,
        recipe,
        transformer,
        profile,
        bench,
        latency,
        gpu,
    )
}


def main() -> None:
    for page in PAGES:
        write_text(page, filled(page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
