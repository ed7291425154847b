"""What a model is, in numbers: one frozen config drives the one decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    Attributes:
        theta: base of the frequencies.
        rotary_dim: leading dimensions of a head that turn (partial rotary when < head_dim).
        scaling: ``None``, or the Hub's ``rope_scaling`` mapping with its ``rope_type``
            (``linear``, ``dynamic``, ``llama3``, ``yarn``, ``longrope``) as sorted pairs, lists
            as tuples.
    """

    theta: float
    rotary_dim: int
    scaling: tuple[tuple[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What differs between the layers of one model."""

    mixer: Literal["attention", "gla"] = "attention"
    window: int | None = None  # sliding window in tokens, None = full attention
    rope: int | None = 0  # index into ModelConfig.ropes, None = no rotary
    feedforward: Literal["mlp", "moe"] = "mlp"


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts: ``top_k`` of ``n_experts`` gated MLPs of width ``d_expert``."""

    n_experts: int
    top_k: int
    d_expert: int
    normalize_weights: bool  # divide the chosen weights by their sum
    d_shared: int = 0  # width of the always-on expert (Qwen2-MoE), 0 = none


@dataclass(frozen=True, slots=True)
class GLAConfig:
    """Sizes of the gated linear attention layers of a model (arXiv 2312.06635, section 4.4).

    Attributes:
        head_k, head_v: key and value channels of one head; its state is [head_k, head_v].
        gate_rank: inner width of the gate's two maps.
        tau: the log gates are ``logsigmoid(logits) / tau``.
        conv_size: tokens that the short convolution of queries, keys and values sees; 0 = none.
    """

    n_heads: int
    head_k: int
    head_v: int
    gate_rank: int = 16
    tau: float = 16.0
    conv_size: int = 0

    @property
    def k_width(self) -> int:
        return self.n_heads * self.head_k

    @property
    def v_width(self) -> int:
        return self.n_heads * self.head_v

    @property
    def qkv_width(self) -> int:
        return 2 * self.k_width + self.v_width


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only language model.

    ``d_model`` width, H = ``n_heads`` query heads, G = ``n_kv_heads`` key heads of ``head_dim``,
    ``d_ff`` hidden units, V = ``vocab_size``.
    """

    family: str  # the Hub's model_type: "llama", "gemma3_text", ...
    vocab_size: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    layers: tuple[LayerConfig, ...]
    ropes: tuple[RopeConfig, ...] = ()
    learned_positions: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False  # weight is stored minus one (Gemma)
    pre_norm: bool = True  # False: norms sit only after the sub-layers (OLMo 2)
    post_norm: bool = False  # norm on the sub-layer's output before it is added
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_clip: float | None = None  # queries, keys and values are cut to +- this (OLMoE)
    activation: str = "silu"  # silu, gelu, gelu_tanh, relu, relu2
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attn_scale: float | None = None  # None: head_dim ** -0.5
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float | None = None
    tie_embeddings: bool = False
    moe: MoEConfig | None = None
    gla: GLAConfig | None = None  # of its layers with that mixer
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    source: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def recurrent(self) -> tuple[int, ...]:
        """The layers that carry a state from token to token instead of keys and values."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mixer == "gla")
