"""The bot outside Python: deploy/chat.cpp built, shown to say what eager says, and timed beside it.

python -m benchmarks.outside --run runs/sample [--full]    # --full: AOTInductor and the classic size too

Notebook 07 shows the same rows in its latency table, and `make latency` keeps them in results/.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from benchmarks.classic import classic
from benchmarks.textbook import textbook_greedy
from helpers.batches import Prepared
from helpers.decoding import GreedySearch
from helpers.deploy import BlockSearch, Steps, save_scripted, script
from helpers.latency import TURN, Subject, answers, as_table, parity
from helpers.model import Seq2Seq
from helpers.run import ROOT, Run, machine, seconds
from helpers.settings import Settings, UserError, command_line, user_errors
from helpers.text import EOS, SPECIAL, Vocabulary, tokenise
from helpers.training import load_model

BUILD = ROOT / "build"
CPU = torch.device("cpu")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def build(folder: Path = BUILD) -> Path:
    """The program of deploy/chat.cpp, built in `folder` where it is not or is older than its source.
    Raises UserError, with the reason, where it cannot be built."""
    compiler = os.environ.get("CXX", "c++")
    for name, tool in (("CMake", "cmake"), ("a C++ compiler", compiler)):
        if shutil.which(tool) is None:
            raise UserError(f"{name} is not installed ({tool}); on Debian: apt install cmake g++ libicu-dev.")
    configure = ["cmake", "-S", ROOT / "deploy", "-B", folder, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        cache = folder / "CMakeCache.txt"
        if cache.exists() and _cmake(configure):  # it belongs to a checkout or an environment that has moved
            cache.unlink()
        for command in [*([] if cache.exists() else [configure]), ["cmake", "--build", folder]]:
            if said := _cmake(command):
                if "Could NOT find ICU" in said:
                    raise UserError("ICU's headers are not installed; on Debian: apt install libicu-dev.")
                raise UserError(f"deploy/chat.cpp cannot be built: {said[-600:]}")
    return folder / "chat"


def _cmake(command: list[str | Path]) -> str:
    """What it said, if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


class Program:
    """deploy/chat.cpp at work on a scripted.pt, or with a steps.pt2 beside it: a line in, a reply out."""

    def __init__(self, program: Path, *files: Path) -> None:
        self.files = files
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(
            [program, *files, "--times"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | threads, encoding="utf-8",
        )  # fmt: skip

    def __call__(self, line: str) -> tuple[str, float, float]:
        """The reply, the milliseconds from line to reply, and those of the search in it, by the program's own clock."""
        process = self.process
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
        if not (reply := process.stdout.readline()):
            raise UserError(f"deploy/chat.cpp has ended: {process.stderr.read().strip()[-600:]}")
        while not (told := re.fullmatch(r"([\d.e+-]+) ([\d.e+-]+)\n", process.stderr.readline())):
            pass  # a remark on HTML's entities
        return reply.removesuffix("\n"), float(told[1]), float(told[2])

    def close(self) -> None:
        """End it; the pipe's end is its end."""
        self.process.communicate()


def package(model: Seq2Seq, longest_query: int, path: Path) -> Path:
    """AOTInductor's library of one decoding step, for queries padded to `longest_query`, written to `path`."""
    query, lengths = torch.full((1, longest_query), EOS), torch.tensor([longest_query])
    with torch.no_grad():
        start = BlockSearch(model, Steps, longest_query).begin(query, lengths)
        program = torch.export.export(Steps(model), start)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


def browser_says(page: Path) -> tuple[str, float]:
    """What bot.html answers to its first question when Chromium opens it, and in how many milliseconds."""
    if CHROMIUM is None:
        raise UserError("Chromium is not installed; open the page in any browser of 2023 or later.")
    remedy, kinds = "Open it in any browser.", (subprocess.TimeoutExpired, OSError)
    with tempfile.TemporaryDirectory() as folder, user_errors(f"Chromium has not shown {page.name}", remedy, *kinds):
        command = [CHROMIUM, *QUIET, f"--user-data-dir={folder}", "--dump-dom", page.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r'<li class="bot"><button[^>]*>([^<]*)</button><small>[^<]*? · ([\d.]+) ms', done.stdout)
    if not found:
        raise UserError(f"Chromium has not shown {page.name}: {done.stderr.strip()[-300:]}")
    return found[1], float(found[2])


def lines_of(queries: Tensor, lengths: Tensor) -> list[str]:
    """Queries as lines of made-up words, w4 for the id 4."""
    rows = zip(queries.tolist(), lengths.tolist(), strict=True)
    return [" ".join(f"w{index}" for index in row[:length]) for row, length in rows]


def ids_of(reply: str, max_words: int) -> list[int]:
    """A reply of made-up words as ids, as a search gives them: EOS after it, where there is room, and then PAD."""
    ids = [*(int(word[1:]) for word in tokenise(reply) if word.startswith("w")), EOS][:max_words]
    return ids + [0] * (max_words - len(ids))


@contextlib.contextmanager
def programs(subject: Subject, program: Path, compilation: bool) -> Iterator[tuple[dict[str, Program], dict[str, str]]]:
    """deploy/chat.cpp with a subject's model and made-up words, in each of its ways; and why a way is left out."""
    _, model, test, max_words, _ = subject
    sizes = {"max_query_words": test.queries.size(1), "max_response_words": max_words - 1}
    words = [f"w{index}" for index in range(len(SPECIAL), model.output.out_features)]
    about = {"vocabulary": json.loads(Vocabulary(words).to_json()), "examples": []}
    about["settings"] = Settings().change(**sizes).to_dict()
    ways, left_out = {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        scripted = Path(folder, "scripted.pt")
        save_scripted(scripted, script(model), about)
        files = {"C++": [scripted], "C++, AOTInductor": [scripted, Path(folder, "steps.pt2")]}
        for way, given in files.items():
            try:
                if len(given) > 1 and not compilation:
                    raise UserError("compilation was not asked for")
                if len(given) > 1:
                    package(model, sizes["max_query_words"], given[1])
                ways[way] = Program(program, *given)
                stack.callback(ways[way].close)
            except Exception as error:  # compilers fail in all sorts of ways
                left_out[way] = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        yield ways, left_out


@torch.no_grad()
def rows(subject: Subject, queries: int, replies: int, compilation: bool, folder: Path = BUILD) -> tuple[list, dict]:
    """The latency table's rows of C++ at batch 1, and why those that are left out are.
    Each reply to the first `queries` is compared with eager's. Then the ways take turns with eager and the textbook, as
    in `helpers.latency.measure`; what is timed is the search alone, by the program's own clock, as with the others."""
    name, model, test, max_words, textbook = subject
    if test.queries.is_cuda or (test.queries == EOS).any():
        reason = "deploy/chat.cpp works on a CPU" if test.queries.is_cuda else "the row is for models without context"
        return [], dict.fromkeys(["C++", "C++, AOTInductor"], reason)
    try:
        program = build(folder)
    except UserError as error:
        return [], dict.fromkeys(["C++", "C++, AOTInductor"], str(error))
    subset, eager, found = test.first(queries), GreedySearch(model).eval(), []
    lines = lines_of(test.queries, test.query_lengths)
    with programs(subject, program, compilation) as (ways, left_out):
        expected = answers(eager, subset, max_words, 1)
        for way, ask in ways.items():
            said = torch.tensor([ids_of(ask(line)[0], max_words) for line in lines[:queries]])
            counts = parity(model, subset, expected, said)
            found.append({"model": name, "variant": way, "batch": 1, **counts, "compared": len(subset)})
            found[-1]["parity"] = counts["different"] == 0

        def python(search, number: int) -> float:
            batch = test.batch(torch.tensor([number]))
            return 1e3 * seconds(partial(search, batch.query, batch.query_lengths, max_words), CPU)

        clocks = {"eager": partial(python, eager)}
        if textbook:
            clocks["textbook"] = partial(python, partial(textbook, model))
        for row in found:
            if row["parity"]:
                clocks[row["variant"]] = lambda number, ask=ways[row["variant"]]: ask(lines[number])[2]
        taken = {way: [] for way in clocks}
        for start in range(-TURN, replies, TURN):
            numbers = [number % len(test) for number in range(start, start + TURN)]
            for way, clock in clocks.items():
                clock(numbers[0])  # the way before has left its own weights in the processor's cache
                taken[way] += [clock(number) for number in numbers] if start >= 0 else []
    median = {way: float(np.median(values)) for way, values in taken.items()}
    for row in found:
        if row["parity"]:
            own, values = median[row["variant"]], taken[row["variant"]]
            row |= {"p50 ms": own, "p95 ms": float(np.percentile(values, 95)), "replies/s": 1e3 / own}
            row |= {"vs eager": median["eager"] / own, "vs textbook": median.get("textbook", np.nan) / own}
            row |= {"timed": len(values)}
    return found, left_out


@command_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Run, required=True, metavar="DIR", help="a trained run")
    parser.add_argument("--full", action="store_true", help="also AOTInductor's steps, and a model of the classic size")
    options = parser.parse_args(arguments)
    model, vocabulary, settings, _ = load_model(options.run.checkpoint, CPU)
    data = Prepared.load(options.run.data)
    name = f"run's: {settings.hidden_size} hidden, {settings.layers} layer(s), {len(vocabulary):,} words"
    own = Subject(name, model, data.splits["test"], settings.max_response_words + 1, textbook_greedy)
    for subject in (own, *([classic(data, CPU)] if options.full else [])):
        found, left_out = rows(subject, 200, 200, options.full)
        print(subject.name)
        if found:
            table = as_table(found).drop(columns="model")
            print(table.to_string(index=False, float_format="{:.2f}".format, na_rep=""))
        print("".join(f"left out: {way}: {reason}\n" for way, reason in left_out.items()), end="")
    print(", ".join(f"{fact} {value}" for fact, value in machine(CPU).items()))


if __name__ == "__main__":
    sys.exit(main())
