"""The exercises answer: every check accepts the solution, names each likely mistake, and never tells the solution."""

import itertools
import random
import re
import runpy
import statistics
import sys

import nbformat
import pytest
import torch

from helpers.model import LuongAttention
from helpers.run import ROOT
from helpers.settings import UserError
from tests.test_project import NOTEBOOKS, SOLUTIONS

sys.path.insert(0, str(ROOT / "notebooks"))
import exercises

CELLS = [cell for cell in nbformat.read(SOLUTIONS, as_version=4).cells if cell.cell_type == "code"]
IMPORTS = "\n".join(cell.source for cell in CELLS[:2])
# What the solutions measure, which takes them a minute; here figures such as they find.
MEASURED = {
    "3.2": {1.0: (1.84, 0.18), 0.0: (3.01, 0.10)},
    "4.2": {0.2: 0.02, 0.6: 0.2, 1.0: 0.3, 1.5: 0.5, 2.0: 0.8, 3.0: 1.0},
    "5.2": {1e-4: 5.5, 1e-3: 3.9, 1e-2: 2.8, 1e-1: 4.2, 0.5: 30.0},
    "6.2": {"step": 41.6, "fused": 0.5, "not fused": 1.3},
    "7.2": {1: 2.0, 8: 1.6, 32: 1.3, 128: 0.96},
    "8.2": {"with": 1.0, "without": 0.13},
}


def said(capsys, number, answer) -> str:
    """What the check prints."""
    exercises.check(number, answer)
    return capsys.readouterr().out.strip()


def by_exchange(units, share, seed):
    randomness = random.Random(seed)
    return ["test" if randomness.random() < share else "train" for _ in units]


def by_unit(share=None, seed=None, names=("test", "train")):
    """A split that is right but for what is fixed here."""

    def deal(units, asked, drawn):
        randomness = random.Random(drawn if seed is None else seed or None)
        held_out = {unit for unit in range(60) if randomness.random() < (share or asked)}
        return [names[0] if unit in held_out else names[1] for unit in units]

    return deal


def unknown(what=lambda query, response: query + response, least=0, of_words=False, known=False):
    def share(counts, pairs, below):
        rare = [[counts[word] < below + least for word in what(*pair)] for pair in pairs]
        touched = itertools.chain(*rare) if of_words else [any(row) for row in rare]
        return statistics.mean(bool(one) != known for one in touched)

    return share


def attention(change):
    """An attention whose forward is `change(scores, hidden, memory)`."""

    class Changed(LuongAttention):
        def forward(self, hidden, memory):
            return change(self.scores(hidden, memory.keys), hidden, memory)

    return Changed


def weighted(weights, memory):
    return weights @ memory.states, weights


def padding_0(scores, memory):
    return scores.masked_fill(memory.padding.unsqueeze(1), 0.0)


def zeroed(scores, hidden, memory):
    memory.padding.zero_()
    return weighted(scores.softmax(2), memory)


def scored(change):
    """An attention whose score is `change(dot)`."""

    class Scored(LuongAttention):
        def scores(self, hidden, keys):
            return change(hidden @ keys.transpose(1, 2))

    return Scored


def grouped(keep_old=False, lose=False, ratio=True, others=0.01, decay=0.0):
    def spare(optimizer, model):
        biases = [weight for name, weight in model.named_parameters() if "bias" in name]
        known = set() if keep_old else set(map(id, biases))
        for group in optimizer.param_groups:
            group["params"] = [weight for weight in group["params"] if id(weight) not in known]
            group["weight_decay"] = others
        group = {"params": biases, "weight_decay": decay} | ({"ratio": 1.0} if ratio else {})
        if not lose:
            optimizer.add_param_group(group)
        return optimizer

    return spare


def looked(axis=1, sign=1, times=(1,), size=int, first=False, but=""):
    def offsets(query, reply, weights):
        places = weights.argmax(axis).tolist()
        rows = [(row, word) for row, word in enumerate(reply) if query.count(word) in times and word != but]
        rows = [(reply.index(word), word) for _, word in rows] if first else rows
        return [size(sign * (places[row] - query.index(word))) for row, word in rows]

    return offsets


def chance(count):
    """A p by shuffling, where count(difference, the one seen) says which shuffles count."""

    def p(losses, values, draws):
        def apart(kinds):
            sides = [[v for v, k in zip(losses, kinds, strict=True) if k == kind] for kind in "ab"]
            return statistics.mean(sides[0]) - statistics.mean(sides[1])

        randomness, seen = random.Random(5), apart(values)
        return statistics.mean(count(apart(randomness.sample(values, len(values))), seen) for _ in range(draws))

    return p


def total_times(spans):
    return {name: end - start for name, start, end in spans}


def without_all_below(spans):
    inside = {name: [e - s for n, s, e in spans if n != name and a <= s and e <= b] for name, a, b in spans}
    return {name: end - start - sum(inside[name]) for name, start, end in spans}


def with_the_eos(ids: torch.Tensor, eos: int) -> int:
    count = 0
    while count < ids.size(0):
        count += 1
        if int(ids[count - 1]) == eos:
            return count
    return count


def returns_nothing(counts, pairs, least):
    share = statistics.mean(any(counts[word] < least for word in pair[0]) for pair in pairs)  # noqa: F841


def drawn_again(losses, values, draws):
    return chance_of([random.Random(draw).choices(values, k=len(values)) for draw in range(draws)], losses, values)


def in_place(losses, values, draws):
    seen, orders, randomness = [*values], [], random.Random(5)
    for _ in range(draws):
        randomness.shuffle(values)
        orders.append([*values])
    return chance_of(orders, losses, seen)


def chance_of(orders, losses, values):
    def apart(kinds):
        sides = [[v for v, k in zip(losses, kinds, strict=True) if k == kind] for kind in "ab"]
        return abs(statistics.mean(sides[0]) - statistics.mean(sides[1])) if all(sides) else 0.0

    return statistics.mean(apart(kinds) >= apart(values) - 1e-9 for kinds in orders)


def outer_first(spans):
    left = total_times(spans)
    for place, (_, start, end) in enumerate(spans):
        outer = [name for name, a, b in spans[:place] if a <= start and end <= b]
        if outer:
            left[outer[-1]] -= end - start
    return left


def without_any_eos(ids: torch.Tensor, eos: int) -> int:
    count = 0
    for place in range(ids.size(0)):
        if int(ids[place]) != eos:
            count += 1
    return count


def untyped(ids, eos):
    return ids.size(0)


def endless(ids: torch.Tensor, eos: int) -> int:
    count = 0
    while int(ids[count]) != eos:
        count += 1
    return count


def not_compiled(ids: torch.Tensor, eos: int) -> int:
    return next((place for place, word in enumerate(ids.tolist()) if word == eos), len(ids))


def masks(change):
    def visible(lengths, time):
        words = (torch.arange(time) < lengths.unsqueeze(1)).unsqueeze(1)  # (batch, 1, time)
        return change(torch.ones(time, time, dtype=torch.bool).tril(), words)

    return visible


WRONG = [
    ("1.1", 7, "rounded up"), ("1.1", 2, "Not each row by itself"), ("1.1", 24, "all places"), ("1.1", 11, "rectangle"),
    ("1.2", unknown(of_words=True), "share of words"), ("1.2", unknown(lambda query, _: query), "queries alone"),
    ("1.2", unknown(lambda _, response: response), "responses alone"), ("1.2", unknown(least=1), "exactly `least`"),
    ("1.2", unknown(known=True), "without an unknown word"),
    ("1.2", unknown(lambda query, _: query, of_words=True), "by hand"), ("1.2", returns_nothing, "`return`"),
    ("1.3", lambda units, *_: dict.fromkeys(units, "train"), "as many parts"),
    ("1.3", by_exchange, "both sides"),
    ("1.3", by_unit(share=0.8), "larger one"), ("1.3", by_unit(seed=0), "same seed"),
    ("1.3", by_unit(seed=7), "does not use it"), ("1.3", by_unit(names=("held out", "train")), "'train' or 'test'"),
    ("2.1", [0, 1, 2, 3, 4], "when it copies"),
    ("2.1", [5, 4, 3, 2, 1], "Off by one"), ("2.1", [4, 3, 2, 1], "One column"),
    ("2.1", [4, 3, 2, 0, 1], "Row by row"),
    ("2.2", LuongAttention, "still masks"), ("2.2", attention(zeroed), "`_replace`"),
    ("2.2", attention(lambda scores, _, memory: weighted(scores.softmax(1), memory)), "which axis"),
    ("2.2", attention(lambda scores, _, memory: weighted(scores, memory)), "where is the softmax"),
    ("2.2", attention(lambda scores, _, memory: (scores.softmax(2) @ memory.keys, scores.softmax(2))), "mean taken of"),
    ("2.2", attention(lambda _, hidden, memory: weighted((hidden @ memory.states.mT).softmax(2), memory)), "compared"),
    ("2.2", attention(lambda scores, _, memory: weighted(padding_0(scores, memory).softmax(2), memory)), "set to 0"),
    ("2.2", attention(lambda scores, _, memory: (memory.states, scores.transpose(1, 2))), "asked were"),
    ("2.2", attention(lambda scores, _, memory: scores.softmax(2)), "Two things"),
    ("2.2", attention(lambda scores, _, memory: weighted(scores.softmax(2), memory)[::-1]), "Swapped"),
    ("2.2", attention(lambda scores, _, memory: weighted(scores * torch.nan, memory)), "NaN"),
    ("2.3", scored(lambda dot: (dot / 4).softmax(2)), "softmax"), ("2.3", LuongAttention("dot", 16), "a class"),
    ("2.3", scored(lambda dot: dot), "without the scale"), ("2.3", scored(lambda dot: dot / 16), "Which power"),
    ("2.3", scored(lambda dot: dot.transpose(1, 2) / 4), "Transposed"),
    ("2.3", scored(lambda dot: dot * 4), "Multiplied"),
    ("2.3", scored(lambda dot: dot / 5**0.5), "number of words"),
    ("3.1", 1.386294, "in nats"), ("3.1", 5, "mean is taken of -ln p"), ("3.1", 3.2, "not of p"), ("3.1", 2, "in bits"),
    ("3.2", {1.0: (3.01, 0.10), 0.0: (1.84, 0.18)}, "swapped"),
    ("3.2", {1.0: (1.8, 0.2), 0.0: (1.8, 0.2)}, "did not reach"), ("3.2", {1.0: 1.8, 0.0: 3.0}, "both of the numbers"),
    ("3.2", {1.0: (1.8, 0.2)}, "An entry is missing: 0.0"),
    ("3.2", {1.0: (0.18, 1.84), 0.0: (0.10, 3.01)}, "in this order"),
    ("3.3", grouped(keep_old=True), "in two groups"), ("3.3", grouped(lose=True), "in no group"),
    ("3.3", grouped(decay=0.01), "still decays"), ("3.3", grouped(others=0.0), "does not decay any more"),
    ("3.3", grouped(ratio=False), "`ratio`"),
    ("4.1", ["long", "short"], "Swapped"),
    ("4.1", ["short", "short"], "With α = 1"), ("4.1", ["a", "b"], "'short' or 'long'"),
    ("4.2", {0.2: 0.98, 1.0: 0.7, 1.5: 0.5, 3.0: 0.0}, "*same*"),
    ("4.2", {0.2: 0.3, 1.0: 0.3, 2.0: 0.3, 3.0: 0.3}, "did not reach"),
    ("4.2", {0.8: 0.2, 1.0: 0.3}, "At least four"), ("4.2", {0.2: 0, 0.5: 0.1, 1.0: 0.2, 2.0: 0.4}, "go hotter"),
    ("4.3", looked(axis=0), "Columns for rows"),
    ("4.3", looked(sign=-1), "sign"), ("4.3", looked(times=(1, 2)), "twice"),
    ("4.3", looked(size=abs), "Keep the sign"), ("4.3", lambda *_: [0, None], "no None"),
    ("4.3", looked(first=True), "a row of its own"), ("4.3", looked(but="."), "Marks count"),
    ("5.1", 58, "Off by one"), ("5.1", 20, "miss altogether"), ("5.1", 95, "Write down"),
    ("5.2", {1e-4: 4.0, 1e-3: 4.0, 1e-2: 4.0, 1e-1: 4.0}, "did not reach"),
    ("5.2", {1e-4: (5.5, 0.0), 1e-3: (3.9, 0.0), 1e-2: (2.8, 0.1), 1e-1: (4.2, 0.0)}, "two numbers"),
    ("5.2", {1e-5: 6.0, 1e-4: 5.5, 1e-3: 4.0, 1e-2: 2.8}, "nothing breaks yet"),
    ("5.2", {5.5: 1e-4, 4.0: 1e-3, 2.8: 1e-2, 4.2: 0.1}, "other way round"),
    ("5.3", chance(lambda one, seen: abs(one) < abs(seen) - 1e-9), "*less*"),
    ("5.3", chance(lambda one, seen: one >= seen - 1e-9), "both directions"),
    ("5.3", chance(lambda one, seen: True), "Every shuffle"), ("5.3", chance(lambda one, seen: False), "No shuffle"),
    ("5.3", chance(lambda one, seen: abs(one) > abs(seen) + 1e-9), "*At least*"),
    ("5.3", drawn_again, "without replacement"), ("5.3", in_place, "a copy"),
    ("6.1", 64, "two FLOP"), ("6.1", 16, "four bytes"), ("6.1", 128, "H falls out"),
    ("6.2", {"step": 0.0416, "fused": 0.0005, "not fused": 0.0013}, "seconds"),
    ("6.2", {"step": 41.6, "fused": 1.3, "not fused": 0.5}, "swapped"),
    ("6.2", {"step": 41.6, "fused": 0.005, "not fused": 0.01}, "`backward`"),
    ("6.3", total_times, "total time"), ("6.3", without_all_below, "Grandchildren"),
    ("6.3", outer_first, "any order"), ("6.3", lambda spans: [*total_times(spans)], "A dict"),
    ("7.1", [15, 15], "no loop"), ("7.1", [15, 6], "Swapped"),
    ("7.1", [6, 6], "compiles the loop"), ("7.1", [3, 5], "rounds"),
    ("7.2", {1: 0.5, 8: 0.6, 32: 0.8, 128: 1.04}, "Turned over"), ("7.2", {1: 2.0, 8: 1.6}, "at least 64"),
    ("7.2", {1: 1.2, 128: 1.5}, "does not shrink"),
    ("7.3", untyped, "Without its type"), ("7.3", endless, "On [5, 6, 7] it fails"),
    ("7.3", with_the_eos, "Off by one"), ("7.3", without_any_eos, "goes on after"), ("7.3", not_compiled, "refuses"),
    ("8.1", 1280, "*and*"), ("8.1", 640, "each of two layers"),
    ("8.1", 5120, "embedding_size"), ("8.1", 10240, "Heads"),
    ("8.2", {"with": 0.13, "without": 1.0}, "swapped"), ("8.2", {"with": 1.0, "without": 1.0}, "did not reach"),
    ("8.2", {"with": 0.3, "without": 0.1}, "400 updates"), ("8.2", {"with": 0.0, "without": 0.0}, "400 updates"),
    ("8.3", masks(lambda causal, words: causal.T & words), "Transposed"),
    ("8.3", masks(lambda causal, words: causal.tril(-1) & words), "Off by one"),
    ("8.3", masks(lambda causal, words: causal & words.roll(1, 2).logical_or(words)), "places 0 to n - 1"),
    ("8.3", masks(lambda causal, words: ~(causal & words)), "Inverted"),
    ("8.3", masks(lambda causal, words: causal.expand(2, 5, 5)), "Padding can be seen"),
    ("8.3", masks(lambda causal, words: words.expand(2, 5, 5)), "future"),
    ("8.3", masks(lambda causal, words: causal & words.transpose(1, 2)), "*rows*"),
]  # fmt: skip


@pytest.mark.parametrize("number", sorted(exercises.CHECKS))
def test_the_solution_is_right(number, tmp_path, capsys):
    source = [cell.source for cell in CELLS if f'check("{number}"' in cell.source]
    assert len(source) == 1, f"solutions.ipynb checks {number} once"
    if number in MEASURED:
        assert said(capsys, number, MEASURED[number]) == f"{number}: right."
    else:
        path = tmp_path / "solution.py"  # a file, since TorchScript reads sources
        path.write_text(f"{IMPORTS}\n{source[0]}", encoding="utf-8")
        runpy.run_path(str(path))
        assert capsys.readouterr().out.splitlines()[-1] == f"{number}: right."


@pytest.mark.parametrize(("number", "answer", "hint"), WRONG)
def test_a_likely_mistake_is_named(number, answer, hint, capsys):
    told = said(capsys, number, answer)
    assert told.startswith(f"{number}: not yet. ")
    assert hint in told


def test_every_exercise_is_tested_with_two_wrong_answers_at_least():
    tried = [number for number, *_ in WRONG]
    assert all(tried.count(number) >= 2 for number in exercises.CHECKS)
    assert set(tried) == set(exercises.CHECKS)


@pytest.mark.parametrize("number", sorted(set(exercises.CHECKS) - set(MEASURED)))
def test_a_hint_does_not_tell_the_solution(number, capsys):
    source = next(cell.source for cell in CELLS if f'check("{number}"' in cell.source)
    solution = re.search(r"^answer = (.*)$", source, re.MULTILINE)
    if solution and solution[1][-1] in "0123456789]":  # a plain value, not a calculation
        value = re.escape(solution[1])
        for wrong in (answer for other, answer, _ in WRONG if other == number):
            assert not re.search(rf"(?<![\d.]){value}(?![\d.])", said(capsys, number, wrong).partition("yet. ")[2])


@pytest.mark.parametrize("answer", [None, ..., {1: None}, [], lambda *_: None, lambda *_: ...])
def test_a_cell_that_nobody_filled_in_says_so(answer, capsys):
    assert said(capsys, "1.2", answer) == "1.2: not tried yet"


def test_what_an_answer_raises_is_said_and_ends_nothing(capsys):
    assert said(capsys, "1.2", lambda *_: 1 / 0) == "1.2: not yet. ZeroDivisionError: division by zero"
    assert said(capsys, "6.2", {1: 2}) == "6.2: not yet. An entry is missing: 'step'."
    assert said(capsys, "6.2", 3) == "6.2: not yet. The answer is to be a dict; this is of type int."
    assert said(capsys, "2.1", torch.arange(4, -1, -1)) == "2.1: right.", "an array does as well"
    assert said(capsys, "4.1", ["Short", "LONG"]) == "4.1: right.", "capitals do as well"
    with pytest.raises(UserError, match=r"no exercise '9\.9'"):
        exercises.check("9.9", 1)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_unfilled_exercises_run_through(path, capsys):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.id.startswith("check-")]
    names = {"torch": torch, "LuongAttention": LuongAttention}
    for cell in cells:
        exec(cell.source, names)
    number = int(path.stem[:2])
    assert capsys.readouterr().out.splitlines() == [f"{number}.{place}: not tried yet" for place in (1, 2, 3)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_before_a_run_and_at_its_end(path):
    cells = nbformat.read(path, as_version=4).cells
    predicted = [place for place, cell in enumerate(cells) if cell.source.startswith("**Predict.**")]
    assert 1 <= len(predicted) <= 2
    assert all(cells[place + 1].cell_type == "code" for place in predicted)
    assert cells[-1].source.startswith("## Five questions")
    assert re.findall(r"<summary>(\d)\. ", cells[-1].source) == list("12345")
    for cell in cells:
        assert cell.source.count("<details>") == cell.source.count("</details>") == cell.source.count("</summary>")
