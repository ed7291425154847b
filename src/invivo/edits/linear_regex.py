"""Regular expressions in time bounded by pattern times text, for patterns of strangers.

Python's ``re`` backtracks: a pattern of ten characters can keep a server busy for hours. Here the
syntax is parsed by Python, but run as a list of threads, one a state, over the text once (Pike's
construction). Back references and look-around do not fit that and are refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from invivo.errors import InvalidRequest, TooLarge

MAX_STATES = 2_000
BASE_STEPS, STEPS_PER_CHARACTER = 20_000, 12

# One state: ("char", test), ("assert", test), ("split", first, second), ("save", slot), ("match",).
State = tuple[Any, ...]
Slots = tuple[int, ...]

_CATEGORY: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdigit,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}


class Pattern:
    """A compiled pattern.

    Raises:
        InvalidRequest: the pattern is wrong, too large, or of a kind that is not supported.
    """

    def __init__(self, pattern: str, *, field: str) -> None:
        self.field = field
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                compiled = re.compile(pattern)
                from re import _parser as parser  # type: ignore[attr-defined]

                tree = parser.parse(pattern)
        except (re.error, OverflowError, RecursionError, Warning) as error:
            raise InvalidRequest(
                f"this is no regular expression: {error}", field=field, given=pattern
            ) from None
        if compiled.flags & ~re.UNICODE.value:
            raise self._unsupported("flags")
        self.n_groups = compiled.groups
        self.states: list[State] = []
        self._emit("save", 0)
        self._sequence(tree)
        self._emit("save", 1)
        self._emit("match")

    def _unsupported(self, what: str) -> InvalidRequest:
        return InvalidRequest(
            f"{what} cannot be used here",
            field=self.field,
            remedy="Characters, classes, groups, |, *, +, ?, {m,n}, ^, $ and \\b are supported",
        )

    # Compiling.

    def _emit(self, *state: Any) -> int:
        if len(self.states) >= MAX_STATES:
            raise TooLarge(f"the pattern has over {MAX_STATES} states", field=self.field)
        self.states.append(state)
        return len(self.states) - 1

    def _sequence(self, items: Any) -> None:
        for op, argument in items:
            self._item(str(op), argument)

    def _item(self, op: str, argument: Any) -> None:
        match op:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                self._emit("char", self._test(op, argument))
            case "AT":
                self._emit("assert", self._position(str(argument)))
            case "SUBPATTERN":
                group, on, off, inner = argument
                if on or off:
                    raise self._unsupported("flags")
                if group is not None:
                    self._emit("save", 2 * group)
                self._sequence(inner)
                if group is not None:
                    self._emit("save", 2 * group + 1)
            case "BRANCH":
                self._branch(argument[1])
            case "MAX_REPEAT" | "MIN_REPEAT":
                self._repeat(*argument, greedy=op == "MAX_REPEAT")
            case _:
                raise self._unsupported(op.lower().replace("_", " "))

    def _branch(self, choices: list[Any]) -> None:
        ends = []
        for choice in choices[:-1]:
            split = self._emit("split", 0, 0)
            self._sequence(choice)
            ends.append(self._emit("split", 0, 0))
            self.states[split] = ("split", split + 1, len(self.states))
        self._sequence(choices[-1])
        for end in ends:
            self.states[end] = ("split", len(self.states), len(self.states))

    def _repeat(self, least: int, most: Any, inner: Any, *, greedy: bool) -> None:
        for _ in range(least):
            before = len(self.states)
            self._sequence(inner)
            if len(self.states) == before:  # nothing, however often
                return
        unbounded = str(most) == "MAXREPEAT"
        ends = []
        for _ in range(1 if unbounded else int(most) - least):
            split = self._emit("split", 0, 0)
            self._sequence(inner)
            if unbounded:
                self._emit("split", split, split)
            ends.append(split)
        for split in ends:
            inside, after = split + 1, len(self.states)
            self.states[split] = ("split", *((inside, after) if greedy else (after, inside)))

    def _test(self, op: str, argument: Any) -> Callable[[str], bool]:
        match op:
            case "LITERAL":
                wanted = chr(argument)
                return lambda c: c == wanted
            case "NOT_LITERAL":
                unwanted = chr(argument)
                return lambda c: c != unwanted
            case "ANY":
                return lambda c: c != "\n"
            case "RANGE":
                low, high = chr(argument[0]), chr(argument[1])
                return lambda c: low <= c <= high
            case "CATEGORY":
                name = str(argument)
                test = _CATEGORY[name.replace("_NOT_", "_")]
                return (lambda c: not test(c)) if "_NOT_" in name else test
            case _:
                negate = str(argument[0][0]) == "NEGATE"
                tests = [self._test(str(o), a) for o, a in argument[1 if negate else 0 :]]
                return lambda c: any(t(c) for t in tests) != negate

    def _position(self, name: str) -> Callable[[str, int], bool]:
        match name:
            case "AT_BEGINNING" | "AT_BEGINNING_STRING":
                return lambda text, i: i == 0
            case "AT_END":
                return lambda text, i: i == len(text) or (i == len(text) - 1 and text[i] == "\n")
            case "AT_END_STRING":
                return lambda text, i: i == len(text)
            case "AT_BOUNDARY":
                return _at_boundary
            case _:
                return lambda text, i: not _at_boundary(text, i)

    # Running.

    def find_all(self, text: str) -> Iterator[list[tuple[int, int]]]:
        """Matches from left to right, none overlapping: (start, end) of group 0, 1, ...

        A group that took no part has (-1, -1).
        """
        budget = BASE_STEPS + STEPS_PER_CHARACTER * len(text)
        start = 0
        while start <= len(text):
            slots, budget = self._search(text, start, budget)
            if slots is None:
                return
            yield [(slots[2 * g], slots[2 * g + 1]) for g in range(self.n_groups + 1)]
            start = slots[1] if slots[1] > slots[0] else slots[1] + 1

    def _search(self, text: str, start: int, budget: int) -> tuple[Slots | None, int]:
        nothing: Slots = (-1,) * (2 * self.n_groups + 2)
        threads: list[tuple[int, Slots]] = []
        best: Slots | None = None
        for i in range(start, len(text) + 1):
            seen: set[int] = set()
            live: list[tuple[int, Slots]] = []
            for state, slots in threads:
                budget -= self._follow(state, slots, text, i, seen, live)
            if best is None:
                budget -= self._follow(0, nothing, text, i, seen, live)
            budget -= 1
            if budget < 0:
                raise TooLarge(
                    "the pattern is too costly for this prompt",
                    field=self.field,
                    remedy="Make it more specific or use a span",
                )
            threads = []
            for state, slots in live:
                kind = self.states[state]
                if kind[0] == "match":
                    best = slots
                    break  # threads of lower rank are cut off
                if i < len(text) and kind[1](text[i]):
                    threads.append((state + 1, slots))
            if best is not None and not threads:
                break
        return best, budget

    def _follow(
        self,
        state: int,
        slots: Slots,
        text: str,
        i: int,
        seen: set[int],
        live: list[tuple[int, Slots]],
    ) -> int:
        """Add the threads that ``state`` leads to without a character; returns the steps taken."""
        stack, steps = [(state, slots)], 0
        while stack:
            state, slots = stack.pop()
            if state in seen:
                continue
            seen.add(state)
            steps += 1
            kind = self.states[state]
            match kind[0]:
                case "split":
                    stack += [(kind[2], slots), (kind[1], slots)]
                case "save":
                    slot = kind[1]
                    stack.append((state + 1, (*slots[:slot], i, *slots[slot + 1 :])))
                case "assert":
                    if kind[1](text, i):
                        stack.append((state + 1, slots))
                case _:
                    live.append((state, slots))
        return steps


def _at_boundary(text: str, i: int) -> bool:
    word = _CATEGORY["CATEGORY_WORD"]
    before = i > 0 and word(text[i - 1])
    after = i < len(text) and word(text[i])
    return before != after
