"""The learning rate over the steps of a run."""

from __future__ import annotations

import math

from invivo.training.config import Schedule


def rate_at(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """The rate of optimizer step ``step``, the first being 0.

    ``cosine`` falls by half a wave from ``peak`` to ``final * peak`` (Loshchilov and Hutter, 2017);
    ``wsd`` stays at ``peak`` and falls in a line over the last ``decay`` of the steps (MiniCPM,
    arXiv 2404.06395, section 4). The last step has the final rate; any later step keeps it.
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return peak
    first = schedule.warmup
    if schedule.kind == "wsd":
        first = max(first, steps - 1 - round(schedule.decay * steps))
    done = min(1.0, max(0.0, (step - first) / max(1, steps - 1 - first)))
    fall = done if schedule.kind == "wsd" else (1 - math.cos(math.pi * done)) / 2
    return peak * (schedule.final + (1 - schedule.final) * (1 - fall))
