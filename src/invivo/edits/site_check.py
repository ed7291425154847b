"""Whether a model's sites are what their names say: the equations between them, on a short text.

The sites of :mod:`invivo.models.sites` are defined by equations (a layer's stream before attention
plus what attention writes is the stream after it, and so on). A new architecture or another version
of a library may break one of them without any error, and then a capture is another quantity than
its name says. So all sites are captured once, by the interpreter, and every equation is tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from invivo.edits.oracle import run_program
from invivo.edits.program import Capture, Program
from invivo.edits.prompt_text import prompt_of_pieces
from invivo.edits.resolve import resolve
from invivo.edits.site_names import SitePattern
from invivo.kernels.activation import activation
from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder, Layer
from invivo.models.feedforward.mlp import MLP
from invivo.models.mixers.attention import Attention
from invivo.models.sites import sites_of

Key = tuple[str, int]  # a site and its layer, -1 outside layers
Values = dict[Key, torch.Tensor]

_N_TOKENS = 6
# How far two sides of an equation may be apart, as a share of the smallest of its terms.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True, slots=True)
class _Equation:
    """``parts`` add up to ``whole``; ``text`` says so, ``keys`` are the sites in it."""

    text: str
    keys: tuple[Key, ...]
    parts: tuple[torch.Tensor, ...]
    whole: torch.Tensor


@torch.no_grad()
def failed_sites(decoder: Decoder) -> dict[Key, str]:
    """The sites of ``decoder`` that stand in an equation that does not hold, with the equation.

    Runs a text of six tokens through the model, with every site captured.
    """
    values = _values(decoder)
    failed: dict[Key, str] = {}
    for equation in _equations(decoder, values):
        off = _distance(equation, decoder.embed.dtype)
        if off > 1.0:
            reason = f"{equation.text} does not hold in this model: off by {off:.2g} tolerances"
            failed |= {key: reason for key in equation.keys if key not in failed}
    return failed


def _values(decoder: Decoder) -> Values:
    """Every site of the model on a short text."""
    config = decoder.config
    ids = [(7919 * i + 1) % config.vocab_size for i in range(_N_TOKENS)]
    out = tuple(Capture((SitePattern(site),), name=site) for site in sites_of(config))
    prompt = prompt_of_pieces([(i, "") for i in ids])
    (row,) = run_program(decoder, resolve(Program(out=out), config, {"main": prompt}))
    wide = torch.float64 if decoder.embed.dtype == torch.float64 else torch.float32
    return {(c.ref.ref.site, c.ref.ref.layer): c.value.to(wide) for c in row.captures}


def _distance(equation: _Equation, dtype: torch.dtype) -> float:
    """How far its sides are apart, in tolerances; NaN and infinite numbers are far."""
    total = sum(equation.parts[1:], equation.parts[0])
    sizes = [float(term.norm()) for term in (*equation.parts, equation.whole)]
    # A small part of a large sum is known only as well as the sum is rounded.
    allowed = _TOLERANCE[dtype] * min(sizes) + 8 * torch.finfo(dtype).eps * max(sizes)
    off = float((total - equation.whole).norm())
    if off == 0:
        return 0.0
    return off / allowed if allowed > 0 and math.isfinite(off / allowed) else math.inf


def _equations(decoder: Decoder, s: Values) -> Iterator[_Equation]:
    config = decoder.config
    yield _Equation(
        "embed.out = layers.0.resid.pre",
        (("embed.out", -1), ("resid.pre", 0)),
        (s["embed.out", -1],),
        s["resid.pre", 0],
    )
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        yield _sum(s, i, ("resid.pre", "attn.out"), "resid.mid")
        yield _sum(s, i, ("resid.mid", "mlp.out"), "resid.post")
        if i + 1 < config.n_layers:
            yield _Equation(
                f"layers.{i}.resid.post = layers.{i + 1}.resid.pre",
                (("resid.post", i), ("resid.pre", i + 1)),
                (s["resid.post", i],),
                s["resid.pre", i + 1],
            )
        if isinstance(layer.mixer, Attention):
            yield from _attention(config, layer.mixer, s, i)
        else:
            yield from _recurrence(config, s, i)
        yield from _feedforward(config, layer, s, i)
    head = decoder.embed if decoder.head is None else decoder.head
    logits = s["final.norm.out", -1] @ head.to(s["final.norm.out", -1].dtype).T
    cap = config.logit_softcap
    yield _Equation(
        "final.norm.out times the unembedding = logits",
        (("final.norm.out", -1), ("logits", -1)),
        (logits if cap is None else cap * torch.tanh(logits / cap),),
        s["logits", -1],
    )


def _sum(s: Values, layer: int, parts: tuple[str, ...], whole: str) -> _Equation:
    text = f"{' + '.join(parts)} = {whole}"
    return _made(s, layer, text, (*parts, whole), tuple(s[p, layer] for p in parts), whole)


def _made(
    s: Values,
    layer: int,
    text: str,
    names: tuple[str, ...],
    parts: tuple[torch.Tensor, ...],
    whole: str,
) -> _Equation:
    keys = tuple((name, layer) for name in names)
    return _Equation(f"{text} (layer {layer})", keys, parts, s[whole, layer])


def _attention(config: ModelConfig, mixer: Attention, s: Values, i: int) -> Iterator[_Equation]:
    share = config.n_heads // config.n_kv_heads
    rot = "" if config.layers[i].rope is None else ".rot"
    query, key = f"attn.head.q{rot}", f"attn.kvhead.k{rot}"
    scores = s["attn.head.score", i]
    seen = scores.isfinite()
    raw = torch.einsum("thd,lhd->thl", s[query, i], s[key, i].repeat_interleave(share, 1))
    raw = raw * (config.attn_scale or config.head_dim**-0.5)
    if config.attn_softcap is not None:
        raw = config.attn_softcap * torch.tanh(raw / config.attn_softcap)
    yield _Equation(
        f"scaled products of {query} and {key} = attn.head.score (layer {i})",
        ((query, i), (key, i), ("attn.head.score", i)),
        (raw.masked_fill(~seen, 0.0),),
        scores.masked_fill(~seen, 0.0),
    )
    yield _made(
        s,
        i,
        "softmax of attn.head.score = attn.head.prob",
        ("attn.head.score", "attn.head.prob"),
        (torch.softmax(scores, -1),),
        "attn.head.prob",
    )
    values = s["attn.kvhead.v", i].repeat_interleave(share, 1)
    yield _made(
        s,
        i,
        "attn.head.prob times attn.kvhead.v = attn.head.z",
        ("attn.head.prob", "attn.kvhead.v", "attn.head.z"),
        (torch.einsum("thl,lhd->thd", s["attn.head.prob", i], values),),
        "attn.head.z",
    )
    out = "attn.proj" if config.post_norm else "attn.out"
    total = s["attn.head.out", i].sum(1)
    yield _made(
        s,
        i,
        f"attn.head.out summed over heads, and the bias = {out}",
        ("attn.head.out", out),
        (total if mixer.o_bias is None else total + mixer.o_bias.to(total.dtype),),
        out,
    )
    slices = mixer.o.view(config.d_model, config.n_heads, config.head_dim).to(total.dtype)
    yield _made(
        s,
        i,
        "attn.head.z times its slice of the output matrix = attn.head.out",
        ("attn.head.z", "attn.head.out"),
        (torch.einsum("thd,mhd->thm", s["attn.head.z", i], slices),),
        "attn.head.out",
    )


def _recurrence(config: ModelConfig, s: Values, i: int) -> Iterator[_Equation]:
    assert config.gla is not None
    memory, state = s["gla.head.memory", i], s["gla.head.state", i]
    yield _made(
        s,
        i,
        "gla.head.memory = gla.head.state of the token before",
        ("gla.head.memory", "gla.head.state"),
        (torch.cat((torch.zeros_like(state[:1]), state[:-1])),),
        "gla.head.memory",
    )
    written = torch.einsum("thk,thv->thkv", s["gla.head.k", i], s["gla.head.v", i])
    yield _made(
        s,
        i,
        "gla.head.gate times gla.head.memory + gla.head.k times gla.head.v = gla.head.state",
        ("gla.head.gate", "gla.head.memory", "gla.head.k", "gla.head.v", "gla.head.state"),
        (s["gla.head.gate", i].unsqueeze(-1) * memory + written,),
        "gla.head.state",
    )
    query = s["gla.head.q", i] * config.gla.head_k**-0.5
    yield _made(
        s,
        i,
        "scaled gla.head.q times gla.head.state = gla.head.z",
        ("gla.head.q", "gla.head.state", "gla.head.z"),
        (torch.einsum("thk,thkv->thv", query, state),),
        "gla.head.z",
    )


def _feedforward(config: ModelConfig, layer: Layer, s: Values, i: int) -> Iterator[_Equation]:
    out = "mlp.proj" if config.post_norm else "mlp.out"
    if not isinstance(layer.feedforward, MLP):
        weighted = torch.einsum("te,ted->td", s["moe.expert.weight", i], s["moe.expert.out", i])
        shared = ("moe.shared.out",) if ("moe.shared.out", i) in s else ()
        yield _made(
            s,
            i,
            f"moe.expert.weight times moe.expert.out, and what experts share = {out}",
            ("moe.expert.weight", "moe.expert.out", *shared, out),
            (weighted, *(s[name, i] for name in shared)),
            out,
        )
        return
    inner, neuron = s["mlp.up", i], s["mlp.neuron", i]
    gated = ("mlp.gate",) if config.gated_mlp else ()
    made = (
        activation(s["mlp.gate", i], config.activation) * inner
        if gated
        else activation(inner, config.activation)
    )
    what = "act(mlp.gate) times mlp.up" if gated else "act(mlp.up)"
    names = (*gated, "mlp.up", "mlp.neuron")
    yield _made(s, i, f"{what} = mlp.neuron", names, (made,), "mlp.neuron")
    down, bias = layer.feedforward.down.to(neuron.dtype), layer.feedforward.down_bias
    written = neuron @ down.T
    yield _made(
        s,
        i,
        f"mlp.neuron times the down matrix, and the bias = {out}",
        ("mlp.neuron", out),
        (written if bias is None else written + bias.to(neuron.dtype),),
        out,
    )
