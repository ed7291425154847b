"""Arrivals of requests: read from a file or drawn. No torch here."""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from invivo.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes ``at`` seconds with a prompt and makes ``response`` tokens."""

    at: float
    prompt: int
    response: int


def read_trace(path: Path, *, name: str | None = None) -> list[Arrival]:
    """Arrivals from a CSV file (plain or gzip), in order of time.

    Its columns are ``arrival_s``, ``prompt_tokens``, ``response_tokens``. Where there is a column
    ``trace`` (and ``target_req_per_s``), ``name`` chooses: "sharegpt" or "sharegpt@1.0"; None takes
    the first trace of the file.

    Raises:
        InvalidRequest: no such file, column or trace, or a number that is none; names the line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    found: dict[str, list[Arrival]] = {}
    try:
        with opener(path, "rt", newline="") as file:
            for line, row in enumerate(csv.DictReader(file), start=2):
                try:
                    arrival = Arrival(
                        float(row["arrival_s"]),
                        int(row["prompt_tokens"]),
                        int(row["response_tokens"]),
                    )
                except (KeyError, ValueError, TypeError) as error:
                    raise InvalidRequest(
                        f"line {line} is no arrival: {error}",
                        field="trace",
                        given=str(path),
                        remedy="Columns: arrival_s, prompt_tokens, response_tokens",
                    ) from error
                key = f"{row.get('trace', '')}@{row.get('target_req_per_s', '')}"
                found.setdefault(key, []).append(arrival)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot be read: {error}", field="trace", given=str(path)) from error
    keys = [k for k in found if name is None or k == name or k.startswith(f"{name}@")]
    if not keys:
        raise InvalidRequest(
            "no such trace in the file",
            field="trace",
            given=name,
            remedy=f"It has: {', '.join(found) or 'nothing'}",
        )
    usable = [a for a in found[keys[0]] if a.prompt > 0 and a.response > 0]
    if len(usable) < 2:
        raise InvalidRequest("has fewer than two arrivals", field="trace", given=str(path))
    return sorted(usable, key=lambda arrival: arrival.at)


def drawn(
    rate: float,
    seconds: float,
    lengths: Sequence[tuple[int, int]],
    *,
    burstiness: float = 1.0,
    seed: int = 0,
) -> list[Arrival]:
    """Arrivals with independent gaps: exponential (Poisson), or Gamma of the same mean.

    Args:
        rate: requests a second.
        seconds: until when requests come.
        lengths: (prompt, response) pairs, drawn with replacement.
        burstiness: squared coefficient of variation of the gaps; 1 is Poisson.
    """
    rng = random.Random(seed)
    found = []
    at = rng.gammavariate(1 / burstiness, burstiness / rate)
    while at < seconds:
        found.append(Arrival(at, *rng.choice(lengths)))
        at += rng.gammavariate(1 / burstiness, burstiness / rate)
    return found


def at_rate(arrivals: Sequence[Arrival], rate: float, seconds: float) -> list[Arrival]:
    """The trace with its clock stretched to ``rate`` requests a second, again and again until
    ``seconds`` are full."""
    first, last = arrivals[0].at, arrivals[-1].at
    span = max(last - first, 1e-9) * len(arrivals) / (len(arrivals) - 1)
    stretch = len(arrivals) / rate / span
    found = []
    for turn in range(int(seconds / (span * stretch)) + 1):
        for arrival in arrivals:
            at = (arrival.at - first + turn * span) * stretch
            if at < seconds:
                found.append(replace(arrival, at=at))
    return found
