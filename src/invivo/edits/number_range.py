"""Whether a model's numbers can hold those of a program."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from invivo.edits.resolved import ResolvedProgram
from invivo.errors import InvalidRequest


def check_numbers(resolved: ResolvedProgram, dtype: torch.dtype) -> None:
    """Check that every number that is written out in a program is finite as a ``dtype``.

    Raises:
        InvalidRequest: one is not.
    """
    largest = torch.finfo(dtype).max
    for name, parameter in resolved.program.params.items():
        if not isinstance(parameter.init, str):
            _check(parameter.init, largest, dtype, f"params.{name}.init")
    seen: set[int] = set()  # what does not vary is the same object in all rows, layers and runs
    for touch in (t for row in resolved.rows for run in row.runs.values() for t in run.touches):
        for name, value in touch.args.items():
            if id(value) not in seen:
                seen.add(id(value))
                for number in _numbers_of(value):
                    _check(number, largest, dtype, f"steps[{touch.step}].{name}")


def _numbers_of(value: object) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, tuple):
        for inner in value:
            yield from _numbers_of(inner)


def _check(number: float, largest: float, dtype: torch.dtype, path: str) -> None:
    if abs(number) > largest:
        name = str(dtype).removeprefix("torch.")
        raise InvalidRequest(
            f"this model's numbers ({name}) go up to {largest:.2g}", field=path, given=number
        )
