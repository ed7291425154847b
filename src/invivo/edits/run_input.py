"""What a run sees: other tokens, position numbers of its own, tokens hidden from each other.

Set-based prompting (McIlroy-Young et al. 2024, arXiv 2406.06581) is the operation ``parallel``:
the blocks of a set start at the same position number and do not see each other, and what follows
goes on behind the longest of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from invivo.edits.prompt_text import PromptText
from invivo.edits.resolved import RunInput, Touch
from invivo.edits.selectors import Positions
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig


def build_input(touches: Sequence[Touch], prompt: PromptText, config: ModelConfig) -> RunInput:
    """The input that the touches of input.tokens, input.position and input.mask make.

    Raises:
        InvalidRequest: blocks are not adjacent or overlap, or a number is out of range.
    """
    if not touches:
        return RunInput()
    tokens: dict[int, int] = {}
    numbers: dict[int, int] = {}
    sets: list[tuple[int, tuple[Positions, ...]]] = []
    hidden: list[tuple[Positions, Positions]] = []
    for touch in touches:
        path = f"steps[{touch.step}]"
        match touch.do:
            case "set_tokens":
                _check(touch.args["ids"], config.vocab_size, "token", f"{path}.ids")
                tokens |= _paired(touch, touch.args["ids"], prompt, f"{path}.ids")
            case "set_positions":
                _check(touch.args["values"], config.max_positions, "position", f"{path}.values")
                numbers |= _paired(touch, touch.args["values"], prompt, f"{path}.values")
            case "parallel":
                sets.append((touch.step, touch.args["blocks"]))
            case _:
                assert touch.keys is not None
                if not touch.args["renormalise"]:
                    raise InvalidRequest("a mask always renormalises", field=f"{path}.renormalise")
                keys = touch.keys
                if touch.do == "edge_only":
                    keys = keys.complement(prompt.length)
                if keys.ranges:
                    hidden.append((touch.positions, keys))
    ordered = _sets_in_order(sets, prompt)
    for blocks in ordered:
        for block in blocks:
            (first, stop), start, end = block.ranges[0], blocks[0].first, blocks[-1].ranges[0][1]
            sides = ((start, first), (stop, end))
            hidden.append((block, Positions(tuple((x, y) for x, y in sides if x < y))))
    laid_out = _numbers(ordered, prompt.n_prompt)
    if numbers:
        laid_out = [numbers.get(i, n) for i, n in enumerate(laid_out)]
    plain = laid_out == list(range(prompt.n_prompt))
    return RunInput(tuple(sorted(tokens.items())), () if plain else tuple(laid_out), tuple(hidden))


def _check(values: Sequence[int], limit: int, what: str, path: str) -> None:
    if max(values) >= limit:
        raise InvalidRequest(f"the largest {what} is {limit - 1}", field=path, given=max(values))


def _paired(touch: Touch, values: Sequence[int], prompt: PromptText, path: str) -> dict[int, int]:
    at = touch.positions.below(prompt.n_prompt)
    if len(values) not in (1, len(at)):
        raise InvalidRequest(f"{len(at)} values are needed", field=path, given=len(values))
    return dict(zip(at, values if len(values) == len(at) else [*values] * len(at), strict=True))


def _sets_in_order(
    sets: list[tuple[int, tuple[Positions, ...]]], prompt: PromptText
) -> list[tuple[Positions, ...]]:
    """The sets by their place in the prompt, the blocks of each by theirs."""
    ordered: list[tuple[int, tuple[Positions, ...]]] = []
    for step, blocks in sets:
        path = f"steps[{step}].blocks"
        for i, block in enumerate(blocks):
            if len(block.ranges) != 1 or block.ranges[0][1] > prompt.n_prompt:
                raise InvalidRequest("a block is one piece of the prompt", field=f"{path}[{i}]")
        inside = tuple(sorted(blocks, key=lambda b: b.first))
        for left, right in itertools.pairwise(inside):
            if left.ranges[0][1] != right.first:
                raise InvalidRequest("the blocks of a set lie side by side", field=path)
        ordered.append((step, inside))
    ordered.sort(key=lambda entry: entry[1][0].first)
    for (_, before), (step, after) in itertools.pairwise(ordered):
        if before[-1].ranges[0][1] > after[0].first:
            raise InvalidRequest("sets overlap", field=f"steps[{step}].blocks")
    return [blocks for _, blocks in ordered]


def _numbers(sets: Sequence[tuple[Positions, ...]], n: int) -> list[int]:
    """Position numbers of ``n`` tokens: every block of a set starts where the set does."""
    numbers = list(range(n))
    back = 0  # by how much what follows has moved to the front
    at = 0
    for blocks in sets:
        start, end = blocks[0].first, blocks[-1].ranges[0][1]
        for i in range(at, start):
            numbers[i] = i - back
        for block in blocks:
            first, stop = block.ranges[0]
            for i in range(first, stop):
                numbers[i] = start - back + i - first
        back += end - start - max(len(block) for block in blocks)
        at = end
    for i in range(at, n):
        numbers[i] = i - back
    return numbers
