"""``invivo models``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("INVIVO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_packaged_models_are_listed(invivo: Invivo) -> None:
    listed = {entry["name"]: entry for entry in invivo("models", "list", "--json").json()}
    assert listed["smollm2-135m"]["licence"] == "Apache-2.0"
    assert listed["smollm2-135m"]["state"] in ("installed", "available")
    assert "smollm2-135m" in invivo("models", "list").out


def test_info_describes_without_loading(invivo: Invivo, tiny: str) -> None:
    from transformers import AutoModelForCausalLM

    facts = invivo("models", "info", tiny, "--json").json()
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert facts["family"] == "llama"
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert "family" in invivo("models", "info", tiny).out


def test_convert_writes_a_folder_that_transformers_loads(
    invivo: Invivo, tiny: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    target = tmp_path / "half"
    ran = invivo("models", "convert", tiny, str(target), "--dtype", "bfloat16")
    assert (ran.code, ran.out.strip()) == (0, str(target))
    ids = torch.tensor([[1, 2, 3]])
    half = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.testing.assert_close(half(ids).logits, whole(ids).logits, atol=0.3, rtol=0.1)
    again = invivo("models", "convert", tiny, str(target))
    assert again.code == 1
    assert "exists" in again.err


def test_a_folder_pulls_as_itself(invivo: Invivo, tiny: str) -> None:
    assert invivo("models", "pull", tiny).out.strip() == tiny


def test_terms_of_use_must_be_accepted(invivo: Invivo) -> None:
    ran = invivo("models", "pull", "gemma3-270m")
    assert ran.code == 1
    assert "--accept-license" in ran.err
