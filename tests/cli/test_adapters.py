"""``invivo adapters`` against a server with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo


def test_an_adapter_goes_to_a_server_and_comes_back(
    invivo: Invivo, url: str, adapter: str, tmp_path: Path
) -> None:
    sent = invivo("adapters", "load", "sailor", adapter, "--url", url)
    assert sent.code == 0, sent.err
    assert "sailor is loaded, version 1" in sent.err
    listed = invivo("adapters", "list", "--url", url, "--json").json()
    assert "sailor" in {one["name"] for one in listed}
    assert "sailor" in invivo("adapters", "list", "--url", url).out

    folder = tmp_path / "here"
    saved = invivo("adapters", "save", "sailor", str(folder), "--url", url)
    assert saved.code == 0, saved.err
    assert saved.out.strip() == str(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"

    assert invivo("adapters", "unload", "sailor", "--url", url).code == 0
    gone = invivo("adapters", "save", "sailor", str(folder), "--url", url)
    assert gone.code == 1
    assert "no such adapter is loaded" in gone.err


def test_a_server_is_needed(invivo: Invivo) -> None:
    ran = invivo("adapters", "list")
    assert ran.code == 2
    assert "--url" in ran.err
