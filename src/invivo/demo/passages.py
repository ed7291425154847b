"""Real text to work on: public-domain passages (their origin is in ``texts/ORIGIN.md``)."""

from __future__ import annotations

from importlib.resources import files

NAMES = ("alice", "franklin", "happy_prince", "holmes", "walden")


def passage(name: str) -> str:
    """One passage of about 700 words."""
    return (files("invivo.demo") / "texts" / f"{name}.txt").read_text(encoding="utf-8")


def passages() -> dict[str, str]:
    """All passages by name."""
    return {name: passage(name) for name in NAMES}
