"""A study of nothing, over a model that only says who it is."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from invivo.report.findings import Dots, Findings, Statement, Table, Texts
from invivo.statistics import bootstrap_mean, wilson
from invivo.studies.running import run_study
from invivo.studies.study import Record, Study, Unit, Work


@dataclass(frozen=True, slots=True)
class Settings:
    n: int = 6
    factor: float = 2.0
    names: tuple[str, ...] = ("a", "b")


def model(fingerprint: str = "f00") -> Any:
    info = SimpleNamespace(name="toy", fingerprint=fingerprint, dtype="float32", device="cpu")
    return SimpleNamespace(info=lambda: info)


def prepare(settings: Settings) -> Work:
    return Work([Unit(str(i), i) for i in range(settings.n)], {"numbers": "d1"})


measured: list[str] = []  # keys of the units measured in this process
deadly: list[str] = []  # keys at which the process dies


def measure(lm: Any, settings: Settings, unit: Unit) -> list[Record]:
    if unit.key in deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    measured.append(unit.key)
    return [
        {"name": name, "value": settings.factor * unit.given + 0.1, "parts": [unit.given, 0.5]}
        for name in settings.names
    ]


def conclude(settings: Settings, records: Sequence[Record]) -> Findings:
    found = bootstrap_mean([r["value"] for r in records])
    share = wilson(sum(r["value"] > 5 for r in records), len(records))
    return Findings(
        summary=f"{len(records)} records <of nothing>.",
        facts=[("12", "records")],
        statements=[
            Statement("values are large", found, "open"),
            Statement("some", share, "holds"),
        ],
        tables=[Table("Values", ("name", "value"), (("all", found), ("none", None)))],
        figures=[Dots("d", "Dots", (("one", (("all", found),)),), "value")],
        examples=[Texts("To read", ("one", "two"), (("a\nb", "c"),))],
        limits=["There is nothing to say."],
    )  # fmt: skip


STUDY = Study(
    name="toy",
    title="Nothing & more",
    paper="Nobody 2026",
    needs="nothing",
    version=1,
    quick=Settings(),
    full=Settings(n=12),
    prepare=prepare,
    measure=measure,
    conclude=conclude,
)

if __name__ == "__main__":
    deadly.append(sys.argv[2])
    run_study(STUDY, model(), STUDY.quick, Path(sys.argv[1]))
