"""How inference and fine-tuning share one device: the policies that can be compared. No torch here.

Only ``co-serve`` puts both into one iteration. The others decide whose turn it is, as serving
systems do that alternate between whole steps of each, or are comparisons for the simulator alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from invivo.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Slo:
    """What requests are promised.

    Attributes:
        tpot_ms: milliseconds per output token after the first.
        ttft_ms: milliseconds from arrival to the first token.
        headroom: share of ``tpot_ms`` that training leaves alone, for what cannot be foreseen.
        burst: how many ``tpot_ms`` may pass between two tokens of a sequence that is early. 1 keeps
            every token within the promise; more keeps only the mean of a sequence, and gathers
            slack for larger pieces of training where starting one is dear.
        patience: share of ``ttft_ms`` that a request may have waited for a row or memory before
            training stops: nobody can say how many iterations it still waits, but shorter ones
            help.
    """

    tpot_ms: float = 50.0
    ttft_ms: float = 5000.0
    headroom: float = 0.05
    burst: float = 1.0
    patience: float = 0.25

    def __post_init__(self) -> None:
        for name in ("tpot_ms", "ttft_ms"):
            if not getattr(self, name) > 0:
                raise InvalidRequest("must be positive", field=name, given=getattr(self, name))
        if not 0 <= self.headroom < 1:
            raise InvalidRequest("must be in [0, 1)", field="headroom", given=self.headroom)
        if not self.burst >= 1:
            raise InvalidRequest("must be at least 1", field="burst", given=self.burst)
        if not 0 <= self.patience <= 1:
            raise InvalidRequest("must be in [0, 1]", field="patience", given=self.patience)

    @property
    def pace(self) -> float:
        """Seconds per token that training aims at."""
        return self.tpot_ms * (1 - self.headroom) / 1e3


@dataclass(frozen=True, slots=True)
class Load:
    """What a policy that alternates may look at.

    Attributes:
        waiting: requests without memory yet.
        served: iterations of inference since the last whole training iteration.
        iteration: seconds of an iteration of inference, a running mean that holds the prefills of
            what arrives.
        training: predicted seconds of a whole training iteration.
    """

    waiting: int
    served: int
    iteration: float
    training: float


Sharing = Literal["fill", "alternate", "none"]


class Policy(Protocol):
    """One way to share the device.

    Attributes:
        name: as :func:`policy_of` reads it.
        sharing: training fills the slack of every iteration, alternates with inference in whole
            iterations, or does not run on the device of inference's steps at all.
        simulated: exists in the simulator only.
    """

    @property
    def name(self) -> str: ...
    @property
    def sharing(self) -> Sharing: ...
    @property
    def simulated(self) -> bool: ...

    def yields(self, load: Load, slo: Slo) -> bool:
        """Whether inference, which has work, now stands back for a whole training iteration."""
        ...


@dataclass(frozen=True, slots=True)
class Nothing:
    """No training."""

    name: str = "none"
    sharing: Sharing = "none"
    simulated: bool = False

    def yields(self, load: Load, slo: Slo) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class CoServe:
    """Training rides in every iteration, in pieces sized by what latency is left."""

    name: str = "co-serve"
    sharing: Sharing = "fill"
    simulated: bool = False

    def yields(self, load: Load, slo: Slo) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Temporal:
    """One whole training iteration after every ``every`` iterations of inference."""

    every: int
    sharing: Sharing = "alternate"
    simulated: bool = False

    @property
    def name(self) -> str:
        return f"temporal:{self.every}"

    def yields(self, load: Load, slo: Slo) -> bool:
        return load.served >= self.every


@dataclass(frozen=True, slots=True)
class DynamicTemporal:
    """A whole training iteration as soon as the mean time per token bears its length.

    A sequence that lives through it once in n iterations of f seconds takes f + D/n a token, so
    n = D / (pace - f). Arrivals raise f through their prefills; while requests wait nothing trains.
    """

    name: str = "dynamic-temporal"
    sharing: Sharing = "alternate"
    simulated: bool = False

    def yields(self, load: Load, slo: Slo) -> bool:
        spare = slo.pace - load.iteration
        return not load.waiting and spare > 0 and load.served * spare >= load.training


@dataclass(frozen=True, slots=True)
class Spatial:
    """Two streams share the device all the time.

    Attributes:
        slowdown: by how much an iteration of inference lasts longer while training runs beside it;
            training then has the other 1 - 1 / slowdown of the device.
    """

    slowdown: float = 2.0
    sharing: Sharing = "none"
    simulated: bool = True

    @property
    def name(self) -> str:
        return f"spatial:{self.slowdown:g}"

    def yields(self, load: Load, slo: Slo) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Separate:
    """Two clusters: a share ``inference`` of the devices serves, the others train."""

    inference: float = 0.75
    sharing: Sharing = "none"
    simulated: bool = True

    @property
    def name(self) -> str:
        return f"separate:{self.inference:g}"

    def yields(self, load: Load, slo: Slo) -> bool:
        return False


KNOWN = "co-serve, temporal:N, dynamic-temporal, spatial[:SLOWDOWN], separate[:SHARE], none"


def policy_of(text: str) -> Policy:
    """The policy of that name.

    Raises:
        InvalidRequest: no such policy, or a number that makes no sense.
    """
    name, _, number = text.partition(":")
    plain: dict[str, Policy] = {p.name: p for p in (CoServe(), DynamicTemporal(), Nothing())}
    if text in plain:
        return plain[text]
    try:
        if name == "temporal" and int(number) >= 1:
            return Temporal(int(number))
        if name == "spatial" and (not number or float(number) > 1):
            return Spatial(float(number or 2))
        if name == "separate" and (not number or 0 < float(number) < 1):
            return Separate(float(number or 0.75))
    except ValueError:
        pass  # refused below, with every other text that says nothing
    raise InvalidRequest("no such policy", field="policy", given=text, remedy=f"Known: {KNOWN}")
