"""A planted model behind the LM interface: on the live engine, or on the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.oracle_lm import OracleLM

from invivo.instruments.planted.checkpoint import PlantedModel
from invivo.instruments.planted.truth import Case
from invivo.local import LocalLM
from invivo.models.load import load_model

WAYS = ["engine", "oracle"]  # float32 in batches, float64 by definition


@contextmanager
def served(model: PlantedModel, folder: Path, way: str) -> Iterator[Any]:
    """The model saved, loaded as any other, and asked in one of ``WAYS``."""
    dtype = torch.float32 if way == "engine" else torch.float64
    loaded = load_model(str(model.save(folder / f"{model.name}-{way}", dtype=dtype)), dtype=dtype)
    with LocalLM(loaded) as lm:
        yield lm if way == "engine" else OracleLM(lm)


def difference(lm: Any, case: Case, steps: list[dict[str, Any]], **more: Any) -> float:
    """The logit difference of a case's two answers under ``steps``."""
    program = {
        "runs": {"cf": {"prompt": list(case.counterfactual)}} | more.pop("runs", {}),
        "steps": steps,
        "out": [{"measure": "logit_diff", "a": case.answer, "b": case.other}],
    }
    return float(lm.run(program, list(case.tokens)).measures[0].values[0])


def answer(lm: Any, case: Case, steps: list[dict[str, Any]]) -> int:
    """The likeliest word under ``steps``."""
    out = [{"capture": "logits", "pos": "@last", "name": "logits"}]
    got = lm.run({"steps": steps, "out": out}, list(case.tokens)).array("logits")
    return int(got.reshape(-1).argmax())
