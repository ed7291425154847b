"""Measuring some units of a run again: are the records still the same?"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from invivo.errors import InvalidRequest
from invivo.lm import LM
from invivo.studies.run_folder import RunFolder
from invivo.studies.running import finished, identity_of
from invivo.studies.study import Record, Study


@dataclass(slots=True)
class Verified:
    """What was compared.

    Attributes:
        units: keys of the units measured again.
        numbers: how many numbers were compared, and how many of them differ at all.
        largest: difference of two numbers.
        broken: units whose records differ in more than the size of a number.
    """

    units: list[str]
    numbers: int = 0
    differing: int = 0
    largest: float = 0.0
    broken: list[str] = field(default_factory=list)


def verify(
    folder: RunFolder, studies: Sequence[Study[Any]], lm: LM, *, n: int = 3, seed: int = 0
) -> Verified:
    """Measure ``n`` units drawn at random again and compare; the run itself is left as it is.

    Raises:
        NotFound: no such study, or not all records are there.
        InvalidRequest: the model, the data or the study are not those of the run.
    """
    study, settings = finished(folder, studies)
    work = study.prepare(settings)
    manifest, now = folder.read_manifest(), identity_of(study, lm, settings, work)
    for name, value in now.items():
        if manifest[name] != value:
            raise InvalidRequest(
                "is not that of the run",
                field=name,
                given=value,
                remedy=f"The run has {manifest[name]}",
            )
    before: dict[str, list[Record]] = {}
    for record in folder.read_records():
        before.setdefault(record.pop("unit"), []).append(record)
    chosen = random.Random(seed).sample(list(work.units), min(n, len(work.units)))
    found = Verified([unit.key for unit in chosen])
    for unit in chosen:
        if not _compare(before[unit.key], study.measure(lm, settings, unit), found):
            found.broken.append(unit.key)
    return found


def _compare(one: Any, other: Any, found: Verified) -> bool:
    """Whether both are alike up to the sizes of numbers, which are entered in ``found``."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            _compare(value, other[key], found) for key, value in one.items()
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(
            _compare(a, b, found) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, float) and isinstance(other, int | float):
        found.numbers += 1
        if one != other:
            found.differing += 1
            found.largest = max(found.largest, abs(one - other))
        return math.isfinite(one - other)
    return bool(one == other)
