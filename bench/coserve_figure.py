"""The figure of ``coserve.py``: what each policy trains and keeps, over the request rate.

python bench/coserve_figure.py bench/results/coserve-cpu.json     # writes coserve-cpu.png
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from invivo.cli.simulate_figure import COLOURS, MARKERS


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
        print(f"written to {path.with_suffix('.png')}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Three panels, medians over rounds: training, promise kept, time per token."""
    setting = result["setting"]
    points = [p for p in result["points"] if p["tpot"] or not p["rate"]]
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    trained, kept, pace = figure.subplots(1, 3)
    alone = max((p["finetune"] for p in points if p["rate"] == 0), default=0.0)
    for i, policy in enumerate(dict.fromkeys(p["policy"] for p in points if p["rate"])):
        rates = sorted({p["rate"] for p in points if p["policy"] == policy and p["rate"]})
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linewidth": 2.4 if policy == "co-serve" else 1.4,
            "label": policy,
        }
        here = [[p for p in points if p["policy"] == policy and p["rate"] == r] for r in rates]
        trained.plot(rates, [middle(p["finetune"] for p in some) for some in here], **style)
        kept.plot(rates, [100 * middle(p["in_slo"] or 0.0 for p in some) for some in here], **style)
        pace.plot(rates, [1e3 * middle(p["tpot"][1] for p in some) for some in here], **style)
    trained.axhline(alone, color="#999999", linestyle="--", linewidth=1)
    trained.annotate(
        "fine-tuning alone",
        (0.99, alone),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#777777",
        fontsize=9,
    )
    tpot, ttft = setting["tpot_ms"], setting["ttft_ms"]
    pace.axhline(tpot, color="#999999", linestyle="--", linewidth=1)
    trained.set(title="Fine-tuning", ylabel="tokens a second", ylim=(0, None))
    kept.set(
        title=f"Requests within TTFT {ttft / 1e3:g} s, TPOT {tpot:g} ms",
        ylabel="percent",
        ylim=(0, 103),
    )
    pace.set(title="Time per output token, 95th percentile", ylabel="ms", ylim=(0, None))
    for axes in (trained, kept, pace):
        axes.set_xlabel("requests a second")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    kept.legend(frameon=False, loc="lower left")
    figure.suptitle(f"{result['shape']}, {result['device']}", fontsize=10)
    figure.savefig(path, dpi=130)


def middle(values: Any) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
