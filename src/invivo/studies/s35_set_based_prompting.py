"""Card 35: a prompt whose options have no order.

McIlroy-Young, Brown, Olson, Zhang, Dwork 2024, "Order-Independence Without Fine Tuning" (NeurIPS,
arXiv 2406.06581). Multiple-choice questions are asked with their options in several orders, as a
set (options share their positions and do not see each other), and with only one half of that
change. Options are scored by the log-probability of their text after the question, without letters
or numbers, which would bring an order back.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from invivo.edits.program import parse_program
from invivo.errors import InvalidRequest
from invivo.lm import LM
from invivo.program_result import Array
from invivo.report.findings import Bars, Dots, Findings, Statement, Table, Texts, Verdict
from invivo.statistics import (
    Interval,
    agreement,
    bootstrap_mean,
    holm,
    mcnemar,
    paired_difference,
    wilson,
)
from invivo.studies.study import Record, Study, Unit, Work
from invivo.tasks.items import Item, digest, load_items
from invivo.tasks.options import OptionScores, best, score_options, score_options_exactly

Program = dict[str, Any]
Range = tuple[int, int]
_VISIBLE = 0.05  # the order matters visibly where it changes this share of answers
_MARGIN = 0.05  # two accuracies are called alike within this
_N_EXAMPLES = 6
_HALVES = ("mask only", "position only")
_SET_LAYOUTS = ("set", "set as given", "set reversed", "set padded")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked.

    Attributes:
        items: sources of items (see :func:`invivo.tasks.items.load_items`).
        n_items: of each source.
        orders: random orders beside the given and the reversed one.
        score: which sum of log-probabilities chooses: of an option's text, or per token.
        seed: of the drawn items and orders.
        tolerance: largest difference of log-probabilities that counts as rounding; it fits
            float32.
        numerics: "exact": the same records to the last bit, many times slower.
    """

    items: tuple[str, ...]
    n_items: int
    orders: int
    score: Literal["sum", "per token"] = "sum"
    seed: int = 0
    tolerance: float = 1e-3
    numerics: Literal["fast", "exact"] = "fast"


# What is asked.


@dataclass(frozen=True, slots=True)
class Layout:
    """A prompt in one order of its options, as token ids.

    Attributes:
        start: where the options begin.
        blocks: token ranges of the options, in the order of the prompt.
    """

    ids: tuple[int, ...]
    start: int
    blocks: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """The parts of an item's prompt, each tokenised alone, so that all orders have the same tokens.

    Attributes:
        options: as they stand in the prompt.
        answers: as they follow it.
    """

    prefix: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    suffix: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    texts: tuple[str | Mapping[str, Any], ...]

    @property
    def longest(self) -> int:
        return max(len(option) for option in self.options)

    def layout(self, order: Sequence[int], *, padded: bool = False) -> Layout:
        """``padded``: every option as long as the longest, filled with its last token."""
        ids, blocks = list(self.prefix), []
        for i in order:
            option = self.options[i]
            begin = len(ids)
            ids += option
            if padded:
                ids += [option[-1]] * (self.longest - len(option))
            blocks.append((begin, len(ids)))
        return Layout((*ids, *self.suffix), len(self.prefix), tuple(blocks))


def ask(lm: LM, item: Item) -> Asked:
    """The prompt of an item; every option is marked in the same way, by quotes."""
    prefix, suffix = f"Question: {item.question.strip()}\nOptions:", "\nAnswer:"
    options = [f' "{option.strip()}"' for option in item.options]
    tokens = tuple(tuple(lm.tokenize(option)) for option in options)
    return Asked(
        prefix=tuple(lm.tokenize(prefix, special=True)),
        options=tokens,
        suffix=tuple(lm.tokenize(suffix)),
        answers=tokens,
        texts=(prefix, {"set": options}, suffix),
    )


def as_set(layout: Layout) -> Program:
    """Options at the same positions, hidden from each other."""
    blocks = [{"range": list(block)} for block in layout.blocks]
    return {"steps": [{"at": "input.mask", "do": "parallel", "blocks": blocks}]}


def as_padded_set(layout: Layout, lengths: Sequence[int]) -> Program:
    """The same for padded options; nobody sees the padding.

    Args:
        lengths: of the options without padding, in the order of the layout.
    """
    program = as_set(layout)
    filled = [
        {"range": [begin + n, end]}
        for (begin, end), n in zip(layout.blocks, lengths, strict=True)
        if begin + n < end
    ]
    if filled:
        hidden = {"at": "input.mask", "do": "edge_block", "from": {"or": filled}, "to": "@all"}
        program["steps"].append(hidden)
    return program


def mask_only(layout: Layout) -> Program:
    """Options hidden from each other, at the positions they have in the text."""
    return {
        "steps": [
            {"at": "input.mask", "do": "edge_block", "from": {"range": [layout.start, begin]},
             "to": {"range": [begin, end]}}
            for begin, end in layout.blocks[1:]
        ]
    }  # fmt: skip


def position_only(layout: Layout, longest_answer: int) -> Program:
    """Options at the same positions, each seeing those before it."""
    longest = max(end - begin for begin, end in layout.blocks)
    numbers = [layout.start + i for begin, end in layout.blocks for i in range(end - begin)]
    whole = len(layout.ids) + longest_answer
    after = whole - layout.start - len(numbers)
    numbers += range(layout.start + longest, layout.start + longest + after)
    step = {"at": "input.position", "do": "set_positions", "values": numbers}
    return {"steps": [step | {"pos": {"range": [layout.start, whole]}}]}


def _score_one(
    lm: LM,
    context: Sequence[int],
    options: Sequence[Sequence[int]],
    *,
    interventions: Program,
) -> OptionScores:
    (found,) = score_options(lm, [context], options, interventions=interventions)
    return found


def orders_of(item: Item, settings: Settings) -> dict[str, tuple[int, ...]]:
    """The orders of an item's options by name; the random ones are its own, all different."""
    given = tuple(range(len(item.options)))
    named = {"normal": given, "reversed": given[::-1]}
    n = min(settings.orders, math.factorial(len(given)) - len(named))
    draw = random.Random(f"{settings.seed} {item.id}")
    seen = set(named.values())
    while len(named) < n + 2:
        order = tuple(draw.sample(given, len(given)))
        if order not in seen:
            seen.add(order)
            named[f"order {len(named) + 1}"] = order
    return named


def prepare(settings: Settings) -> Work:
    units, digests = [], {}
    for source in settings.items:
        items = load_items(source, settings.n_items, seed=settings.seed)
        name = name_of(source)
        if name in digests:
            raise InvalidRequest("two sources have the same name", field="items", given=source)
        digests[name] = digest(items)
        units += [Unit(f"{name}/{item.id}", (name, item)) for item in items]
    return Work(units, digests)


def name_of(source: str) -> str:
    """Of a source, short: the file's or the data set's name."""
    if source.startswith("hub:"):
        return source.removeprefix("hub:").split(":")[0].split("/")[-1]
    return source.rsplit("/", 1)[-1].split(".")[0]


def measure(lm: LM, settings: Settings, unit: Unit) -> list[Record]:
    source, item = unit.given
    asked = ask(lm, item)
    orders = orders_of(item, settings)
    layouts = {name: asked.layout(order) for name, order in orders.items()}
    contexts = [layout.ids for layout in layouts.values()]
    exact = settings.numerics == "exact"
    if exact:
        plain = [score_options_exactly(lm, ids, asked.answers) for ids in contexts]
    else:
        plain = score_options(lm, contexts, asked.answers)
    scores: dict[str, OptionScores] = dict(zip(orders, plain, strict=True))

    programs: dict[str, str] = {}

    def under(name: str, layout: Layout, program: Program) -> None:
        programs[name] = parse_program(program).hash
        score = score_options_exactly if exact else _score_one
        scores[name] = score(lm, layout.ids, asked.answers, interventions=program)

    if exact:
        # Sorted by their tokens, as the LM lays sets out.
        in_order = asked.layout(sorted(range(len(item.options)), key=asked.options.__getitem__))
        under("set", in_order, as_set(in_order))
    else:
        (scores["set"],) = score_options(lm, [asked.texts], asked.answers)
    longest_answer = max(len(answer) for answer in asked.answers)
    for order, suffix in (("normal", " as given"), ("reversed", " reversed")):
        layout = layouts[order]
        under(f"set{suffix}", layout, as_set(layout))
        half = "" if order == "normal" else suffix
        under(f"mask only{half}", layout, mask_only(layout))
        under(f"position only{half}", layout, position_only(layout, longest_answer))
    padded = asked.layout(orders["normal"], padded=True)
    lengths = [len(option) for option in asked.options]
    under("set padded", padded, as_padded_set(padded, lengths))
    return [
        {
            "source": source,
            "item": item.id,
            "condition": name,
            "order": list(orders.get(name, ())),
            "program": programs.get(name),
            "label": item.label,
            "question": item.question,
            "options": list(item.options),
            "logprobs": [list(option) for option in found.tokens],
        }
        for name, found in scores.items()
    ]


# What came of it.


@dataclass(slots=True)
class Answers:
    """One source's records as arrays, items in their order.

    Attributes:
        picks: the chosen option by condition, [items].
        right: whether it is the right one.
        scores: of every option by condition, a list of [options] for each item.
        items: what was asked.
    """

    picks: dict[str, Array]
    right: dict[str, Array]
    scores: dict[str, list[Array]]
    items: list[Item]

    @property
    def orders(self) -> list[str]:
        """Plain prompts."""
        return [c for c in self.picks if c in ("normal", "reversed") or c.startswith("order ")]

    @property
    def n(self) -> int:
        return len(self.items)

    @property
    def chance(self) -> float:
        return float(np.mean([1 / len(item.options) for item in self.items]))

    @property
    def mean_right(self) -> Array:
        """How often each item is right over the orders."""
        found: Array = np.stack([self.right[c] for c in self.orders]).mean(0)
        return found

    def largest(self, conditions: Sequence[str]) -> float:
        """The largest difference of any option's score between any two of these conditions."""
        most = 0.0
        for one, other in itertools.combinations(conditions, 2):
            for a, b in zip(self.scores[one], self.scores[other], strict=True):
                most = max(most, float(np.abs(a - b).max()))
        return most

    def differ(self, one: str, other: str) -> int:
        """Items with another answer."""
        return int((self.picks[one] != self.picks[other]).sum())

    def distinct(self) -> Array:
        """How many different answers each item gets over the orders."""
        table = np.stack([self.picks[c] for c in self.orders], axis=1)
        return np.array([len(set(row.tolist())) for row in table])


def read(records: Sequence[Record], score: str) -> dict[str, Answers]:
    """Records by source; conditions that some items lack (few options, few orders) are left out."""
    by_source: dict[str, dict[str, dict[str, Record]]] = {}
    for record in records:
        items = by_source.setdefault(record["source"], {})
        items.setdefault(record["item"], {})[record["condition"]] = record
    found = {}
    for source, items in by_source.items():
        first = next(iter(items.values()))
        common = [c for c in first if all(c in conditions for conditions in items.values())]
        scores = {
            c: [_scored(conditions[c]["logprobs"], score) for conditions in items.values()]
            for c in common
        }
        picks = {c: np.array([best(s.tolist()) for s in scores[c]]) for c in common}
        asked = [_item_of(conditions[common[0]]) for conditions in items.values()]
        labels = np.array([item.label for item in asked])
        right = {c: picks[c] == labels for c in common}
        found[source] = Answers(picks, right, scores, asked)
    return found


def _item_of(record: Record) -> Item:
    return Item(record["item"], record["question"], tuple(record["options"]), record["label"])


def _scored(logprobs: Sequence[Sequence[float]], score: str) -> Array:
    """[options], from the log-probabilities of each option's tokens."""
    found = OptionScores(tuple(tuple(option) for option in logprobs))
    return np.array(found.sums if score == "sum" else found.means)


def conclude(settings: Settings, records: Sequence[Record]) -> Findings:
    answers = read(records, settings.score)
    findings = Findings(summary=_summary(answers, settings))
    p_values = holm([mcnemar(a.right["set"], a.right["normal"]) for a in answers.values()])
    for (source, found), p in zip(answers.items(), p_values, strict=True):
        findings.statements += _statements(source, found, settings, p)
    findings.facts = _facts(answers)
    findings.figures = _figures(answers)
    findings.tables = [_accuracies(records), _spread(answers)]
    findings.examples = [_examples(source, found) for source, found in answers.items()]
    findings.limits = _limits(answers, settings)
    return findings


def _statements(
    source: str, found: Answers, settings: Settings, p_normal: float
) -> list[Statement]:
    largest = found.largest(_SET_LAYOUTS)
    moved = wilson(int((found.distinct() > 1).sum()), found.n)
    against = paired_difference(found.right["set"], found.mean_right)
    normal = paired_difference(found.right["set"], found.right["normal"])
    both = found.right["normal"] & found.right["reversed"]
    either = found.right["normal"] | found.right["reversed"]
    above = paired_difference(found.right["set"], both)
    below = paired_difference(either, found.right["set"])
    n_orders = len(found.orders)
    same: Verdict = "holds" if largest < settings.tolerance else "fails"
    statements = [
        Statement(
            f"{source}: as a set, no layout of the options (sorted, as given, reversed, padded) "
            f"changes a log-probability by more than rounding; largest difference",
            largest,
            same,
        ),
        Statement(
            f"{source}: as plain text, {n_orders} orders give more than one answer to a visible "
            f"share of items (5 %)",
            moved,
            _above(moved, _VISIBLE),
        ),
        Statement(
            f"{source}: the set's accuracy is within {_MARGIN:.2f} of the mean over orders; "
            "difference",
            against,
            _within(against, _MARGIN),
        ),
        Statement(
            f"{source}: the set's accuracy is at least the share of items that are right in both "
            "directions; difference",
            above,
            _above(above, 0),
        ),
        Statement(
            f"{source}: the set's accuracy is at most the share of items that are right in "
            "either direction; difference",
            below,
            _above(below, 0),
        ),
        Statement(
            f"{source}: the set against the order as given (McNemar, Holm over sources); "
            "difference",
            normal,
            p=p_normal,
        ),
    ]
    for half in _HALVES:
        n = found.differ(half, f"{half} reversed")
        share = wilson(n, found.n)
        statements.append(
            Statement(
                f"{source}: {half} is not enough: reversing the options changes answers; share",
                share,
                "holds" if n else "open",
            )
        )
    return statements


def _above(found: Interval, bound: float) -> Verdict:
    if found.low >= bound:
        return "holds"
    return "fails" if found.high < bound else "open"


def _within(found: Interval, margin: float) -> Verdict:
    if -margin <= found.low and found.high <= margin:
        return "holds"
    return "fails" if found.low > margin or found.high < -margin else "open"


def _summary(answers: Mapping[str, Answers], settings: Settings) -> str:
    parts = []
    for source, found in answers.items():
        share = float((found.distinct() > 1).mean())
        parts.append(
            f"On {found.n} items of {source}, {len(found.orders)} orders of the same options give "
            f"different answers to {share:.0%}; as a set there is one answer, right in "
            f"{found.right['set'].mean():.0%} (orders: {found.mean_right.mean():.0%} on average, "
            f"chance {found.chance:.0%})."
        )
    return " ".join(parts)


def _facts(answers: Mapping[str, Answers]) -> list[tuple[str, str]]:
    most = max(found.largest(_SET_LAYOUTS) for found in answers.values())
    orders = max(found.largest(found.orders) for found in answers.values())
    moved = sum(int((found.distinct() > 1).sum()) for found in answers.values())
    n = sum(found.n for found in answers.values())
    return [
        (
            "0" if most == 0 else f"{most:.0e}",
            "largest change of a log-probability over layouts of a set",
        ),
        (f"{orders:.1f}", "the same over orders of plain text"),
        (f"{moved / n:.0%}", "of items get different answers in different orders"),
        (f"{n}", "items"),
    ]


def _figures(answers: Mapping[str, Answers]) -> list[Dots | Bars]:
    accuracy, bands, paired, flips = [], [], [], []
    for source, found in answers.items():
        others = np.mean([found.right[c] for c in found.orders[2:] or found.orders], axis=0)
        halves = {
            half: np.mean([found.right[half], found.right[f"{half} reversed"]], axis=0)
            for half in _HALVES
        }
        values = {
            "order as given": found.right["normal"],
            "reversed": found.right["reversed"],
            "other orders, mean": others,
            "set": found.right["set"],
            **{f"{half}, mean": value for half, value in halves.items()},
        }
        title = f"{source} (n = {found.n})"
        accuracy.append((title, tuple((k, _estimate(v)) for k, v in values.items())))
        both = (found.right["normal"] & found.right["reversed"]).mean()
        either = (found.right["normal"] | found.right["reversed"]).mean()
        bands.append((float(both), float(either), "right in both directions … in either"))
        paired.append(
            (
                title,
                tuple(
                    (k, paired_difference(v, found.mean_right))
                    for k, v in values.items()
                    if k != "other orders, mean"
                ),
            )
        )
        pairs = {
            "plain text": ("normal", "reversed"),
            "mask only": ("mask only", "mask only reversed"),
            "position only": ("position only", "position only reversed"),
            "set": ("set as given", "set reversed"),
        }
        flips.append(
            (title, tuple((k, wilson(found.differ(*v), found.n)) for k, v in pairs.items()))
        )
    most = max(int(found.distinct().max()) for found in answers.values())
    counted = [
        (f"{source} ({len(found.orders)} orders)",
         tuple(float((found.distinct() == k + 1).sum()) for k in range(most)))
        for source, found in answers.items()
    ]  # fmt: skip
    return [
        Dots(
            "accuracy", "Accuracy", tuple(accuracy), "items answered rightly (%)", percent=True,
            bands=tuple(bands),
            note="Intervals (95 %): Wilson's; of means over orders a bootstrap over items.",
        ),
        Dots(
            "paired", "Against the mean over orders, item by item", tuple(paired),
            "difference of accuracy (points)", zero=True, percent=True,
            note="Paired over items: what makes an item hard for every order cancels.",
        ),
        Dots(
            "flips", "Answers that change when the options are reversed", tuple(flips),
            "items with another answer (%)", percent=True, note="Wilson intervals (95 %).",
        ),
        Bars(
            "distinct", "How many different answers an item gets over the orders",
            tuple(str(k + 1) for k in range(most)), tuple(counted), "items",
            category_axis="different answers",
        ),
    ]  # fmt: skip


def _accuracies(records: Sequence[Record]) -> Table:
    rows: list[tuple[Any, ...]] = []
    by_score = {score: read(records, score) for score in ("sum", "per token")}
    for source, found in by_score["sum"].items():
        other = by_score["per token"][source]
        named = {
            "normal": "order as given",
            "reversed": "reversed",
            "set": "set",
            "set padded": "set, padded",
            "mask only": "mask only",
            "mask only reversed": "mask only, reversed",
            "position only": "position only",
            "position only reversed": "position only, reversed",
        }
        for condition, name in named.items():
            rows.append(
                (f"{source}: {name}", *(_share(one.right[condition]) for one in (found, other)))
            )
        for name, join in (("both directions", np.logical_and), ("either", np.logical_or)):
            cells = (
                _share(join(one.right["normal"], one.right["reversed"])) for one in (found, other)
            )
            rows.append((f"{source}: right in {name}", *cells))
        rows.append(
            (f"{source}: mean over {len(found.orders)} orders",
             *(bootstrap_mean(one.mean_right) for one in (found, other)))
        )  # fmt: skip
        rows.append((f"{source}: chance", *(found.chance,) * 2))
    return Table(
        "Accuracy by condition and score",
        ("condition", "sum of log-probabilities", "per token"),
        tuple(rows),
        note="Wilson intervals (95 %); the mean over orders with a bootstrap over items.",
    )


def _examples(source: str, found: Answers) -> Texts:
    """The items that get most different answers over the orders; the first of them."""
    chosen = np.argsort(-found.distinct(), kind="stable")[:_N_EXAMPLES].tolist()
    rows = []
    for i in chosen:
        item = found.items[i]
        said = [f"{c}: {item.options[int(found.picks[c][i])]}" for c in found.orders]
        rows.append(
            (
                item.id,
                item.question,
                "\n".join(f"{o} ✓" if k == item.label else o for k, o in enumerate(item.options)),
                "\n".join(said),
                item.options[int(found.picks["set"][i])],
            )
        )
    return Texts(
        f"{source}: items whose answer depends most on the order",
        ("item", "question", "options as given", "answers as text", "as a set"),
        tuple(rows),
    )


def _share(right: Array) -> Interval:
    return wilson(int(right.sum()), len(right))


def _estimate(right: Array) -> Interval:
    """Of truth values, or of shares of them by item."""
    return _share(right) if right.dtype == bool else bootstrap_mean(right)


def _spread(answers: Mapping[str, Answers]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for source, found in answers.items():
        groups = {
            "orders of plain text": found.orders,
            "mask only, two directions": ["mask only", "mask only reversed"],
            "position only, two directions": ["position only", "position only reversed"],
            "layouts of the set": list(_SET_LAYOUTS),
            "set, padded and not": ["set as given", "set padded"],
        }
        for name, conditions in groups.items():
            picks = np.stack([found.picks[c] for c in conditions], axis=1)
            rows.append((f"{source}: {name}", found.largest(conditions), agreement(picks)))
    return Table(
        "How far the layouts agree",
        ("between", "largest difference of a log-probability", "agreement of two answers"),
        tuple(rows),
        note="Agreement: how often two layouts of an item give the same answer.",
    )


def _limits(answers: Mapping[str, Answers], settings: Settings) -> list[str]:
    limits = []
    for source, found in answers.items():
        against = paired_difference(found.right["set"], found.mean_right)
        seen = 100 * (against.high - against.low) / 2
        limits.append(
            f"{source}: with {found.n} items, differences of accuracy below about {seen:.0f} "
            "points cannot be told from none."
        )
        if _share(found.right["set"]).low <= found.chance:
            limits.append(
                f"{source}: the model is not clearly above chance there, so that accuracies say "
                "little; what depends on the order does not need them."
            )
        limits.append(f"{source}: {len(found.orders)} orders of an item were asked, not all.")
    return [
        *limits,
        "The model may have read the items in training (the training split of CommonsenseQA is "
        "public); that does not touch what depends on the order alone.",
        "Options are scored by the log-probability of their text. The paper's other score "
        "(greedy text that holds one option) is not run.",
        "Prompts are plain text, without a chat template, for base and chat models alike.",
        *(
            ["Records repeat to rounding, not to the bit: the rows of a batch round together."]
            if settings.numerics == "fast"
            else []
        ),
        "Sets within sets are undefined in the paper and refused.",
    ]


_QUICK = Settings(items=("synthetic",), n_items=16, orders=2)
_FULL = Settings(
    items=("hub:tau/commonsense_qa:default:validation", "hub:cais/mmlu:all:test"),
    n_items=500,
    orders=4,
)
STUDY = Study(
    name="set-based-prompting",
    title="A prompt whose options have no order",
    paper=(
        'McIlroy-Young et al. 2024, "Order-Independence Without Fine Tuning" (arXiv 2406.06581)'
    ),
    needs="any model with attention; multiple-choice items (made here, a file, or the Hub's)",
    version=2,
    quick=_QUICK,
    full=_FULL,
    prepare=prepare,
    measure=measure,
    conclude=conclude,
)
