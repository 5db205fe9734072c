"""The exercises' checks: `check("2.3", answer)` says right, or names the likely mistake.

A check is a function of the answer that returns a hint, or None where the answer is right.
What is right is computed, and so are the mistakes that lead to other answers.
"""

import dataclasses
import itertools
import math
import statistics
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable

import torch

from benchmarks.replies import exact_matches, replies_of
from benchmarks.transformer import new_transformer
from helpers import decoding
from helpers.batches import Pairs, Prepared
from helpers.model import Memory, new_model
from helpers.run import Run
from helpers.settings import Settings, UserError
from helpers.text import Vocabulary
from helpers.training import fit, new_optimizer

KINDS = {
    "a number": (int, float),
    "a list": (list, tuple),
    "a dict": dict,
    "a class": type,
    "a function": types.FunctionType,
}
CHECKS: dict[str, tuple[str, Callable]] = {}  # number: the answer's kind and the check


class NotTriedError(Exception):
    """The cell is as it was."""


def check(number: str, answer) -> None:
    """Print whether the answer is right, or else a hint."""
    if number not in CHECKS:
        raise UserError(f"There is no exercise {number!r}; there are {', '.join(CHECKS)}.")
    try:
        hint = hint_on(*CHECKS[number], tried(answer))
    except NotTriedError:
        if untouched(answer):
            print(f"{number}: not tried yet")
            return
        hint = "It returns None: is a `return` missing?"
    except Exception as error:  # of the reader's code
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        hint = f"{type(error).__name__}: {reason}"
    print(f"{number}: right." if hint is None else f"{number}: not yet. {hint}")


def hint_on(kind: str, find: Callable, answer) -> str | None:
    """What the check finds, given an answer of the right kind."""
    if kind in ("a number", "a list") and hasattr(answer, "tolist"):  # an array's
        answer = answer.tolist()
    if not isinstance(answer, KINDS[kind]):
        return f"The answer is to be {kind}; this is of type {type(answer).__name__}."
    try:
        return find(answer)
    except KeyError as error:
        if kind != "a dict":
            raise
        return f"An entry is missing: {error}."


def tried(answer):
    """The answer, or NotTriedError where a part of it is still None or `...`."""
    several = isinstance(answer, (dict, list, tuple))
    parts = answer.values() if isinstance(answer, dict) else answer if several else [answer]
    if any(part is None or part is ... for part in parts) or (several and not answer):
        raise NotTriedError
    return answer


def as_it_was(self):
    """A function of an exercise before it is tried."""
    ...


def untouched(answer) -> bool:
    """Whether an answer is, or a class's functions are, only a docstring and `...`."""
    functions = vars(answer).values() if isinstance(answer, type) else [answer]
    codes = [f.__code__.co_code for f in functions if isinstance(f, types.FunctionType)]
    return all(len(code) <= len(as_it_was.__code__.co_code) for code in codes)


def among(answer, right, mistakes: list[tuple], otherwise: str) -> str | None:
    """None where the answer is right, the hint of the first mistake that leads to it, or
    the other one. Numbers are equal within a thousandth."""

    def same(value) -> bool:
        if isinstance(value, float):
            return math.isclose(answer, value, rel_tol=1e-3, abs_tol=1e-6)
        return type(answer)(value) == answer if isinstance(value, list) else value == answer

    if same(right):
        return None
    return next((hint for value, hint in mistakes if same(value)), otherwise)


def exercise(number: str, kind: str):
    """Enter a check under its exercise's number, with the kind of answer that it takes."""

    def enter(function):
        CHECKS[number] = kind, function
        return function

    return enter


def trained(data: Prepared, updates: int = 500, **changes) -> tuple[float, float]:
    """Train a small model on the first 500 exchanges, in a folder that disappears. Returns
    its lowest validation loss and its share of exact replies to 500 validation queries."""
    parts = {name: data.splits[name].first(500) for name in ("train", "validation")}
    small = {"embedding_size": 64, "hidden_size": 64, "batch_size": 32, "precision": "fp32"}
    small |= {"updates": updates, "validate_every": 50, "warmup_updates": 20, "patience": 0}
    settings = data.settings.change(**(small | changes))
    with tempfile.TemporaryDirectory() as folder:
        few = dataclasses.replace(data, splits=parts)
        model = fit(Run(folder), few, settings, torch.device("cpu"), progress_bar=False)
        rows = Run(folder).read_metrics()
    references = [reply.split() for _, reply in data.texts["validation"][:500]]
    longest = settings.max_response_words + 1
    asked = parts["validation"], data.vocabulary, longest, decoding.greedy
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    return min(losses), exact_matches(replies_of(model, *asked), references)


# 1 · Data preparation


@exercise("1.1", "a number")
def padding(answer):
    lengths, one = [7, 2, 5], Vocabulary(["a"])
    rows = Pairs.from_words([(["a"] * length, ["a"]) for length in lengths], one)
    places, words = rows.batch(torch.arange(3)).query.numel(), sum(lengths)
    mistakes = [
        (3 * 7 - words, "The batch's length is also rounded up to an even number."),
        (sum(n % 2 for n in lengths), "Not each row by itself: look at the longest."),
        (places, "These are all places. How many of them hold words?"),
        (words, "These are the words. How many places are there beside them?"),
        (3 * 20 - words, "A batch is cut to its own longest row, not to the corpus's."),
        ((places - words) / places, "A number of places was asked for, not their share."),
    ]
    return among(answer, places - words, mistakes, "Draw the rectangle and its words.")


@exercise("1.2", "a function")
def unknown_share(answer):
    counts = Counter({"i": 9, "am": 6, "you": 5, "anna": 3, "ben": 2, "tea": 1})
    said = [
        "i am|anna",
        "ben|you am",
        "tea|ben i",
        "you|i am",
        "anna|i",
        "i|ben",
        "tea|you",
    ]
    said += ["i am you|i", "i|tea", "ben|i", "am|you", "am|i", "i|am", "you|am"]
    said += ["zoe you|i"]  # zoe was never counted
    pairs = [tuple(side.split() for side in line.split("|")) for line in said]

    def share(sides, known):
        return statistics.mean(any(not known(w) for w in words(pair)) for pair in sides)

    def words(pair):
        return pair[0] + pair[1]

    def known(word):
        return counts[word] >= 3

    unknown = [not known(word) for pair in pairs for word in words(pair)]
    right = share(pairs, known)
    either_and_other = statistics.mean(
        all(any(not known(word) for word in side) for side in pair) for pair in pairs
    )
    never = share(pairs, lambda word: word not in counts or known(word))
    mistakes = [
        (never, "A word that was never counted was seen 0 times."),
        (statistics.mean(unknown), "This is the share of words, not of exchanges."),
        (1 - right, "This is the share of exchanges without an unknown word."),
        (share([(q, []) for q, _ in pairs], known), "It looks at the queries alone."),
        (share([([], r) for _, r in pairs], known), "It looks at the responses alone."),
        (share(pairs, lambda w: counts[w] > 3), "Seen exactly `least` times is not rare."),
        (right * len(pairs), "This is a number of exchanges. What is their share?"),
        (100 * right, "In per cent; a share lies between 0 and 1."),
        (either_and_other, "One unknown word is enough, on whichever side."),
    ]
    given = tried(answer(counts, pairs, 3))
    if given == answer(counts, pairs, 2) == answer(counts, pairs, 6):
        return "`least` makes no difference to yours."
    return among(given, right, mistakes, "Try 3 pairs by hand.")


@exercise("1.3", "a function")
def dealing(answer):
    units = [unit for unit in range(60) for _ in range(1 + unit % 7)]
    parts = list(tried(answer(units, 0.2, 1)))
    if len(parts) != len(units):
        return f"{len(units)} exchanges, so as many parts; yours are {len(parts)}."
    test = {unit for unit, part in zip(units, parts, strict=True) if part == "test"}
    share = parts.count("test") / len(parts)
    if set(parts) - {"train", "test"}:
        return "A part is named 'train' or 'test'."
    if not 0 < share < 1:
        return "One of the two parts is empty."
    if test & {unit for unit, part in zip(units, parts, strict=True) if part == "train"}:
        return "A unit is on both sides: draw for each unit, not for each exchange."
    if list(answer(units, 0.2, 1)) != parts:
        return "The same seed gave another split: draw from random.Random(seed)."
    if share > 0.5:
        return "The test part is the larger one: `share` is what is held out."
    if not 0.1 < share < 0.3:
        return f"Of 100 exchanges {100 * share:.0f} are held out, and 20 were asked for."
    if list(answer(units, 0.2, 2)) == parts:
        return "Another seed gave the same split: the drawing does not use it."
    return None


# 2 · The model


@exercise("2.1", "a list")
def mirror(answer):
    places = list(range(5))
    mistakes = [
        (places, "So it looks when it copies. Which word does it need first here?"),
        ([place + 1 for place in places[::-1]], "Off by one: columns are counted from 0."),
    ]
    otherwise = "One column per word of the reply, in order."
    if len(answer) == len(places):
        otherwise = "Row by row: which word of the query is said there, and where is it?"
    return among(answer, places[::-1], mistakes, otherwise)


def attended(score: type | Callable, size: int = 16):
    """A module of attention, states, and a memory whose first row has padding."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module, hidden = score("dot", size), torch.randn(2, 3, size)
        # Keys other than the states, as `general` has them.
        states, keys = torch.randn(2, 5, size), torch.randn(2, 5, size)
    pad = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    return module, hidden, Memory(states, keys, pad)


@exercise("2.2", "a class")
def unmasked(answer):
    module, hidden, memory = attended(answer)
    pad = memory.padding.clone()
    given = tried(module(hidden, memory))
    if not (isinstance(given, tuple) and len(given) == 2):
        return "Two things are to be returned: the context and the weights."
    context, weights = given
    scores = hidden @ memory.keys.transpose(1, 2)
    if weights.shape == hidden.shape and context.shape == scores.shape:
        return "Swapped: the context comes first, then the weights."
    if weights.shape != scores.shape:
        return f"Weights {tuple(weights.shape)}; asked were (batch, time, query time)."
    if not torch.equal(memory.padding, pad):
        return "It changes the memory that it is given: `_replace` makes another one."
    if weights.isnan().any():
        return "Where there is no padding the weights are NaN: is the mask turned over?"
    if (weights[0, :, 3:] == 0).all():
        return "Padding still has no weight: something still masks it."

    def same(one, other):
        return torch.allclose(one, other, atol=1e-4)

    if not same(weights.sum(2), torch.ones(2, 3)):
        axis = same(weights.sum(1), torch.ones(2, 5))
        return "The weights over a query do not sum to 1: " + (
            "which axis has the softmax?" if axis else "where is the softmax?"
        )
    if same(weights, scores.masked_fill(pad.unsqueeze(1), 0.0).softmax(2)):
        return "Padding's scores are set to 0: leave them as they come."
    if same(weights, (hidden @ memory.states.transpose(1, 2)).softmax(2)):
        return "The states are compared; the keys are what is to be compared."
    if not same(weights, scores.softmax(2)):
        return "The weights are not the softmax of the scores."
    if same(context, weights @ memory.keys):
        return "The keys are for comparing; what is the mean taken of?"
    right = same(context, weights @ memory.states)
    return None if right else "The context is not the weighted mean of the memory's states."


@exercise("2.3", "a class")
def scaled_dot(answer):
    module, hidden, memory = attended(answer)
    scores = tried(module.scores(hidden, memory.keys))
    dot = hidden @ memory.keys.transpose(1, 2)  # (batch, time, query time)
    if scores.shape == dot.transpose(1, 2).shape:
        return "Transposed: a row is a decoder state, a column a word of the query."
    if scores.shape != dot.shape:
        return f"Scores {tuple(scores.shape)}; asked were (batch, time, query time)."
    factor = float((scores / dot).median())
    if not torch.allclose(scores, factor * dot, atol=1e-4):
        return (
            "Not the scores of `dot` times a number. No softmax yet; H is a size, no norm."
        )
    mistakes = [
        (1.0, "This is `dot`, without the scale."),
        (1 / 16, "Divided by H. Which power of it keeps the spread at 1?"),
        (4.0, "Multiplied where one divides."),
        (3**-0.5, "The root of the number of steps; H is a vector's length."),
        (5**-0.5, "The root of the number of words; H is a vector's length."),
    ]
    return among(
        factor, 1 / 4, mistakes, f"These are {factor:.3f} times the scores of `dot`."
    )


# 3 · Training


@exercise("3.1", "a number")
def perplexity(answer):
    chances = [1 / 2, 1 / 8, 1 / 2, 1 / 8]
    loss = statistics.mean(-math.log(chance) for chance in chances)
    mistakes = [
        (loss, "This is the loss in nats. Perplexity is its exponential."),
        (loss / math.log(2), "This is the loss in bits. Perplexity is 2 to that power."),
        (statistics.mean(1 / chance for chance in chances), "The mean is taken of -ln p."),
        (1 / statistics.mean(chances), "The mean is taken of -ln p, not of p."),
        (math.exp(-loss), "Turned over: a perplexity is never below 1."),
        (math.exp(loss / math.log(2)), "Logarithm and exponential need the same base."),
        (
            math.exp(4 * loss),
            "This is e to the sum of -ln p; the loss is the mean over the words.",
        ),
    ]
    return among(answer, math.exp(loss), mistakes, "The mean of -ln p first, then exp.")


@exercise("3.2", "a dict")
def teacher_forcing(answer):
    pairs = answer[1.0], answer[0.0]
    if not all(isinstance(pair, (tuple, list)) for pair in pairs):
        return "For each ratio both of the numbers that `trained` returns."
    (loss, exact), (other_loss, other_exact) = pairs
    if (loss, exact) == (other_loss, other_exact):
        return "Twice the same: the ratio did not reach the training."
    if exact > 1 or other_exact > 1 or min(loss, other_loss) < 0.5:
        return "A pair is (validation loss, share of exact replies), in this order."
    if loss > other_loss:
        return "The loss is lower without teacher forcing: are the two swapped?"
    if exact <= other_exact:
        return "Replies as good without teacher forcing: was it the same number of updates?"
    return None


@exercise("3.3", "a function")
def spare_biases(answer):
    settings = Settings(embedding_size=8, hidden_size=8, weight_decay=0.01)
    settings = settings.change(optimizer="adamw")
    model = new_model(settings, 20)
    try:
        optimizer = tried(answer(new_optimizer(model, settings), model))
    except ValueError as error:
        if "more than one parameter group" not in str(error):
            raise
        return "A bias is in two groups: take it out of its old one first."
    except RuntimeError as error:
        if "size of tensor" not in str(error):
            raise
        return "`in` compares tensors number by number. Compare their id()."
    groups = {}
    for group in optimizer.param_groups:
        groups |= {id(weight): group for weight in group["params"]}
    lost = [name for name, weight in model.named_parameters() if id(weight) not in groups]
    if lost:
        return f"{lost[0]} is in no group any more: it would never learn."
    for name, weight in model.named_parameters():
        decay = groups[id(weight)]["weight_decay"]
        if "bias" in name and decay:
            return f"{name} still decays."
        if "bias" not in name and not decay:
            return f"{name} does not decay any more, and is no bias."
    missing = any("ratio" not in group for group in groups.values())
    return "The new group lacks the `ratio` that the others have." if missing else None


# 4 · Decoding and chat


@exercise("4.1", "a list")
def length_penalty(answer):
    replies = {"short": (-2.1, 3), "long": (-3.3, 6)}

    def best(score):
        return max(replies, key=lambda name: score(*replies[name]))

    right = [best(lambda p, words, a=alpha: p / words**a) for alpha in (0, 1)]
    mistakes = [
        (["short", "short"], "With α = 1 divide by the number of words, then compare."),
        (["long", "long"], "With α = 0 every length to its power is 1."),
        (
            right[::-1],
            "Swapped? α = 0 comes first; of two negative numbers the nearer to 0 wins.",
        ),
    ]
    said = [str(name).lower() for name in answer]
    return among(said, right, mistakes, "For α = 0 and α = 1, 'short' or 'long'.")


@exercise("4.2", "a dict")
def temperature(answer):
    shares = [answer[heat] for heat in sorted(answer)]
    if len(shares) < 4 or min(answer) > 0.5 or max(answer) < 2:
        return "At least four temperatures, from 0.5 or less to 2 or more."
    if max(shares) > 1:
        return "The shares lie between 0 and 1."
    if shares[0] > shares[-1]:
        return "It falls as it gets hotter: these are the replies that are the *same*."
    if shares[-1] - shares[0] < 0.1:
        return "Heat changes nothing: the temperature did not reach the sampling."
    return None if shares[-1] >= 0.5 else "Half is not reached: go hotter, with top_p at 1."


@exercise("4.3", "a function")
def offsets(answer):
    query = ["a", "red", "hat", "and", "a", "blue", "box", "."]
    reply = ["the", "red", "box", "is", "a", "hat", ".", "red"]
    looks = [0, 1, 2, 3, 0, 3, 5, 2]  # of each word of the reply, as columns
    weights = 0.02 + torch.nn.functional.one_hot(torch.tensor(looks), len(query)) * 0.88

    def found(places, times=(1,)):
        there = [(at, word) for at, word in enumerate(reply) if query.count(word) in times]
        return [int(places[at]) - query.index(word) for at, word in there]

    right = found(looks)
    told = answer(query, reply, weights)
    if isinstance(told, list) and None in told:
        return "Leave out the words that do not stand there once: no None for them."
    told = tried(told)
    if isinstance(told, dict):
        return "A list was asked for, in the order of the reply."
    if len(told) > len(reply):
        return f"{len(reply)} words of the reply cannot have {len(told)} offsets."
    there = [word for word in reply if query.count(word) == 1]
    first = [looks[reply.index(word)] - query.index(word) for word in there]
    pairs = list(zip(there, right, strict=True))
    mistakes = [
        (first, "'red' is said twice: each time has a row of its own."),
        ([offset for word, offset in pairs if word != "."], "Marks count as words."),
        (
            [o for word, o in pairs if reply.count(word) == 1],
            "A word said twice counts twice.",
        ),
        ([-offset for offset in right], "The sign: from the word to where it looked."),
        (found(looks, (1, 2)), "'a' stands twice in the query: which is its place?"),
        (found(weights.argmax(0)), "Columns for rows: a row is a word of the reply."),
        ([abs(offset) for offset in right], "Keep the sign: before or after?"),
    ]
    return among(
        list(told),
        right,
        mistakes,
        f"For {' '.join(query)!r} and {' '.join(reply)!r} yours is {list(told)}.",
    )


# 5 · The hyperparameter sweep


@exercise("5.1", "a number")
def trials(answer):
    right = math.ceil(math.log(0.05) / math.log(0.95))
    mistakes = [
        (right - 1, "Off by one: that many miss with a little more than 5%."),
        (math.log(0.05) / math.log(0.95), "Trials come whole. Which way is it rounded?"),
        (20, "20 trials hit once on average, and miss altogether in 36% of the cases."),
        (19, "19 of 20 what? Write down the chance that n trials *all* miss."),
        (384 * 0.95, "No need to try the space: the trials are drawn independently."),
    ]
    return among(answer, right, mistakes, "Write down the chance that n trials all miss.")


@exercise("5.2", "a dict")
def breaking_rate(answer):
    rates = sorted(answer)
    losses = [answer[rate] for rate in rates]
    if any(isinstance(loss, (tuple, list)) for loss in losses):
        return "`trained` returns two numbers; of them the loss is asked for, the first."
    if rates[-1] > 3:
        return "As {rate: loss}; is it the other way round?"
    if len(rates) < 4 or rates[-1] / rates[0] < 300:
        return "At least four rates, a factor of 300 between the lowest and the highest."
    if max(losses) - min(losses) < 0.01:
        return "All alike: the rate did not reach the training."
    if losses[-1] == min(losses):
        return "The highest rate is the best: nothing breaks yet. Go on."
    if losses[0] == min(losses):
        return "The lowest rate is the best: begin lower."
    return None


def extreme(by_chance):
    """The hint where one value has the three least losses: 2 of 20 ways are as far."""
    share = by_chance([1.0, 2.0, 3.0, 7.0, 8.0, 9.0], list("aaabbb"), 4000)
    if share == 0:
        return "*At least* as far apart: as far as the one seen counts, too."
    if abs(share - 0.1) > 0.03:
        return "How many have each value changes: shuffle them, without replacement."
    return None


@exercise("5.3", "a function")
def by_chance(answer):
    losses, values = [4.1, 3.9, 3.2, 3.6, 3.8, 3.3, 3.7], list("abbaabb")

    def apart(places):
        """The mean at these places minus that at the others."""
        here = [losses[place] for place in places]
        return statistics.mean(here) - (sum(losses) - sum(here)) / (len(losses) - len(here))

    seen = apart([place for place, value in enumerate(values) if value == "a"])
    differences = [apart(places) for places in itertools.combinations(range(7), 3)]
    right = statistics.mean(abs(d) >= seen - 1e-9 for d in differences)
    one_sided = statistics.mean(d >= seen - 1e-9 for d in differences)
    told = tried(answer(losses, values, 4000))
    if values != list("abbaabb"):
        return "It shuffles the very list that it was given: shuffle a copy."
    for value, hint in (
        (right, None),
        (1 - right, "These are the shuffles that set the means *less* far apart."),
        (one_sided, "Count both directions: b above a is as surprising as a above b."),
        (1.0, "Every shuffle counts: compare each one's own distance with the one seen."),
        (0.0, "No shuffle counts: is the shuffled list what the means are taken of?"),
    ):
        if abs(told - value) < 0.03:
            return hint or extreme(answer)
    if told > 1:
        return "This is a number of shuffles. What is their share?"
    return f"It gives {told:.2f}; all orders together give another share."


# 6 · Profiling


@exercise("6.1", "a number")
def ridge(answer):
    size, peak, bandwidth = 128, 320e9, 20e9

    def first(flop_per_pair=2, width=4):
        """The first batch that takes longer to compute than its weights to read."""
        bytes_read, flop = width * 3 * size * size, flop_per_pair * 3 * size * size
        return next(n for n in range(1, 999) if n * flop / peak >= bytes_read / bandwidth)

    mistakes = [
        (first(1), "A multiplication and an addition for each weight: two FLOP."),
        (first(2, 2), "A number has four bytes."),
        (first() + 1, "*At least* as long: where both are equal, it counts."),
        (first(2, 1), "Bytes per weight and FLOP per weight and row, both count."),
    ]
    return among(answer, first(), mistakes, "Set both times equal; H falls out.")


@exercise("6.2", "a dict")
def optimiser_share(answer):
    step, fused, single = (answer[name] for name in ("step", "fused", "not fused"))
    if min(step, fused, single) <= 0 or step < 0.5:
        return "Milliseconds, please: these look like seconds."
    if max(fused, single) > step:
        return "The optimiser alone takes longer than the step that contains it."
    if fused > single:
        return "Fused is slower: swapped, or one call measured instead of a median?"
    if single < 0.02:
        return "Too fast: without gradients Adam has nothing to do. Run `backward` first."
    return None


@exercise("6.3", "a function")
def self_times(answer):
    spans = [("step", 0, 12), ("forward", 0, 6), ("gru", 1, 4), ("addmm", 2, 3)]
    spans += [("backward", 6, 12), ("mm", 7, 9)]
    total = {name: end - start for name, start, end in spans}
    children = {"step": ["forward", "backward"], "forward": ["gru"], "gru": ["addmm"]}
    children |= {"backward": ["mm"], "addmm": [], "mm": []}

    def below(name):
        return [d for child in children[name] for d in (child, *below(child))]

    def without(inner):
        return {name: total[name] - sum(map(total.get, inner(name))) for name in total}

    right = without(children.get)
    mistakes = [
        (total, "This is total time: what a span's children do is not its own."),
        (without(below), "Grandchildren are taken away twice: their parent holds them."),
        ({k: v for k, v in right.items() if v}, "A span without time of its own has 0."),
        (right | {"step": 7}, "One may begin or end when the outer one does."),
    ]
    ended = sorted(spans, key=lambda span: span[2])  # inner ones first
    told = tried(answer(ended))
    if not isinstance(told, dict):
        return "A dict was asked for: {name: self time}."
    if told != right and answer(spans) == right:
        return "Right if the outer ones come first; they come in any order."
    wrong = [name for name in total if told.get(name) != right[name]]
    return among(told, right, mistakes, f"Look again at {wrong}.")


# 7 · TorchScript and latency


def add_rows(rows: torch.Tensor) -> torch.Tensor:
    """The sum of the rows, by a loop."""
    total = torch.zeros(())
    for place in range(rows.size(0)):
        total = total + rows[place]
    return total


@exercise("7.1", "a list")
def frozen_loop(answer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, as notebook 7 says
        made = torch.jit.trace(add_rows, torch.ones(3)), torch.jit.script(add_rows)
    right = [int(way(torch.arange(1.0, 6.0))) for way in made]
    mistakes = [
        ([right[1]] * 2, "A trace has no loop: it repeats what the example did."),
        ([right[0]] * 2, "Scripting compiles the loop itself."),
        (right[::-1], "Swapped: the traced one comes first."),
        ([3, 5], "These are the rounds of the loop. What do they add up to?"),
    ]
    return among(answer, right, mistakes, "Which rows does each of them still see?")


@exercise("7.2", "a dict")
def advantage(answer):
    small, large = answer[min(answer)], answer[max(answer)]
    if min(answer) != 1 or max(answer) < 64:
        return "Batch 1 and one of at least 64 are needed."
    if small < 1 and large > small:
        return "Turned over: divide eager's time by the scripted one's."
    if max(answer.values()) > 20:
        return "These look like times. Divide eager's by the scripted one's."
    if large >= small:
        return "It does not shrink: were both warmed up, and timed by the same batches?"
    return None


@exercise("7.3", "a function")
def words_said(answer):
    tried(answer(torch.tensor([5, 6, 2, 7, 2]), 2))
    if "eos" not in answer.__annotations__:
        return "Without its type, TorchScript takes an argument for a tensor."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.jit.script(answer)
    except Exception as error:  # several kinds
        return f"TorchScript refuses it: {str(error).strip().splitlines()[0]}"
    rows = [[5, 6, 2, 7, 2], [5, 6, 7], [2, 5], [5, 6, 7, 8, 2]]
    told = []
    for row in rows:
        try:
            told.append(int(compiled(torch.tensor(row), 2)))
        except RuntimeError as error:
            return f"On {row} it fails: {str(error).strip().splitlines()[-1]}"
    right = [(*row, 2).index(2) for row in rows]
    last = [len(row) - 1 - row[::-1].index(2) if 2 in row else len(row) for row in rows]
    mistakes = [
        ([count + (2 in row) for count, row in zip(right, rows, strict=True)],
         "Off by one: the EOS itself is no word."),
        ([count + 1 for count in right], "Off by one: the EOS itself is no word."),
        (last, "This is the last EOS; what follows the first is not said."),
        ([sum(word != 2 for word in row) for row in rows], "It goes on after the EOS."),
    ]  # fmt: skip
    if [*told[:1], *told[2:]] == [*right[:1], *right[2:]] and told != right:
        return "A row without EOS: all of its ids are words."
    return among(told, right, mistakes, f"On {rows} it gives {told}.")


# 8 · From here to Transformers


@exercise("8.1", "a number")
def carried(answer):
    settings = Settings(embedding_size=64, hidden_size=128, layers=2)
    model = new_transformer(settings, 20).eval()
    with torch.no_grad():
        memory, state = model.encode(torch.tensor([[5]]), torch.tensor([1]))
        for _ in range(10):
            _, state = model.step(torch.tensor([1]), state, memory)
    right = state.hidden.numel()
    mistakes = [
        (right // 2, "Half of it: a key *and* a value, in *each* layer."),
        (right // 4, "A key and a value, in each of two layers."),
        (right + 64, "Keys and values alone; the last attentional state is neither."),
        (right * 4, "Heads share a vector: four of them make it no longer."),
        (right * 2, "Keys and values have embedding_size numbers, not hidden_size."),
    ]
    return among(answer, right, mistakes, "Words · layers · what is kept of each.")


@exercise("8.2", "a dict")
def without_waves(answer):
    with_waves, without = answer["with"], answer["without"]
    if max(with_waves, without) > 1:
        return "Shares, between 0 and 1."
    if with_waves < without:
        return "Better without? The two are swapped."
    if with_waves < 0.8:
        return "With waves it should copy nearly all: train for 400 updates."
    if with_waves == without:
        return "Twice the same: the zeros did not reach the model, which looks up `waves`."
    return None if without < 0.5 else "Too good without: does any place still get waves?"


@exercise("8.3", "a function")
def visible(answer):
    lengths = torch.tensor([3, 5])
    words = torch.arange(5) < lengths.unsqueeze(1)  # (batch, time)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    told = tried(answer(lengths, 5))
    if tuple(told.shape) != (2, 5, 5) or told.dtype != torch.bool:
        return f"{told.dtype} {tuple(told.shape)}; asked was bool (batch, time, time)."
    right = causal & words.unsqueeze(1)

    def same(other):
        return torch.equal(told, other)

    if same(~right):
        return "Inverted: True is where one may look."
    if same(causal.T & words.unsqueeze(1)) or same(right.transpose(1, 2)):
        return "Transposed: a row is who looks, and looks back."
    if same(causal.tril(-1) & words.unsqueeze(1)):
        return "Off by one: a word may see itself, and the first one sees nothing else."
    if same(causal & (torch.arange(5) <= lengths.unsqueeze(1)).unsqueeze(1)):
        return "Off by one: n words stand at the places 0 to n - 1."
    if same(causal.expand(2, 5, 5)):
        return "Padding can be seen: use the lengths."
    if same(words.unsqueeze(1).expand(2, 5, 5)):
        return "The future can be seen: use the order."
    if same(causal & words.unsqueeze(2)):
        return "The padding's *rows* see nothing, and their softmax is NaN: hide columns."
    return None if same(right) else "Print it for lengths (3, 5) and compare row by row."
