"""Sizes of an engine: what is given is checked, what is left open suits the device and the rest."""

from __future__ import annotations

from typing import Any

import pytest

from invivo.engine.config import EngineConfig
from invivo.errors import InvalidRequest


@pytest.mark.parametrize(
    ("given", "on_gpu", "expected"),
    [
        ({}, True, (256, 2048)),
        ({}, False, (64, 192)),
        ({"max_running": 8}, False, (8, 192)),
        ({"max_running": 300}, False, (300, 600)),
        ({"max_batch_tokens": 32}, False, (16, 32)),
        ({"max_batch_tokens": 512, "max_running": 100}, False, (100, 512)),
    ],
)
def test_sizes_left_open_suit_the_device_and_those_given(
    given: dict[str, int], on_gpu: bool, expected: tuple[int, int]
) -> None:
    assert EngineConfig(**given).batch_sizes(on_gpu=on_gpu) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_running", 0),
        ("max_running", "8"),
        ("max_batch_tokens", 0),
        ("max_batch_tokens", 1.5),
        ("kv_bytes", -1),
        ("kv_bytes", "2GiB"),
        ("max_model_len", 1),
        ("max_adapters", True),
        ("memory_fraction", 0),
        ("memory_fraction", "most"),
    ],
)
def test_a_size_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EngineConfig(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("given", "on_gpu", "expected"), [(None, True, 50), (None, False, 200), (30.0, False, 30)]
)
def test_a_promise_left_open_suits_the_device(
    given: float | None, on_gpu: bool, expected: float
) -> None:
    assert EngineConfig(tpot_ms=given).promised_tpot_ms(on_gpu=on_gpu) == expected
