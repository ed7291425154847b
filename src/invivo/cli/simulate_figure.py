"""The figure of ``invivo simulate``: what each policy trains and keeps, over the request rate."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from invivo.errors import InvalidRequest, MissingDependency

if TYPE_CHECKING:
    from invivo.engine.policies import Slo
    from invivo.engine.simulate import Result

# Apart also for most who see colours differently; the markers say the same.
COLOURS = ("#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#555555")
MARKERS = "osD^vPX"


def write_figure(results: Sequence[Result], path: Path, slo: Slo) -> None:
    """Two panels, fine-tuning rate and share of requests in their promise, one line a policy.

    Raises:
        MissingDependency: matplotlib is not installed.
        InvalidRequest: a kind of file that is not written, or a folder that is not there.
    """
    kind = path.suffix.lower()
    if kind not in (".png", ".svg", ".html"):
        raise InvalidRequest("must end in .png, .svg or .html", field="--out", given=str(path))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(
            "figures need matplotlib", remedy="pip install 'invivo[study]'"
        ) from error
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    trained, kept = figure.subplots(1, 2)
    policies = list(dict.fromkeys(result.policy for result in results))
    for i, policy in enumerate(policies):
        points = sorted((r for r in results if r.policy == policy), key=lambda r: r.rate)
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linewidth": 2.4 if policy == "co-serve" else 1.4,
            "label": policy,
        }
        rates = [r.rate for r in points]
        trained.plot(rates, [r.finetune for r in points], **style)
        kept.plot(rates, [100 * r.in_slo for r in points], **style)
    trained.axhline(results[0].alone, color="#999999", linestyle="--", linewidth=1)
    trained.annotate(
        "fine-tuning alone",
        (0.99, results[0].alone),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#777777",
        fontsize=9,
    )
    trained.set(title="Fine-tuning", ylabel="tokens a second", ylim=(0, results[0].alone * 1.05))
    promise = f"TTFT {slo.ttft_ms / 1e3:g} s, TPOT {slo.tpot_ms:g} ms"
    # A promise is kept or nearly so: what differs is told by the last tens of percent.
    lowest = max(0, 10 * math.floor(10 * min(r.in_slo for r in results)) - 10)
    top = 100 + 0.03 * (100 - lowest)
    kept.set(title=f"Requests within {promise}", ylabel="percent", ylim=(lowest, top))
    trained.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (trained, kept):
        axes.set_xlabel("requests a second")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    kept.legend(frameon=False, loc="lower left")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png" if kind == ".html" else kind[1:], dpi=150)
    content = drawn.getvalue()
    if kind == ".html":
        content = _page(content).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InvalidRequest(
            f"cannot be written: {error.strerror}", field="--out", given=str(path)
        ) from error


def _page(png: bytes) -> str:
    image = base64.b64encode(png).decode()
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>invivo simulate</title>'
        f'<img alt="Fine-tuning tokens a second and requests in their promise, by request rate" '
        f'style="max-width:100%" src="data:image/png;base64,{image}"></html>\n'
    )
