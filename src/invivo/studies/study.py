"""What a study is: work in units, records of each, findings from all records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from invivo.lm import LM
from invivo.report.findings import Findings

S = TypeVar("S")  # a study's settings: a frozen dataclass of plain values
Record = dict[str, Any]  # plain values, texts, numbers and lists of them; every record alike


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of work: measured whole, or again after an interruption."""

    key: str
    given: Any


@dataclass(frozen=True, slots=True)
class Work:
    """Everything that is to be measured.

    Attributes:
        digests: of the data by name, so that a manifest tells other data apart.
    """

    units: Sequence[Unit]
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Study(Generic[S]):
    """A paper's question, asked of any model behind the LM interface.

    Attributes:
        name: as on the command line.
        paper: authors, year, title, where to find it.
        needs: what it takes: models, data, time.
        version: raised whenever the same settings would give other records.
        quick, full: settings; quick ones end within two minutes on two cores.
        prepare: the units of work, in order; reads data, touches no model.
        measure: the records of one unit; the same unit gives the same records.
        conclude: findings from all records, in the order of the units; needs no model.
    """

    name: str
    title: str
    paper: str
    needs: str
    version: int
    quick: S
    full: S
    prepare: Callable[[S], Work]
    measure: Callable[[LM, S, Unit], list[Record]]
    conclude: Callable[[S, Sequence[Record]], Findings]
