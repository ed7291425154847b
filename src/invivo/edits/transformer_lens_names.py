"""TransformerLens names as aliases, and back, for those that mean the same quantity.

Names whose quantity differs are refused with the difference, never translated silently.
"""

from __future__ import annotations

import re

from invivo.errors import InvalidRequest

# TransformerLens name (L: layer) -> ours. Heads come as [h] behind the name.
SAME: dict[str, str] = {
    "hook_embed": "embed.out",
    "blocks.L.hook_resid_pre": "layers.L.resid.pre",
    "blocks.L.hook_resid_mid": "layers.L.resid.mid",
    "blocks.L.hook_resid_post": "layers.L.resid.post",
    "blocks.L.hook_attn_out": "layers.L.attn.out",
    "blocks.L.hook_mlp_out": "layers.L.mlp.out",
    "blocks.L.attn.hook_q": "layers.L.attn.head.H.q",
    "blocks.L.attn.hook_k": "layers.L.attn.kvhead.H.k",
    "blocks.L.attn.hook_v": "layers.L.attn.kvhead.H.v",
    "blocks.L.attn.hook_rot_q": "layers.L.attn.head.H.q.rot",
    "blocks.L.attn.hook_rot_k": "layers.L.attn.kvhead.H.k.rot",
    "blocks.L.attn.hook_attn_scores": "layers.L.attn.head.H.score",
    "blocks.L.attn.hook_pattern": "layers.L.attn.head.H.prob",
    "blocks.L.attn.hook_z": "layers.L.attn.head.H.z",
    "blocks.L.attn.hook_result": "layers.L.attn.head.H.out",
    "blocks.L.mlp.hook_post": "layers.L.mlp.neuron",
    "blocks.L.mlp.hook_pre_linear": "layers.L.mlp.up",
}

# What looks alike and is not.
OTHER: dict[str, str] = {
    "hook_pos_embed": "learned positions are part of embed.out here",
    "blocks.L.mlp.hook_pre": "the gate of a gated MLP is mlp.gate, of a plain one mlp.up",
    "blocks.L.ln1.hook_scale": "it is the reciprocal of layers.L.norm1.scale",
    "blocks.L.ln2.hook_scale": "it is the reciprocal of layers.L.norm2.scale",
    "ln_final.hook_scale": "it is the reciprocal of final.norm.scale",
    "blocks.L.ln1.hook_normalized": "it lacks the norm's weight, which attn.in has",
    "blocks.L.ln2.hook_normalized": "it lacks the norm's weight, which mlp.in has",
    "ln_final.hook_normalized": "it lacks the norm's weight, which final.norm.out has",
}

_LAYER = re.compile(r"^blocks\.([0-9]{1,6}|\*)\.")
_HEAD = re.compile(r"\[([0-9]{1,6}(?:-[0-9]{1,6})?|[0-9]{1,6}(?:,[0-9]{1,6})*)\]$")


def from_transformer_lens(name: str, path: str) -> str:
    """Our name for ``blocks.5.hook_resid_pre``, ``blocks.3.attn.hook_z[6]``, ...

    Raises:
        InvalidRequest: there is no such name, or its quantity is another one here.
    """
    layer = _LAYER.match(name)
    generic = _LAYER.sub("blocks.L.", name)
    head = _HEAD.search(generic)
    generic = _HEAD.sub("", generic)
    ours = SAME.get(generic)
    if ours is None or (head is not None and ".H." not in ours):
        raise InvalidRequest(
            "this TransformerLens name has no counterpart",
            field=path,
            given=name,
            remedy=OTHER.get(generic, "docs/interventions.md has the table of names"),
        )
    index = "*" if head is None else head[1]
    if "," in index:
        index = f"[{index}]"
    return ours.replace(".L.", f".{layer[1]}." if layer else ".").replace(".H.", f".{index}.")


def to_transformer_lens(name: str) -> str | None:
    """The TransformerLens name of one of ours (one layer; one head or all), if there is one."""
    parts = name.split(".")
    layer = head = None
    if parts[0] == "layers":
        layer, parts[1] = parts[1], "L"
    for word in ("head", "kvhead"):
        if word in parts:
            at = parts.index(word) + 1
            head, parts[at] = parts[at], "H"
    generic = ".".join(parts)
    found = next((theirs for theirs, ours in SAME.items() if ours == generic), None)
    if found is None:
        return None
    found = found.replace(".L.", f".{layer}.")
    return found if head in (None, "*") else f"{found}[{str(head).strip('[]')}]"
