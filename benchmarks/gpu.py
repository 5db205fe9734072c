"""Everything that a GPU can be asked, in one call of minutes, in stages of falling worth.

    python -m benchmarks.gpu --corpus PATH --budget 530 --out DIR    # what `make gpu` calls

Each stage is a process of its own with its own limit, so that neither a fault nor a slow compiler takes the others
along, and what it has found is written at once: DIR/gpu-cuda.json (facts, checks, training, exact resume and how each
stage ended), bench-, latency- and profile-cuda.json, and log.txt. PyTorch and what trains a model is all it needs; with
`--device cpu` every stage runs small, to see that it will work.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import unittest.mock
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import bench, classic
from benchmarks.textbook import textbook_greedy
from helpers import decoding, latency
from helpers.batches import BucketedSampler, Pairs, Prepared
from helpers.deploy import load_scripted, save_scripted, script
from helpers.evaluation import evaluate
from helpers.model import Seq2Seq, new_model
from helpers.run import ROOT, Run, choose_device, machine, write_json
from helpers.settings import Settings, UserError, command_line, load_profile
from helpers.training import Trainer, load_model

# Of how many seconds a stage may take, in order of worth.
LIMITS = {
    "facts": 30, "checks": 60, "training": 60, "latency": 100, "bench": 100, "profile": 60, "resume": 70,
    "notebooks": 60, "compile": 120,
}  # fmt: skip
SIZES = (1, 64, 8)  # replies asked for at once
LARGER = (512, 2048, 8192)  # batches, beside 64


class Stage:
    """What a stage works with: device, corpus and size; and the one file that it fills."""

    def __init__(self, stage: str, device: str, corpus: str, out: Path) -> None:
        self.stage, self.device, self.corpus, self.out = stage, choose_device(device), corpus, out
        self.small = self.device.type == "cpu"
        self.run = Run(out / "run")
        self.found: dict = {}

    def note(self, **facts) -> None:
        """Keep what was found, on disk at once, and say it."""
        self.found |= facts
        write_json(self.out / f"stage-{self.stage}.json", self.found)
        for name, value in facts.items():
            if not isinstance(value, list) and len(str(value)) < 1000:
                print(f"{time.strftime('%X')} {self.stage}, {name}: {value}", flush=True)

    def check(self, name: str, work: Callable[[], object]) -> None:
        """Note what `work` returns, or how it failed, and go on."""
        begun = time.perf_counter()
        try:
            said = work()
        except Exception as error:
            traceback.print_exc()
            said = f"FAILED: {repr(error)[:200]}"
        self.note(**{name: said, f"{name}, seconds": round(time.perf_counter() - begun, 1)})

    def profile(self, name: str, **changes) -> Settings:
        """A profile's settings, small where this is only a rehearsal."""
        sizes = {"hidden_size": 32, "embedding_size": 32} if self.small else {}
        return load_profile(name).change(**sizes | changes)

    def train(self, run: Run, profile: str, *changes: str) -> None:
        """The command that trains, as a user would call it."""
        sizes = ["hidden_size=32", "embedding_size=32", "updates=20", "validate_every=10"] if self.small else []
        command = [sys.executable, "-m", "helpers", "train", "--corpus", self.corpus, "--run", str(run.folder)]
        command += ["--profile", profile, "--device", str(self.device), "--fresh", "--set", *sizes, *changes]
        subprocess.run(command, check=True)


def facts(here: Stage) -> None:
    """Versions, device, and what it does at best."""
    here.note(machine=machine(here.device), peaks=bench.peaks(here.device))


def checks(here: Stage) -> None:
    """Every path against the CPU, and against itself."""
    pairs, _, vocabulary = bench.made_up_dialogue(512 if here.small else 2048)
    there, device = pairs.to(here.device), here.device

    def trained(profile: str, where: torch.device, data: Pairs, updates: int, precision: str = "fp32", **changes):
        settings = here.profile(profile, **changes)
        model = new_model(settings, len(vocabulary)).to(where).train()
        trainer = Trainer(model, settings, precision)
        batches = BucketedSampler(data, settings.batch_size, 1).epoch(0)[:2]
        return model, [trainer.step(data, batches[update % 2], update)["loss"] for update in range(updates)]

    def same(one: Seq2Seq, other: Seq2Seq) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    exact = {"dropout": 0.0, "word_dropout": 0.0, "query_dropout": 0.0}
    for profile in ("classic", "cornell"):
        for feeding in (False, True):

            def losses(profile=profile, feeding=feeding) -> float:
                cpu = torch.device("cpu")
                both = [trained(profile, where, data, 3, **exact, input_feeding=feeding)[1]
                        for where, data in ((cpu, pairs), (device, there))]  # fmt: skip
                return max(abs(a - b) for a, b in zip(*both, strict=True))

            here.check(
                f"{profile}{', input feeding' * feeding}: largest difference of three losses from the CPU's", losses
            )
        for precision in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"):

            def twice(profile=profile, precision=precision) -> bool:
                return same(*(trained(profile, device, there, 8, precision)[0] for _ in range(2)))

            def recorded(profile=profile, precision=precision) -> bool:
                kinds = (False, True)
                return same(*(trained(profile, device, there, 8, precision, cuda_graphs=kind)[0] for kind in kinds))

            here.check(f"{profile}, {precision}: twice the same, bit for bit", twice)
            here.check(f"{profile}, {precision}: as CUDA graphs the same, bit for bit", recorded)

        def decoders(profile=profile) -> dict:
            model = trained(profile, device, there, 5 if here.small else 100)[0].eval().requires_grad_(False)
            on_cpu, few = copy.deepcopy(model).cpu(), pairs.first(64)
            equal = {}
            for name, search in {"greedy": decoding.greedy, "beam": decoding.beam_search}.items():
                ids = [latency.answers(lambda *given, m=m, s=search: s(m, *given), data, 10)
                       for m, data in ((on_cpu, few), (model, few.to(device)))]  # fmt: skip
                equal[name] = float((ids[0] == ids[1].cpu()).all(1).float().mean())
            batch = there.batch(torch.arange(8))
            for name, search in {"sampling": decoding.sample, "mmi": decoding.mmi}.items():
                equal[f"{name}, shape"] = list(search(model, batch.query, batch.query_lengths, 10).shape)
            equal["loss"] = abs(evaluate(model, there).per_token - evaluate(on_cpu, pairs).per_token)
            return equal

        here.check(f"{profile}: replies equal to the CPU's, difference in loss", decoders)

        def warned(profile=profile) -> list[str]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = trained(profile, device, there, 2, "bf16")[0].eval()
                batch = there.batch(torch.arange(4))
                decoding.greedy(copy.deepcopy(model).to(device), batch.query, batch.query_lengths, 3)
                path = here.out / "scripted.pt"
                about = {"vocabulary": json.loads(vocabulary.to_json()), "settings": here.profile(profile).to_dict()}
                save_scripted(path, script(copy.deepcopy(model).cpu()), about)
                load_scripted(path, device)[0](batch.query, batch.query_lengths, 3)
            return sorted({str(warning.message)[:150] for warning in caught})

        here.check(f"{profile}: warnings in bf16, of a copy, of a file scripted on a CPU", warned)


def training(here: Stage) -> None:
    """The corpus trained with the profile cornell, by the command; then its likelihood on held-out exchanges."""
    begun = time.perf_counter()
    here.train(here.run, "sample" if here.corpus == "sample" else "cornell")
    here.note(seconds=round(time.perf_counter() - begun, 1), manifest=here.run.facts())
    model = load_model(here.run.checkpoint, here.device)[0]
    test = Prepared.load(here.run.data).splits["test"].to(here.device)
    likelihood = evaluate(model, test)
    here.note(test={"nats per response": likelihood.per_response, "perplexity": likelihood.perplexity})
    rows = [row for row in here.run.read_metrics() if "validation_loss" in row]
    seconds = [row["seconds"] for row in here.run.read_metrics() if "seconds" in row]
    here.note(validations=rows, updates=len(seconds), median_ms=1e3 * sorted(seconds)[len(seconds) // 2])


def tables(here: Stage, compilation: bool) -> None:
    """The latency table of the run's model and the classic one, kept after each; with compilers, where minutes go into
    a single size, the classic one's alone, size by size."""
    data = Prepared.load(here.run.data)
    if here.small:
        classic.UPDATES = 3
    plans = [(classic.classic(data, here.device), SIZES)]
    if compilation:
        plans = [(plans[0][0], SIZES[:1]), (plans[0][0], SIZES[1:2])]
    else:
        model, vocabulary, settings, _ = load_model(here.run.checkpoint, here.device)
        name = f"run's: {settings.hidden_size} hidden, {settings.layers} layer(s), {len(vocabulary):,} words"
        test = data.splits["test"].to(here.device)
        plans.append((latency.Subject(name, model, test, settings.max_response_words + 1, textbook_greedy), SIZES))
    rows, left_out = [], {}
    for subject, sizes in plans[: 1 if here.small and compilation else 2]:
        sizes = list(sizes[: 1 if here.small else 3])
        more, missing = latency.table(subject, sizes, 16 if here.small else 256, 5 if here.small else 100, compilation)
        rows, left_out = rows + more, left_out | missing
        here.note(**{"machine": machine(here.device), "left out": left_out, "rows": rows})
        for row in more:
            columns = ("model", "variant", "batch", "p50 ms", "vs eager", "vs textbook", "parity")
            print([row.get(column) for column in columns], flush=True)


def both_ways(here: Stage) -> None:
    """Training beside the classic tutorial's, both in turns, then larger batches; replies."""
    if here.small:
        bench.WORDS, bench.UPDATES = 100, 2
    worker = bench.Worker(here.device, 256 if here.small else 65_536)
    here.note(machine=machine(here.device), peaks=bench.peaks(here.device))
    ways = ["textbook", "fp32", "tf32", "bf16", "fp32, graphs", "tf32, graphs", "bf16, graphs"]
    if here.small:
        ways = ["textbook", "fp32", "bf16"]
    rounds = {way: {"tokens": [], "flops": []} for way in ways}
    for _ in range(2 if here.small else bench.ROUNDS):
        for way, values in rounds.items():
            tokens, flops = worker.train(way)
            values["tokens"].append(tokens)
            values["flops"].append(flops)
    here.note(training=rounds)
    here.check("replies", lambda: bench.replies(here.device))
    larger: dict = {}
    worker.updates.clear()
    for size in () if here.small else LARGER:
        for way in ways[4:]:
            torch.cuda.reset_peak_memory_stats()
            tokens, flops = max(worker.train(f"{way}, batch {size}") for _ in range(2))
            larger[f"{way}, batch {size}"] = {
                "tokens": tokens, "flops": flops, "device MB": torch.cuda.max_memory_allocated() / 1e6,
            }  # fmt: skip
            worker.updates.clear()
            here.note(**{"larger batches": larger})
            print(f"{way}, batch {size}: {tokens:,.0f}", flush=True)


def resume(here: Stage) -> None:
    """Twice the same training, and one killed midway and resumed: are the weights equal, bit for bit?"""
    for graphs in ("false", "true"):
        weights = {}
        for name in ("whole", "again", "killed"):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "helpers", "train", "--corpus", "sample", "--run", folder]
                command += ["--profile", "sample", "--device", str(here.device)]
                changes = [f"cuda_graphs={graphs}", "updates=200", "validate_every=50"]
                if here.small:
                    changes += ["hidden_size=16", "embedding_size=16"]
                process = subprocess.Popen([*command, "--fresh", "--set", *changes])
                checkpoint = Run(folder).checkpoint
                while name == "killed" and process.poll() is None and not checkpoint.exists():
                    time.sleep(0.02)
                if name == "killed":
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    subprocess.run([*command, "--resume", "--set", *changes], check=True)
                elif process.wait():
                    raise UserError("the training failed: see the log")
                weights[name] = torch.load(checkpoint, weights_only=True, map_location="cpu")["model"]
        whole = weights.pop("whole")
        for name, others in weights.items():
            equal = all(torch.equal(whole[key], others[key]) for key in whole)
            here.note(**{f"graphs {graphs}: whole and {name} equal, bit for bit": equal})
        if here.small:
            break


def cells(notebook: str, **parameters) -> None:
    """A notebook's code down to its exercises in this process, where there is no Jupyter; nothing is shown."""

    class Shown(str):
        """What a notebook would show: Markdown, HTML, …"""

    def shows(*things, **how) -> types.SimpleNamespace:
        return types.SimpleNamespace(update=shows)

    display = types.SimpleNamespace(display=shows, Markdown=Shown, HTML=Shown, IFrame=shows)
    stubs = {
        "IPython": types.SimpleNamespace(get_ipython=lambda: None, version_info=(9, 0), display=display),
        "IPython.display": display,
        "ipywidgets": unittest.mock.MagicMock(),  # sliders that nobody moves
    }
    names = {"display": shows, "__name__": "__main__"}
    path = next((ROOT / "notebooks").glob(f"{notebook}*.ipynb"))
    sys.modules.update(stubs)  # in this stage's own process
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if "## Exercises" in source.splitlines():
            break
        if cell["cell_type"] == "code" and not re.search(r"^\s*[!%]", source, re.MULTILINE):
            exec(compile(source, path.name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= parameters


def profile(here: Stage) -> None:
    """Notebook 06 on a model of the classic size."""
    run = Run.named("classic")
    here.train(run, "classic", "updates=2", "validate_every=1", "precision=fp32")
    cells("06", run="classic", device=str(here.device))
    here.note(**json.loads((run.folder / "profile.json").read_text(encoding="utf-8")))


def notebooks(here: Stage) -> None:
    """The notebooks whose code meets the device, on the embedded corpus. (On a CPU `make run-all` runs them all.)"""
    if here.small:
        return
    here.corpus = "sample"
    here.train(Run.named("gpu"), "sample", "updates=1")  # for its data
    for name in ("03", "04", "06", "07"):
        parameters = {"run": "gpu", "device": str(here.device)} | (
            {"tracking": "off", "resume": False} if name == "03" else {}
        )
        here.check(name, lambda name=name, parameters=parameters: cells(name, **parameters))


STAGES: dict[str, Callable[[Stage], None]] = {
    "facts": facts, "checks": checks, "training": training, "latency": lambda here: tables(here, False),
    "bench": both_ways, "profile": profile, "resume": resume, "notebooks": notebooks,
    "compile": lambda here: tables(here, True),
}  # fmt: skip


def in_order(options: argparse.Namespace) -> dict:
    """Run the stages while there is time; return how each ended."""
    begun, ended, out, kind = time.monotonic(), {}, options.out, options.device.partition(":")[0]
    environment = os.environ | {"CHATBOT_RUNS": str(out / "runs"), "MPLBACKEND": "agg", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name in options.only or STAGES:
        limit = min(LIMITS[name], options.budget - (time.monotonic() - begun))
        if limit < 5:
            ended[name] = "no time was left"
        else:
            command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--device", options.device]
            command += ["--corpus", options.corpus, "--out", str(out)]
            start = time.monotonic()
            with open(out / "log.txt", "ab") as log:
                log.write(f"\n##### {name}, at most {limit:.0f} s\n".encode())
                log.flush()
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
                )
                try:
                    code = process.wait(limit)
                    ended[name] = "done" if code == 0 else f"ended with status {code}"
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)  # its own processes too
                    process.wait()
                    ended[name] = "its time was up"
            ended[name] += f", {time.monotonic() - start:.0f} s"
        print(f"{name}: {ended[name]}", flush=True)
        collect(out, kind, ended)
    return ended


def failures(out: Path, kind: str) -> list[str]:
    """What ran and was not right: checks that failed, or that found a difference."""
    found = json.loads((out / f"gpu-{kind}.json").read_text(encoding="utf-8"))
    return [
        f"{stage}, {name}: {said}" for stage in ("checks", "resume", "notebooks")
        for name, said in found.get(stage, {}).items() if said is False or "FAILED" in str(said)
    ]  # fmt: skip


def collect(out: Path, kind: str, ended: dict) -> None:
    """One file for each kind of result, as they are in `results/`, from what the stages have written until now."""
    found = {path.stem.removeprefix("stage-"): json.loads(path.read_text()) for path in out.glob("stage-*.json")}
    compiled = found.pop("compile", None)
    if "latency" in found:
        table = found.pop("latency")
        if compiled:
            table["rows"] = compiled["rows"] + [
                row for row in table["rows"] if (row["model"], row["batch"]) not in
                {(other["model"], other["batch"]) for other in compiled["rows"]}
            ]  # fmt: skip
            table["left out"] = compiled["left out"]
        write_json(out / f"latency-{kind}.json", table)
    for name in ("bench", "profile"):
        if name in found:
            write_json(out / f"{name}-{kind}.json", found.pop(name))
    write_json(out / f"gpu-{kind}.json", {"stages": ended} | found)


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, … or cpu for a rehearsal")
    parser.add_argument("--budget", type=float, default=530, help="seconds in all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="where the files go")
    parser.add_argument("--corpus", default="sample", help="the embedded one, or a path")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages alone")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.corpus not in ("sample", "cornell"):
        options.corpus = str(Path(options.corpus).resolve())
    options.out = options.out.resolve()
    if options.stage:
        STAGES[options.stage](Stage(options.stage, options.device, options.corpus, options.out))
        return 0
    choose_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.out.glob("stage-*.json"):
        path.unlink()
    ended = in_order(options)
    failed = failures(options.out, options.device.partition(":")[0])
    print("\n".join(failed) or "no check failed")
    return int(bool(failed) or not all(how.startswith("done") for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
