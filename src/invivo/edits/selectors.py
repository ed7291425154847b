"""Selectors: positions of a prompt named by index, by text, by role, or from one another.

A selector that matches nothing, or more than it says, is an error: never a silent no-op.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from invivo.edits.linear_regex import Pattern
from invivo.edits.prompt_text import PromptText
from invivo.edits.reading import (
    Fields,
    read_bool,
    read_choice,
    read_int,
    read_list,
    read_name,
    read_string,
)
from invivo.errors import InvalidRequest

KINDS = (
    "index",
    "range",
    "offset",
    "span",
    "regex",
    "token",
    "same_token_as",
    "role",
    "group",
    "prompt",
    "generated",
    "all",
    "or",
    "and",
    "not",
)
TAKES = ("all", "first", "last", "one")
# Kinds that may occur several times in a prompt, so that ``nth`` says which.
_REPEATED = ("span", "regex", "token", "same_token_as", "role", "group")
_DEEPEST = 12
_INT = 2**31
# Names that need no declaration.
BUILTIN: dict[str, dict[str, object]] = {
    "first": {"index": 0},
    "last": {"index": -1},
    "prompt": {"prompt": True},
    "generated": {"generated": True},
    "all": {"all": True},
}


@dataclass(frozen=True, slots=True)
class Selector:
    """One selector; which fields matter depends on ``kind``.

    Attributes:
        kind: one of :data:`KINDS`, or "ref" for the name of another selector ("@name").
        ints: index: the indices (negative: from the prompt's end). range: start and stop.
            offset: how far. generated: first and end of the decode steps, -1 for no end.
        text: span: the text. regex: the pattern. token: the text, or its id in ``ints``. role,
            group: the name. ref: the name.
        parts: offset, same_token_as, not: what they refer to. or, and: the parts.
        nth: which occurrence (negative: from the end); "all"; None: it must be the only one.
        take: which of the tokens: "all", "first", "last"; "one": there must be one only.
        group: regex: number of the group.
    """

    kind: str
    ints: tuple[int, ...] = ()
    text: str = ""
    parts: tuple[Selector, ...] = ()
    nth: int | str | None = None
    take: str = "all"
    group: int = 0


def ref(name: str) -> Selector:
    return Selector("ref", text=name)


def read_selector(value: object, path: str, depth: int = 0) -> Selector:
    """From JSON: "@name" or an object with one of :data:`KINDS` as a key.

    Raises:
        InvalidRequest: with the path of what is wrong.
    """
    if depth > _DEEPEST:
        raise InvalidRequest(f"selectors nest at most {_DEEPEST} deep", field=path)
    if isinstance(value, str):
        if not value.startswith("@"):
            raise InvalidRequest(
                "a selector is needed", field=path, given=value, remedy='Write "@name" or {...}'
            )
        return ref(read_name(value[1:], path))
    fields = Fields(value, path)
    found = [kind for kind in KINDS if fields.has(kind)]
    if "regex" in found and "group" in found:  # there it is the number of the pattern's group
        found.remove("group")
    if len(found) != 1:
        raise InvalidRequest(
            "a selector has exactly one kind",
            field=path,
            given=found,
            remedy=f"Kinds: {', '.join(KINDS)}",
        )
    kind, argument, at = found[0], fields.take(found[0]), fields.at(found[0])
    ints: tuple[int, ...] = ()
    text = ""
    parts: tuple[Selector, ...] = ()
    group = 0
    match kind:
        case "index":
            several = argument if isinstance(argument, list | tuple) else [argument]
            listed = read_list(several, at, least=1, most=65_536)
            ints = tuple(read_int(i, at, least=-_INT, most=_INT) for i in listed)
        case "range":
            both = read_list(argument, at, least=2, most=2)
            ints = tuple(read_int(i, at, least=-_INT, most=_INT) for i in both)
        case "offset":
            ints = (read_int(argument, at, least=-_INT, most=_INT),)
            parts = (read_selector(fields.need("of"), fields.at("of"), depth + 1),)
        case "span":
            text = read_string(argument, at)
        case "regex":
            text = read_string(argument, at, longest=512)
            group = read_int(fields.take("group", 0), fields.at("group"), least=0, most=99)
            pattern = Pattern(text, field=at)
            if group > pattern.n_groups:
                raise InvalidRequest(
                    f"the pattern has {pattern.n_groups} groups",
                    field=fields.at("group"),
                    given=group,
                )
        case "token":
            if isinstance(argument, str):
                text = read_string(argument, at)
            else:
                ints = (read_int(argument, at, least=0, most=_INT),)
        case "same_token_as" | "not":
            parts = (read_selector(argument, at, depth + 1),)
        case "role" | "group":
            text = read_string(argument, at, longest=64)
        case "generated" if argument is not True:
            first, end = read_list(argument, at, least=2, most=2)
            low = read_int(first, at, least=0, most=_INT)
            ints = (low, -1 if end is None else read_int(end, at, least=low + 1, most=_INT))
        case "generated" | "prompt" | "all":
            if not read_bool(argument, at):
                raise InvalidRequest("only true makes sense here", field=at, given=argument)
        case _:
            listed = read_list(argument, at, least=1, most=64)
            parts = tuple(
                read_selector(part, f"{at}[{i}]", depth + 1) for i, part in enumerate(listed)
            )
    nth: int | str | None = None
    if kind in _REPEATED and fields.has("nth"):
        nth = fields.take("nth")
        if nth != "all":
            nth = read_int(nth, fields.at("nth"), least=-_INT, most=_INT)
    take = read_choice(fields.take("take", "all"), fields.at("take"), TAKES)
    fields.done()
    return Selector(kind, ints, text, parts, nth, take, group)


def selector_to_json(selector: Selector) -> object:
    """The canonical form: defaults left out."""
    kind, ints = selector.kind, selector.ints
    if kind == "ref":
        return f"@{selector.text}"
    parts = [selector_to_json(part) for part in selector.parts]
    out: dict[str, object]
    match kind:
        case "index":
            out = {kind: ints[0] if len(ints) == 1 else list(ints)}
        case "range":
            out = {kind: list(ints)}
        case "offset":
            out = {kind: ints[0], "of": parts[0]}
        case "token" if ints:
            out = {kind: ints[0]}
        case "same_token_as" | "not":
            out = {kind: parts[0]}
        case "generated" if ints:
            out = {kind: [ints[0], None if ints[1] < 0 else ints[1]]}
        case "generated" | "prompt" | "all":
            out = {kind: True}
        case "or" | "and":
            out = {kind: parts}
        case _:
            out = {kind: selector.text}
    if selector.group:
        out["group"] = selector.group
    if selector.nth is not None:
        out["nth"] = selector.nth
    if selector.take != "all":
        out["take"] = selector.take
    return out


@dataclass(frozen=True, slots=True)
class Positions:
    """A set of token positions as sorted, disjoint, half-open ranges."""

    ranges: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def __contains__(self, index: int) -> bool:
        return any(start <= index < stop for start, stop in self.ranges)

    def indices(self) -> list[int]:
        return [i for start, stop in self.ranges for i in range(start, stop)]

    def places(self) -> Sequence[int]:
        """:meth:`indices` for looking up: a range where they are one."""
        return range(*self.ranges[0]) if len(self.ranges) == 1 else self.indices()

    @property
    def first(self) -> int:
        return self.ranges[0][0]

    def below(self, length: int) -> list[int]:
        """The indices before ``length``."""
        return [i for a, b in self.ranges for i in range(a, min(b, length))]

    def since(self, start: int) -> Positions:
        """Those from ``start`` on."""
        return Positions(tuple((max(a, start), b) for a, b in self.ranges if b > start))

    def __or__(self, other: Positions) -> Positions:
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self.ranges + other.ranges):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
            else:
                merged.append((start, stop))
        return Positions(tuple(merged))

    def complement(self, length: int) -> Positions:
        """What of [0, length) is not in this set."""
        edges = [0, *(edge for pair in self.ranges for edge in pair), length]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return Positions(tuple((a, b) for a, b in pairs if a < b))

    def within(self, other: Positions, length: int) -> Positions:
        """The intersection, all inside [0, length)."""
        return (self.complement(length) | other.complement(length)).complement(length)


def positions_of(indices: Iterable[int]) -> Positions:
    ranges: list[tuple[int, int]] = []
    for i in sorted(set(indices)):
        if ranges and ranges[-1][1] == i:
            ranges[-1] = (ranges[-1][0], i + 1)
        else:
            ranges.append((i, i + 1))
    return Positions(tuple(ranges))


class Resolver:
    """Selectors of one program on one prompt.

    Args:
        named: the program's named selectors.
        prompt: the tokens.
        run: name of the run, for errors.
    """

    __slots__ = ("_done", "_ends", "_tokens", "_within", "named", "prompt", "run")

    def __init__(self, named: Mapping[str, Selector], prompt: PromptText, run: str) -> None:
        self.named = named
        self.prompt = prompt
        self.run = run
        self._done: dict[Selector, Positions] = {}
        self._within: list[str] = []
        # Prompt tokens with characters of their own, and where those end, for bisection.
        self._tokens = [i for i, (a, b) in enumerate(prompt.offsets[: prompt.n_prompt]) if a < b]
        self._ends = [prompt.offsets[i][1] for i in self._tokens]

    def _tokens_over(self, start: int, end: int) -> list[int]:
        """Prompt tokens whose characters meet [start, end) of the text."""
        found = []
        for at in range(bisect_right(self._ends, start), len(self._tokens)):
            i = self._tokens[at]
            if self.prompt.offsets[i][0] >= end:
                break
            found.append(i)
        return found

    def resolve(self, selector: Selector, path: str) -> Positions:
        """Positions in the prompt and, where selected, among the tokens to be generated.

        Raises:
            InvalidRequest: nothing matches, more than the selector allows does, or names go in
                circles.
        """
        found = self._done.get(selector)
        if found is None:
            found = self._take(selector, self._find(selector, path), path)
            self._done[selector] = found
        return found

    def _wrong(self, what: str, path: str, remedy: str | None = None) -> InvalidRequest:
        return InvalidRequest(
            f'{what} in the prompt of run "{self.run}"', field=path, remedy=remedy
        )

    def _take(self, selector: Selector, found: Positions, path: str) -> Positions:
        n = len(found)
        if n == 0:
            raise self._wrong(f"{_shown(selector)} matches nothing", path)
        if n == 1 or selector.take == "all":
            return found
        if selector.take == "one":
            raise self._wrong(
                f"{_shown(selector)} matches {n} tokens", path, "Take first, last or all"
            )
        start, stop = found.ranges[0][0], found.ranges[-1][1]
        one = start if selector.take == "first" else stop - 1
        return Positions(((one, one + 1),))

    def _find(self, selector: Selector, path: str) -> Positions:
        prompt = self.prompt
        n, length = prompt.n_prompt, prompt.length
        match selector.kind:
            case "ref":
                return self._named(selector.text, path)
            case "index":
                return positions_of(self._inside(i, path) for i in selector.ints)
            case "range":
                start, stop = (i + n if i < 0 else i for i in selector.ints)
                if not 0 <= start < stop <= n:
                    raise self._wrong(
                        f"the range {selector.ints[0]} to {selector.ints[1]} does not lie", path
                    )
                return Positions(((start, stop),))
            case "offset":
                base = self.resolve(selector.parts[0], f"{path}.of")
                moved = [i + selector.ints[0] for i in base.indices()]
                if moved[0] < 0 or moved[-1] >= length:
                    raise self._wrong(f"offset {selector.ints[0]} leads outside, not", path)
                return positions_of(moved)
            case "generated":
                first, end = selector.ints or (0, -1)
                stop = length if end < 0 else min(n + end, length)
                return Positions(((n + first, stop),) if n + first < stop else ())
            case "prompt":
                return Positions(((0, n),))
            case "all":
                return Positions(((0, length),))
            case "or":
                total = Positions(())
                for i, part in enumerate(selector.parts):
                    total = total | self.resolve(part, f"{path}.or[{i}]")
                return total
            case "and":
                total = Positions(((0, length),))
                for i, part in enumerate(selector.parts):
                    total = total.within(self.resolve(part, f"{path}.and[{i}]"), length)
                return total
            case "not":
                return self.resolve(selector.parts[0], f"{path}.not").complement(length)
            case _:
                return self._occurrence(selector, path)

    def _named(self, name: str, path: str) -> Positions:
        selector = self.named.get(name)
        if selector is None and name in BUILTIN:
            selector = read_selector(BUILTIN[name], path)
        if selector is None:
            known = sorted({*self.named, *BUILTIN})
            raise InvalidRequest(
                "there is no selector of this name",
                field=path,
                given=f"@{name}",
                remedy=f"Known: {', '.join(known)}",
            )
        if name in self._within:
            circle = " -> ".join(f"@{x}" for x in [*self._within, name])
            raise InvalidRequest(f"selectors refer to each other in a circle: {circle}", field=path)
        self._within.append(name)
        try:
            return self.resolve(selector, f"sel.{name}")
        finally:
            self._within.pop()

    def _inside(self, index: int, path: str) -> int:
        n = self.prompt.n_prompt
        if not -n <= index < n:
            raise self._wrong(f"there is no token {index} among the {n}", path)
        return index % n

    def _occurrence(self, selector: Selector, path: str) -> Positions:
        """The occurrences of a text, token, turn or group, of which ``nth`` picks."""
        found = self._occurrences(selector, path)
        shown, nth = _shown(selector), selector.nth
        if not found:
            raise self._wrong(f"{shown} does not occur", path)
        if nth == "all":
            return positions_of(i for tokens in found for i in tokens)
        if nth is None:
            if len(found) > 1:
                raise self._wrong(
                    f"{shown} occurs {len(found)} times", path, 'Say which with nth, or nth "all"'
                )
            nth = 0
        assert isinstance(nth, int)
        if not -len(found) <= nth < len(found):
            raise self._wrong(f"{shown} occurs {len(found)} times, not {nth} and more,", path)
        return positions_of(found[nth])

    def _occurrences(self, selector: Selector, path: str) -> list[list[int]]:
        prompt, text = self.prompt, selector.text
        n = prompt.n_prompt
        match selector.kind:
            case "span":
                starts, at = [], prompt.text.find(text)
                while at >= 0:
                    starts.append(at)
                    at = prompt.text.find(text, at + len(text))
                tokens = [self._tokens_over(at, at + len(text)) for at in starts]
            case "regex":
                pattern = Pattern(text, field=path)
                groups = [match[selector.group] for match in pattern.find_all(prompt.text)]
                tokens = [self._tokens_over(a, b) for a, b in groups]
            case "token":
                wanted = selector.ints[0] if selector.ints else None
                tokens = [
                    [i]
                    for i in range(n)
                    if (prompt.texts[i] == text if wanted is None else prompt.ids[i] == wanted)
                ]
            case "same_token_as":
                of = self.resolve(selector.parts[0], f"{path}.same_token_as").indices()
                if len(of) != 1 or of[0] >= n:
                    raise self._wrong("same_token_as needs one token", path)
                tokens = [
                    [i] for i in range(n) if i != of[0] and prompt.ids[i] == prompt.ids[of[0]]
                ]
            case "role":
                tokens = [list(range(a, b)) for role, a, b in prompt.turns if role == text]
            case _:
                tokens = [list(range(a, b)) for a, b in prompt.groups.get(text, ())]
        return [found for found in tokens if found]


def _shown(selector: Selector) -> str:
    """The selector in an error's words."""
    match selector.kind:
        case "ref":
            return f"@{selector.text}"
        case "span" | "regex" | "token" | "role" | "group":
            return f"{selector.kind} {selector.text or selector.ints[0]!r}"
        case _:
            return f'the selector "{selector.kind}"'


def pair(
    target: Positions,
    source: Positions | None,
    how: str | None,
    target_prompt: PromptText,
    source_prompt: PromptText,
    path: str,
) -> tuple[int, ...]:
    """The source position of each target position, in order.

    Args:
        source: positions selected in the source run; None unless ``how`` needs them.
        how: a pairing of :class:`~invivo.edits.values.Source`.

    Raises:
        InvalidRequest: prompts of different lengths without a map, or positions that find no
            partner.
    """
    targets = target.indices()
    if how is None:
        if target_prompt.n_prompt != source_prompt.n_prompt:
            raise InvalidRequest(
                f"the prompts have {target_prompt.n_prompt} and {source_prompt.n_prompt} tokens",
                field=path,
                remedy="Say how positions pair up: map index, end, selector or one",
            )
        how = "index"
    if how in ("selector", "one"):
        assert source is not None
        sources = source.indices()
        if how == "one":
            if len(sources) != 1:
                raise InvalidRequest(
                    f"map one needs one source position, not {len(sources)}", field=path
                )
            return tuple(sources * len(targets))
        if len(sources) != len(targets):
            raise InvalidRequest(f"{len(sources)} source positions for {len(targets)}", field=path)
        return tuple(sources)
    shift = source_prompt.n_prompt - target_prompt.n_prompt if how == "end" else 0
    paired = tuple(i + shift for i in targets)
    if paired[0] < 0 or paired[-1] >= source_prompt.length:
        raise InvalidRequest(
            f"position {targets[0] if paired[0] < 0 else targets[-1]} has no partner in the source",
            field=path,
            remedy='Narrow the positions of the step, to "@prompt" for instance, or use map one',
        )
    return paired
