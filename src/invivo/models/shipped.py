"""Models that come with invivo itself: small ones, trained here, that need nothing but the code.

Each is a folder in the Hub's format below ``assets``; its README.md is its card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """
    Attributes:
        name: of its folder.
        description: the card's first sentence.
        licence: by the card's header.
    """

    name: str
    path: Path
    description: str
    licence: str


def shipped_models() -> dict[str, ShippedModel]:
    """By name."""
    found = sorted(ASSETS.glob("*/config.json"))
    return {file.parent.name: _read(file.parent) for file in found}


def _read(folder: Path) -> ShippedModel:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    licence = re.search(r"^license: (.+)$", text, re.MULTILINE)
    about = re.search(r"^# .*\n+(.+)$", text, re.MULTILINE)
    return ShippedModel(
        folder.name, folder, about[1] if about else "", licence[1] if licence else ""
    )
