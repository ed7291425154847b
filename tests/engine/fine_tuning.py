"""Small models, windows over a paged cache, and one-shot autograd as the oracle of fine-tuning."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from tests.models.pages import Pages, Text

from invivo.engine.bypasses import BypassSpec, TrainBypass, checked_specs, init_parameters
from invivo.engine.recording import Recording
from invivo.engine.train_sequence import TrainSequence
from invivo.engine.window import WindowTrainer
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import allocate_kv_cache
from invivo.models.config import LayerConfig, ModelConfig, MoEConfig, RopeConfig
from invivo.models.decoder import Decoder
from invivo.models.load import random_model

_PLAIN = ModelConfig(
    family="llama",
    vocab_size=48,
    d_model=16,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=24,
    max_positions=64,
    layers=(LayerConfig(), LayerConfig(window=5), LayerConfig()),
    ropes=(RopeConfig(10_000.0, 8),),
)

CONFIGS: dict[str, ModelConfig] = {
    "llama": _PLAIN,
    "gemma2": replace(
        _PLAIN,
        post_norm=True,
        norm_unit_offset=True,
        attn_softcap=2.0,
        logit_softcap=3.0,
        embed_scale=4.0,
        attn_scale=0.4,
        activation="gelu_tanh",
        tie_embeddings=True,
    ),
    "gpt2": replace(
        _PLAIN,
        n_kv_heads=4,
        layers=(LayerConfig(rope=None),) * 3,
        learned_positions=True,
        norm="layer",
        gated_mlp=False,
        activation="gelu_tanh",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    ),
    "olmo2": replace(_PLAIN, pre_norm=False, post_norm=True, qk_norm="full"),
    "qwen3": replace(_PLAIN, qk_norm="head", ropes=(RopeConfig(10_000.0, 4),)),
    "clip": replace(_PLAIN, qkv_clip=0.5),
    "relu": replace(_PLAIN, gated_mlp=False, activation="relu"),
    "moe": replace(
        _PLAIN,
        layers=(LayerConfig(feedforward="moe"), LayerConfig(window=5), LayerConfig()),
        moe=MoEConfig(4, 2, 12, True, d_shared=8),
    ),
    "olmoe": replace(
        _PLAIN,
        layers=(LayerConfig(feedforward="moe"),) * 3,
        moe=MoEConfig(4, 2, 12, False),
        qk_norm="full",
        qkv_clip=0.5,
    ),
}

BYPASSES: dict[str, tuple[BypassSpec, ...]] = {
    "lora down": (BypassSpec("lora", ("down",), 2),),
    "lora q v": (BypassSpec("lora", ("q", "v"), 3, alpha=5.0),),
    "lora all": (BypassSpec("lora", ("q", "k", "v", "o", "gate", "up", "down"), 2),),
    "lora fused": (BypassSpec("lora", ("qkv", "gate_up"), 2, rank_stabilized=True),),
    "lora o of layer 1": (BypassSpec("lora", ("o",), 2, layers=(1,)),),
    "lora v of layers 1, 2": (BypassSpec("lora", ("v",), 2, layers=(1, 2)),),
    "ia3": (BypassSpec("ia3"),),
    "ia3 all": (BypassSpec("ia3", ("q", "k", "v", "o", "gate", "up", "down")),),
    "adapter": (BypassSpec("adapter", (), 3),),
    "adapter in the stream": (
        BypassSpec("adapter", ("resid.pre", "resid.mid", "resid.post"), 3, activation="silu"),
    ),
    "adapter before maps": (BypassSpec("adapter", ("attn.in", "mlp.in"), 3, layers=(1, 2)),),
    "steering": (BypassSpec("steering"),),
    "steering everywhere": (
        BypassSpec(
            "steering",
            ("resid.pre", "attn.in", "attn.out", "resid.mid", "mlp.in", "mlp.out", "resid.post"),
            layers=(1,),
        ),
    ),
    "prefix": (BypassSpec("prefix", (), 3),),
    "soft prompt": (BypassSpec("soft_prompt", (), 3),),
    "several": (
        BypassSpec("lora", ("q", "down"), 2),
        BypassSpec("ia3", ("k", "down")),
        BypassSpec("adapter", ("mlp.out",), 2),
        BypassSpec("steering", ("resid.mid",)),
        BypassSpec("prefix", (), 2),
        BypassSpec("soft_prompt", (), 2),
    ),
}


def suited(config: ModelConfig, specs: tuple[BypassSpec, ...]) -> tuple[BypassSpec, ...]:
    """The specs without the places that the model lacks; empty where nothing is left."""
    absent = set() if config.gated_mlp else {"gate", "gate_up"}
    if all(kind.feedforward == "moe" for kind in config.layers):
        absent |= {"gate", "up", "gate_up", "down"}
    kept = []
    for spec in specs:
        on = tuple(place for place in spec.on if place not in absent)
        if on or not spec.on:
            kept.append(replace(spec, on=on))
    return tuple(kept)


def random_parameters(
    config: ModelConfig, specs: tuple[BypassSpec, ...], *, seed: int = 1, dtype: Any = torch.float64
) -> dict[str, torch.Tensor]:
    """Parameters away from their start, so that every one has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for spec in checked_specs(config, specs):
        for name, value in init_parameters(spec, config, seed=seed).items():
            noise = 0.4 * torch.randn(value.shape, generator=generator)
            made[name] = (value + noise).to(dtype).requires_grad_()
    return made


@dataclass
class Document:
    """Tokens, labels and weights of one text."""

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor | None = None


def random_document(
    config: ModelConfig, length: int, *, seed: int, n_virtual: int = 0, weighted: bool = False
) -> Document:
    """A random text with a third of its labels masked, after ``n_virtual`` placeholders."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (length,), generator=rng)
    labels = torch.full_like(tokens, -100)
    labels[:-1] = tokens[1:]
    labels[torch.rand(length, generator=rng) < 0.3] = -100
    labels[length // 2] = int(tokens[0])  # at least one label
    if n_virtual:
        none = torch.zeros(n_virtual, dtype=torch.int64)
        tokens = torch.cat((none, tokens))
        labels = torch.cat((none - 100, labels))
    weights = torch.rand(len(tokens), generator=rng, dtype=torch.float64) if weighted else None
    return Document(tokens, labels, weights)


def take_gradients(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gathered gradients, zeros where there are none; the parameters have none afterwards."""
    taken = {}
    for name, parameter in parameters.items():
        grad = parameter.grad
        taken[name] = torch.zeros_like(parameter) if grad is None else grad
        parameter.grad = None
    return taken


def one_shot(
    decoder: Decoder,
    specs: tuple[BypassSpec, ...],
    parameters: dict[str, torch.Tensor],
    documents: list[Document],
) -> tuple[float, dict[str, torch.Tensor], list[torch.Tensor]]:
    """Loss, gradients, and gradients by the embeddings, by autograd over whole texts."""
    loss = torch.zeros((), dtype=decoder.embed.dtype)
    streams = []
    bypass = TrainBypass(decoder.config, specs, parameters)
    for doc in documents:
        n = len(doc.tokens)
        layout = contiguous_layout([n])
        cache = allocate_kv_cache(
            decoder.config,
            n_blocks=blocks_needed([n]),
            block_size=16,
            device="cpu",
            dtype=decoder.embed.dtype,
        )
        view = bypass.window(0, n)
        x = decoder.embedded(doc.tokens, layout.positions, view)
        if not x.requires_grad:
            x.requires_grad_()
        x.retain_grad()
        pending, residual = decoder.run_layers(x, layout, cache.layers, bypass=view)
        total = residual if pending is None else residual + pending
        logprobs = decoder.logits(decoder.final_norm.forward(total)).log_softmax(-1)
        for t in range(n):
            if doc.labels[t] >= 0:
                weight = 1.0 if doc.weights is None else doc.weights[t]
                loss = loss - weight * logprobs[t, doc.labels[t]]
        streams.append(x)
    loss.backward()
    assert all(x.grad is not None for x in streams)
    return float(loss.detach()), take_gradients(parameters), [x.grad for x in streams]


def random_cuts(length: int, seed: int) -> list[int]:
    """Lengths of windows that add up to ``length``."""
    rng = random.Random(seed)
    cuts = []
    while (left := length - sum(cuts)) > 0:
        cuts.append(rng.randint(1, left))
    return cuts


def by_windows(
    trainer: WindowTrainer,
    pages: Pages,
    documents: list[Document],
    *,
    seed: int = 0,
    neighbour: bool = False,
) -> tuple[float, list[torch.Tensor | None]]:
    """Loss and gradients by the embeddings, cut at random; parameters gather their gradients.

    Args:
        neighbour: another text rides in every forward window, without any bypass.
    """
    rng = random.Random(seed)
    streams: list[torch.Tensor | None] = []
    loss = 0.0
    other = Text([rng.randrange(40) for _ in range(60)])
    for doc in documents:
        text = Text(doc.tokens.tolist())
        n = len(text.tokens)
        while len(text.blocks) * pages.block_size < n:
            text.blocks.append(pages.free.pop())
        sequence = TrainSequence(doc.tokens, doc.labels, text.blocks, doc.weights)
        trainer.begin(sequence)
        for width in random_cuts(n, rng.random()):
            start, stop = text.n_done, text.n_done + width
            beside = 2 if neighbour and other.n_done + 2 <= len(other.tokens) else 0
            spans = [(text, width)]
            if beside:
                spans = [*spans, (other, 2)] if width == 1 else [(other, 2), *spans]
            run_flat(trainer, pages, sequence, spans, text, start, stop)
            for span, count in spans:
                span.n_done += count
        while (
            unit := trainer.next_unit(sequence, rng.randint(1, n), rng.randint(1, 3))
        ) is not None:
            trainer.run(sequence, unit)
        assert sequence.loss is not None
        loss += float(sequence.loss)
        streams.append(sequence.d_embeddings)
        pages.free.extend(text.blocks)
    return loss, streams


def run_flat(
    trainer: WindowTrainer,
    pages: Pages,
    sequence: TrainSequence,
    spans: list[tuple[Text, int]],
    text: Text,
    start: int,
    stop: int,
) -> None:
    """One flat batch in which rows [start, stop) of ``text`` are training rows."""
    layout = pages.layout(spans)
    ids = [t for span, n in spans for t in span.tokens[span.n_done : span.n_done + n]]
    row = 0
    for span, n in spans:
        if span is text:
            break
        row += n
    rows = slice(row, row + stop - start)
    bypass = _SomeRows(trainer.bypass.window(start, stop), rows)
    decoder = trainer.decoder
    with torch.no_grad():
        if trainer.records:
            piece = trainer.piece(sequence, start, stop, row)
            recording = Recording(decoder, pages.cache, bypass, [piece])
            hidden = decoder(
                torch.tensor(ids), layout, pages.cache, bypass=recording.bypass, taps=recording
            )
        else:
            hidden = decoder(torch.tensor(ids), layout, pages.cache, bypass=bypass)
    trainer.forward_done(sequence, start, stop, hidden[rows])


class _SomeRows:
    """A bypass for some rows of a flat batch only."""

    def __init__(self, inner: TrainBypass, rows: slice) -> None:
        self.inner = inner
        self.chosen = rows
        self.at = inner.at

    def __call__(self, layer: int, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y[self.chosen] = self.inner(layer, linear, x[self.chosen], y[self.chosen])
        return y

    def rows(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[self.chosen] = self.inner.rows(name, layer, value[self.chosen])
        return value


def random_decoder(name: str, *, dtype: Any = torch.float64) -> Decoder:
    """A small random model of ``CONFIGS`` whose attention is far from uniform."""
    decoder = random_model(CONFIGS[name], dtype=dtype, seed=3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
    return decoder
