"""What a program will do, before anything runs: positions, order, passes, bytes and cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from invivo.edits.program import Capture, Step
from invivo.edits.prompt_text import PromptText
from invivo.edits.resolved import ResolvedProgram, ResolvedRow, RunInput, RunPlan, Touch
from invivo.edits.selectors import Positions
from invivo.edits.site_names import SitePattern, format_ref, format_site
from invivo.edits.values import Blob

_MOST_TOKENS = 32
_MOST_ROWS = 16
_MOST_TOUCHES = 2048


def explain(resolved: ResolvedProgram) -> dict[str, Any]:
    """The plan as JSON-able data; of a sweep the first row, and the cost of all.

    ``ranges`` are half-open; ``tokens`` are the texts of the first of them; ``passes`` are the runs
    that go through the layers side by side; a ``token_layer`` is one token through one layer;
    ``reused_tokens`` of a run are those that a plain request leaves in the prefix cache, where the
    program does without computing them again.
    """
    program, row = resolved.program, resolved.rows[0]
    touches = [touch for plan in row.runs.values() for touch in plan.touches]
    left_out = len(touches) - _MOST_TOUCHES
    return {
        "program": resolved.hash,
        "rows": len(resolved.rows),
        "bindings": [dict(r.binding) for r in resolved.rows[:_MOST_ROWS] if r.binding],
        "runs": {name: _run(plan, reuses=not program.recompute) for name, plan in row.runs.items()},
        "unused_runs": sorted(set(program.runs) - set(row.runs)),
        "passes": [list(names) for names in row.passes],
        "order": [_touch(t, row) for t in touches[:_MOST_TOUCHES]],
        **({"order_left_out": left_out} if left_out > 0 else {}),
        "captures": [
            {
                "output": c.name,
                "run": c.run,
                "at": format_ref(c.ref),
                **_where(c.positions, row.runs[c.run].prompt),
                "reduce": c.reduce,
                "when": "after" if c.after else "before",
                "shape": list(c.shape),
                "bytes": c.n_bytes,
                **({"kept": True} if c.keep else {}),
            }
            for c in row.captures
        ],
        "measures": [
            {
                "output": m.name,
                "run": m.run,
                "measure": m.kind,
                **_where(m.positions, row.runs[m.run].prompt),
                "token_ids": list(m.tokens),
                **({"to": m.other, "to_positions": list(m.other_positions)} if m.other else {}),
                **(
                    {"to_row": dict(resolved.rows[m.other_row].binding)}
                    if m.other_row is not None
                    else {}
                ),
            }
            for m in row.measures
        ],
        "bytes": resolved.n_bytes,
        "cost": cost(resolved),
        "aliases": _aliases(resolved),
    }


def cost(resolved: ResolvedProgram) -> dict[str, int]:
    """Forward passes, and layers that tokens go through.

    ``token_layers`` without any sharing; ``token_layers_shared`` where runs that do not vary are
    run once, and varying ones share the layers below their first touch.
    """
    n_layers = resolved.config.n_layers
    whole = shared = forwards = 0
    for i, row in enumerate(resolved.rows):
        for name, plan in row.runs.items():
            n = len(plan.prompt.ids)
            layers = n_layers if plan.stop is None else plan.stop + 1
            whole += n * layers
            if name in resolved.varying:
                forwards += 1
                first = layers if plan.first_layer is None else min(plan.first_layer, layers)
                shared += n * (layers - first if i else layers)
            elif i == 0:
                forwards += 1
                shared += n * layers
    return {"forwards": forwards, "token_layers": whole, "token_layers_shared": shared}


def _where(positions: Positions, prompt: PromptText) -> dict[str, Any]:
    shown = positions.indices()[:_MOST_TOKENS] if len(positions) < 10**6 else []
    return {
        "ranges": [list(pair) for pair in positions.ranges],
        "tokens": [prompt.token_text(i) for i in shown],
    }


def _run(plan: RunPlan, *, reuses: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"tokens": plan.prompt.n_prompt, "text": plan.prompt.text[:200]}
    if reuses:
        out["reused_tokens"] = plan.prompt.n_past
    if plan.prompt.n_new:
        out["new_tokens"] = plan.prompt.n_new
    if plan.adapter is not None:
        out["adapter"] = plan.adapter
    if plan.stop is not None:
        out["stops_after"] = plan.stop
    if plan.input != RunInput():
        out["replaced_tokens"] = [list(pair) for pair in plan.input.tokens]
        out["position_numbers"] = list(plan.input.numbers)
        out["hidden"] = [
            {"queries": [list(r) for r in q.ranges], "keys": [list(r) for r in k.ranges]}
            for q, k in plan.input.hidden
        ]
    return out


def _touch(touch: Touch, row: ResolvedRow) -> dict[str, Any]:
    out: dict[str, Any] = {
        "step": touch.step,
        "run": touch.run,
        "at": format_ref(touch.ref),
        "do": touch.do,
        "kernel": touch.kernel,
        **_where(touch.positions, row.runs[touch.run].prompt),
    }
    if touch.keys is not None:
        out["keys"] = _where(touch.keys, row.runs[touch.run].prompt)
    sources: list[dict[str, Any]] = []
    for source in touch.sources:
        if source.blob is not None:
            sources.append({"blob": source.blob})
        elif source.run is not None and source.ref is not None:
            texts = row.runs[source.run].prompt if source.run in row.runs else None
            sources.append(
                {
                    "run": source.run,
                    "at": format_ref(source.ref),
                    "positions": list(source.positions[:_MOST_TOKENS]),
                    "tokens": [texts.token_text(i) for i in source.positions[:_MOST_TOKENS]]
                    if texts
                    else [],
                    "mean": source.pooled,
                }
            )
    # Tensors of which a mean is taken or rows are drawn.
    pools = (value for name, value in touch.args.items() if name in ("over", "pool"))
    sources += [{"blob": value.name} for value in pools if isinstance(value, Blob)]
    if sources:
        out["from"] = sources
    return out


def _aliases(resolved: ResolvedProgram) -> dict[str, str]:
    """TransformerLens names that were written, with ours."""
    patterns: list[SitePattern] = []
    for entry in (*resolved.program.steps, *resolved.program.out):
        if isinstance(entry, Step | Capture):
            patterns += entry.at
    return {p.alias: format_site(replace(p, alias=None)) for p in patterns if p.alias is not None}


def explain_text(explained: dict[str, Any]) -> str:
    """:func:`explain` for people."""
    cost_ = explained["cost"]
    lines = [f"program {explained['program'][:19]}"]
    if explained["rows"] > 1:
        lines.append(f"sweep of {explained['rows']} rows; shown is the first")
    for name, run in explained["runs"].items():
        extra = f", stops after layer {run['stops_after']}" if "stops_after" in run else ""
        if "reused_tokens" in run:
            extra += f", the first {run['reused_tokens']} as a plain request leaves them"
        lines.append(f"run {name}: {run['tokens']} tokens{extra}")
    if len(explained["passes"]) > 1:
        shown = ", then ".join(" + ".join(names) for names in explained["passes"])
        lines.append(f"passes: {shown}")
    lines.append("order:" if explained["order"] else "nothing is changed")
    for touch in explained["order"]:
        source = ""
        if "from" in touch:
            parts = [
                f"blob {s['blob']}" if "blob" in s else f"{s['run']} {s['at']}"
                for s in touch["from"]
            ]
            source = f" from {' + '.join(parts)}"
        keys = f" keys {_shown(touch['keys'])}" if "keys" in touch else ""
        lines.append(
            f"  [{touch['step']}] {touch['run']}: {touch['do']} {touch['at']} "
            f"at {_shown(touch)}{keys}{source}"
        )
    if "order_left_out" in explained:
        lines.append(f"  and {explained['order_left_out']} more")
    for capture in explained["captures"]:
        lines.append(
            f"capture {capture['output']}: {capture['run']} {capture['at']} at {_shown(capture)}, "
            f"{capture['reduce']}, shape {capture['shape']}, {capture['bytes']} bytes"
        )
    for measure in explained["measures"]:
        other = f" from {measure['to']}" if "to" in measure else ""
        if "to_row" in measure:
            other += f" of row {measure['to_row']}"
        lines.append(
            f"measure {measure['output']}: {measure['measure']} of {measure['run']}{other} "
            f"at {_shown(measure)}"
        )
    lines.append(
        f"cost: {cost_['forwards']} forward passes, {cost_['token_layers']} token-layers "
        f"({cost_['token_layers_shared']} when shared); captures {explained['bytes']} bytes"
    )
    for alias, name in explained["aliases"].items():
        lines.append(f"alias: {alias} is {name}")
    return "\n".join(lines)


def _shown(where: dict[str, Any]) -> str:
    """``3-5, 9 (' Po', 'land', ...)``."""
    ranges = ", ".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in where["ranges"][:8])
    tokens = ", ".join(repr(t) for t in where["tokens"][:6])
    more = ", ..." if len(where["tokens"]) > 6 else ""
    return f"{ranges} ({tokens}{more})"
