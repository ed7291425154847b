"""Numbers that a model's cannot hold are refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.edits.small_models import model, resolved

from invivo.edits.number_range import check_numbers
from invivo.errors import InvalidRequest

AT = {"at": "layers.*.resid.post"}


@pytest.mark.parametrize(
    ("program", "field"),
    [
        ({"steps": [AT | {"do": "scale", "a": -1e39}]}, "steps[0].a"),
        ({"steps": [AT | {"do": "zero"}, AT | {"do": "add", "v": 1e300}]}, "steps[1].v"),
        ({"steps": [AT | {"do": "add", "v": [0.0] * 15 + [1e39]}]}, "steps[0].v"),
        ({"steps": [AT | {"do": "clamp", "min": -1e39}]}, "steps[0].min"),
        ({"sweep": {"a": [1, 1e39]}, "steps": [AT | {"do": "scale", "a": "$a"}]}, "steps[0].a"),
        ({"params": {"p": {"shape": [16], "init": 1e39}}}, "params.p.init"),
    ],
)
def test_a_number_beyond_the_models_is_refused(program: dict[str, Any], field: str) -> None:
    one = resolved(model("llama"), program)
    check_numbers(one, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(InvalidRequest, match="this model's numbers") as caught:
            check_numbers(one, dtype)
        assert caught.value.field == field


def test_float16_holds_less() -> None:
    one = resolved(model("llama"), {"steps": [AT | {"do": "scale", "a": 1e5}]})
    check_numbers(one, torch.bfloat16)
    with pytest.raises(InvalidRequest):
        check_numbers(one, torch.float16)
