"""The forward pass with its bypasses as a graph of tensors and operations, and what each
operation's gradients read.

Everything about memory in fine-tuning follows from two things: the graph, and the table
:data:`RULES`. The graph comes in three spellings:

- ``fused``: one operation a norm, an attention, a gated activation, as this engine's kernels and
  their hand-written gradients have it;
- ``eager``: the primitives that a model written in plain tensor code runs (the Hub's classes with
  adapters from the peft library), with their float32 copies: what autograd then has to hold;
- ``rerun``: the primitives of this engine's own pass where autograd runs it again, with one
  operation for attention, for the recurrence, and for the loss, which was found in the forward.

Sizes are per token of the sequence. No torch in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from invivo.engine.trainable import FUSED, Trainable, checked
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig, MoEConfig

BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64, "int32": 32, "bit": 1}

# Alternatives of what a gradient reads: any one of these sets of roles suffices. ``in0`` is the
# operation's first input, ``out1`` its second output.
Roles = tuple[frozenset[str], ...]


def _any_of(*alternatives: str) -> Roles:
    return tuple(frozenset(a.split()) for a in alternatives)


NOTHING = _any_of("")
_FLASH = _any_of("in0 in1 in2 out0 out1")


@dataclass(frozen=True, slots=True)
class Rule:
    """What the gradients of one kind of operation read of the forward pass.

    Attributes:
        inputs: for the gradient of each input; None where no gradient flows (indices). The last
            entry stands for all further inputs.
        params: for the gradient of each parameter, likewise.
        cheap: the outputs cost next to nothing beside a matrix product of full width, so they may
            be rebuilt instead of kept.
        tiles: outputs (by index) that exist only piece by piece inside a kernel.
    """

    inputs: tuple[Roles | None, ...] = (NOTHING,)
    params: tuple[Roles, ...] = ()
    cheap: bool = False
    tiles: tuple[int, ...] = ()


RULES: dict[str, Rule] = {
    # Matrices. A weight's gradient is (gradient of the output)^T times the input; the input's
    # gradient needs the weight alone. A bias needs nothing.
    "linear": Rule((NOTHING,), (_any_of("in0"), NOTHING)),
    "low_rank": Rule((NOTHING,), (_any_of("in0"),), cheap=True),
    # Token ids are at hand for ever.
    "embed": Rule((), (NOTHING,), cheap=True),
    "add": Rule((NOTHING,), (), cheap=True),
    "shift": Rule((NOTHING,), (NOTHING,), cheap=True),  # plus a trained vector
    "prepend": Rule((NOTHING,), (NOTHING,)),  # trained rows before the others
    "scale": Rule((NOTHING,), (_any_of("in0"),), cheap=True),  # times a trained vector
    # An RMS or layer norm: its scale is found again from its input.
    "norm": Rule((_any_of("in0"),), (_any_of("in0"), NOTHING), cheap=True),
    "rope": Rule((NOTHING,), (), cheap=True),  # a rotation: positions are at hand
    "clip": Rule((_any_of("out1", "in0"),), (), cheap=True),
    "relu": Rule((_any_of("out1", "out0", "in0"),), (), cheap=True),
    "act": Rule((_any_of("in0"),), (), cheap=True),
    "gated": Rule((_any_of("in0 in1"), _any_of("in0")), (), cheap=True),
    # Softmax attention of q, k, v; out0 = z, out1 = log-sum-exp, out2 = probabilities P, which a
    # kernel makes again tile by tile from q, k and log-sum-exp:
    # dS = P * (dz v^T - rowsum(dz * z)). The parameter is a trained prefix of keys and values.
    "attention": Rule((_FLASH, _FLASH, _any_of("in0 in1 out1")), (_FLASH,), tiles=(2,)),
    # Gated linear attention of q, k, v and log gates is one operator that keeps them all; states
    # are made again from the one before the window.
    "gla": Rule((_any_of("in0 in1 in2 in3"),)),
    "gla_of_qkv": Rule((_any_of("in0 in1"),)),  # q, k, v as one tensor
    "log_gate": Rule((_any_of("in0"),), (), cheap=True),  # logsigmoid over tau
    "short_conv": Rule((NOTHING,), (_any_of("in0"),)),
    # Mixture of experts. Inputs: x, chosen experts (indices).
    "route": Rule((_any_of("in0 out1"),), (), cheap=True),  # logits -> weights, chosen
    "expert_linear": Rule((_any_of("in1"), None), (_any_of("in0 in1"),)),
    # neuron, weights, chosen -> sum over the chosen of weight * down(neuron). The gradient of a
    # weight is neuron . down^T dy, so the experts' outputs are never needed.
    "expert_mix": Rule((_any_of("in1 in2"), _any_of("in0 in2"), None), (_any_of("in0 in1 in2"),)),
    "row_gate": Rule((_any_of("in1"), _any_of("in0 in1")), (), cheap=True),  # x * sigmoid(g)
    # Loss and its gradient by the hidden state are computed together, chunk by chunk, in the
    # forward pass (out1), so logits are never kept. A head that is trained needs its input too.
    "head_loss": Rule((_any_of("out1"),), (_any_of("in0"),)),
    # Primitives of the eager spelling.
    "cast": Rule((NOTHING,), (), cheap=True),
    "repeat": Rule((NOTHING,), (), cheap=True),
    "gather": Rule((_any_of("in1"), None), (), cheap=True),
    "inv_rms": Rule((_any_of("in0 out0"),), (), cheap=True),
    "mul": Rule((_any_of("in1"), _any_of("in0")), (), cheap=True),
    "matmul": Rule((_any_of("in1"), _any_of("in0"))),
    "softmax": Rule((_any_of("out0"),), ()),
    # torch's keeps a buffer beside its input (on a CPU; on a GPU it is empty).
    "logsigmoid": Rule((_any_of("in0 out1"),), (), cheap=True),
    "tanh": Rule((_any_of("out0"),), (), cheap=True),
    "log_softmax": Rule((_any_of("out0"),), ()),
    "sum_experts": Rule((_any_of("in1"), _any_of("in0"), None), ()),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the forward pass.

    Attributes:
        layer: -1 outside layers.
        shape: of one token's row.
        cached: the engine's key-value cache holds it anyway.
    """

    name: str
    layer: int
    shape: tuple[int, ...]
    dtype: str
    cached: bool = False

    @property
    def bits(self) -> int:
        """Bits a token."""
        count = BITS[self.dtype]
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter: ``count`` numbers."""

    name: str
    count: int
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Op:
    """One operation; tensors by their keys in the graph.

    Attributes:
        rebuild: False forbids rebuilding its outputs although the kind is cheap.
    """

    kind: str
    layer: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: tuple[Param, ...] = ()
    rebuild: bool = True

    @property
    def cheap(self) -> bool:
        return RULES[self.kind].cheap and self.rebuild


@dataclass(slots=True)
class Graph:
    """Operations in forward order and their tensors by key."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    def producers(self) -> dict[str, Op]:
        return {out: op for op in self.ops for out in op.outputs}


def build_graph(
    config: ModelConfig,
    trainables: Sequence[Trainable],
    *,
    length: int,
    dtype: str = "bfloat16",
    adapter_dtype: str | None = None,
    spelling: Literal["fused", "eager", "rerun"] = "fused",
    eager_attention: bool = True,
) -> Graph:
    """The forward pass of ``config`` with ``trainables``.

    Args:
        length: tokens of the sequence (attention probabilities have a row of this many).
        dtype: of the weights and activations.
        adapter_dtype: of the bypasses' weights; None as ``dtype``. Where it differs, the eager
            spelling casts what a bypass reads.
        spelling: see the module's text.
        eager_attention: of the eager spelling: attention in primitives too; False takes one fused
            attention, as ``scaled_dot_product_attention`` is.

    Raises:
        InvalidRequest: see :func:`invivo.engine.trainable.checked`; an unknown dtype.
    """
    for given in (dtype, adapter_dtype or dtype):
        if given not in ("bfloat16", "float16", "float32", "float64"):
            raise InvalidRequest(
                "unknown dtype", field="dtype", given=given, remedy="Use bfloat16 or float32"
            )
    builder = _Builder(
        config=config,
        trainables=checked(config, trainables),
        length=length,
        dtype=dtype,
        adapter_dtype=adapter_dtype or dtype,
        eager=spelling != "fused",
        loss_at_once=spelling != "eager",
        eager_attention=spelling == "eager" and eager_attention,
    )
    return builder.build()


@dataclass(slots=True)
class _Builder:
    """Writes the graph down; a method a part of the model, each returning a tensor's key."""

    config: ModelConfig
    trainables: tuple[Trainable, ...]
    length: int
    dtype: str
    adapter_dtype: str
    eager: bool
    loss_at_once: bool
    eager_attention: bool
    graph: Graph = field(default_factory=Graph)
    layer: int = -1
    shared_a: dict[str, str] = field(default_factory=dict)  # "3.qkv" -> A x of that fused map

    # --- words ------------------------------------------------------------------------------
    def tensor(self, name: str, *shape: int, dtype: str | None = None, cached: bool = False) -> str:
        key = name if self.layer < 0 else f"{self.layer}.{name}"
        assert key not in self.graph.tensors, key
        self.graph.tensors[key] = Tensor(name, self.layer, shape, dtype or self.dtype, cached)
        return key

    def apply(
        self, kind: str, inputs: Sequence[str], *outputs: str, params: Sequence[Param] = (),
        rebuild: bool = True,
    ) -> str:  # fmt: skip
        op = Op(kind, self.layer, tuple(inputs), outputs, tuple(params), rebuild)
        self.graph.ops.append(op)
        return outputs[0]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.graph.tensors[key].shape

    def width(self, key: str) -> int:
        return self.shape(key)[-1]

    def find(self, kind: str, place: str) -> Trainable | None:
        layer = max(self.layer, 0)
        for each in self.trainables:
            here = place in each.on if each.on else place == ""
            if each.kind == kind and here and layer in (each.layers or ()):
                return each
        return None

    def cast(self, x: str, dtype: str, name: str) -> str:
        if self.graph.tensors[x].dtype == dtype:
            return x
        return self.apply("cast", [x], self.tensor(name, *self.shape(x), dtype=dtype))

    # --- bypasses ---------------------------------------------------------------------------
    def project(self, name: str, x: str, d_out: int, place: str, *, bias: bool) -> str:
        """A frozen linear map with what is trained beside it; the result is called ``name``."""
        d_in = self.width(x)
        ia3 = self.find("ia3", place)
        if ia3 is not None and place == "down":  # of a feed-forward the input is scaled
            scaled = self.tensor("mlp.neuron.scaled", d_in)
            x = self.apply("scale", [x], scaled, params=[Param("ia3.down", d_in, True)])
            ia3 = None
        fused = next((f for f, parts in FUSED.items() if place in parts), "")
        lora = self.find("lora", place) or self.find("lora", fused)
        params = [Param(f"{place}.weight", d_in * d_out)]
        if bias:
            params.append(Param(f"{place}.bias", d_out))
        plain = name + ".unscaled" if ia3 is not None else name
        result = plain + ".frozen" if lora is not None else plain
        y = self.apply("linear", [x], self.tensor(result, d_out), params=params)
        if lora is not None:
            owner = place if place in lora.on else fused
            a = self.lora_a(x, owner, lora.size)
            up = self.tensor(plain + ".lora", d_out, dtype=self.graph.tensors[a].dtype)
            self.apply(
                "low_rank", [a], up, params=[Param(f"lora.{place}.B", lora.size * d_out, True)]
            )
            y = self.apply("add", [y, up], self.tensor(plain, d_out))
        if ia3 is not None:
            y = self.apply(
                "scale", [y], self.tensor(name, d_out), params=[Param(f"ia3.{place}", d_out, True)]
            )
        return y

    def lora_a(self, x: str, owner: str, rank: int) -> str:
        """``A x``, once for all parts of a fused map."""
        key = f"{self.layer}.{owner}"
        if key not in self.shared_a:
            dtype = self.adapter_dtype if self.eager else self.dtype
            read = self.cast(x, dtype, f"{owner}.lora.in")
            a = self.tensor(f"{owner}.lora.a", rank, dtype=dtype)
            weight = Param(f"lora.{owner}.A", rank * self.width(x), True)
            self.shared_a[key] = self.apply("low_rank", [read], a, params=[weight])
        return self.shared_a[key]

    def site(self, name: str, x: str) -> str:
        """What sits at a site: a bottleneck adapter, a steering vector."""
        adapter, vector = self.find("adapter", name), self.find("steering", name)
        d = self.width(x)
        if adapter is not None:
            dtype = self.adapter_dtype if self.eager else self.dtype
            read = self.cast(x, dtype, f"{name}.adapter.in")
            down = self.tensor(f"{name}.adapter.down", adapter.size, dtype=dtype)
            mid = self.tensor(f"{name}.adapter.neuron", adapter.size, dtype=dtype)
            sign = self.tensor(f"{name}.adapter.sign", adapter.size, dtype="bit")
            up = self.tensor(f"{name}.adapter.up", d, dtype=dtype)
            size = adapter.size * d
            self.apply("low_rank", [read], down, params=[Param(f"adapter.{name}.D", size, True)])
            self.apply("relu", [down], mid, sign)
            self.apply("low_rank", [mid], up, params=[Param(f"adapter.{name}.U", size, True)])
            x = self.apply("add", [x, up], self.tensor(f"{name}.adapted", d))
        if vector is not None:
            weight = Param(f"steering.{name}", d, True)
            x = self.apply("shift", [x], self.tensor(f"{name}.steered", d), params=[weight])
        return x

    # --- parts of the model -----------------------------------------------------------------
    def norm(self, name: str, x: str, weight: str, *, width: int | None = None) -> str:
        """``width``: numbers of the weight where it is shared between heads."""
        shape, d = self.shape(x), width or self.width(x)
        params = [Param(f"{weight}.weight", d)]
        layer_norm = self.config.norm == "layer" and not weight.endswith(("q_norm", "k_norm"))
        if layer_norm:
            params.append(Param(f"{weight}.bias", d))
        if not self.eager or layer_norm:
            return self.apply("norm", [x], self.tensor(name, *shape), params=params)
        own = self.graph.tensors[x].dtype
        exact = "float64" if own == "float64" else "float32"
        wide = self.cast(x, exact, f"{name}.float")
        rows = (*shape[:-1], 1)
        scale = self.apply("inv_rms", [wide], self.tensor(f"{weight}.scale", *rows, dtype=exact))
        unit = self.tensor(f"{name}.unit.float", *shape, dtype=exact)
        self.apply("mul", [wide, scale], unit)
        unit = self.cast(unit, own, f"{name}.unit")
        return self.apply("scale", [unit], self.tensor(name, *shape), params=params)

    def build(self) -> Graph:
        c = self.config
        params = [Param("embed.weight", c.vocab_size * c.d_model)]
        if c.learned_positions:
            params.append(Param("positions.weight", c.max_positions * c.d_model))
        prompt = self.find("soft_prompt", "")
        if prompt is not None:
            params.append(Param("soft_prompt", prompt.size * c.d_model, True))
        # The first residual stream needs no keeping: it is looked up again.
        x = self.apply("embed", [], self.tensor("embed.out", c.d_model), params=params)
        for i in range(c.n_layers):
            self.layer = i
            x = self.whole_layer(self.site("resid.pre", x))
        self.layer = -1
        self.loss(self.norm("final.norm.out", x, "final_norm"))
        return self.graph

    def whole_layer(self, x: str) -> str:
        c = self.config
        h = self.norm("attn.in", x, "norm1") if c.pre_norm else x
        h = self.site("attn.in", h)
        recurrent = c.layers[self.layer].mixer == "gla"
        out = self.linear_attention(h) if recurrent else self.attention(h)
        if c.post_norm:
            out = self.norm("attn.out", out, "post1")
        out = self.site("attn.out", out)
        x = self.site("resid.mid", self.apply("add", [x, out], self.tensor("resid.mid", c.d_model)))
        h = self.norm("mlp.in", x, "norm2") if c.pre_norm else x
        h = self.site("mlp.in", h)
        last = "mlp.proj" if c.post_norm else "mlp.out"
        if c.layers[self.layer].feedforward == "moe":
            assert c.moe is not None
            out = self.mixture(h, c.moe, last)
        else:
            out = self.mlp(h, c.d_ff, "mlp", last)
        if c.post_norm:
            out = self.norm("mlp.out", out, "post2")
        out = self.site("mlp.out", out)
        # Rebuilding this sum would reach back through all layers: it is where a layer begins.
        post = self.tensor("resid.post", c.d_model)
        return self.site("resid.post", self.apply("add", [x, out], post, rebuild=False))

    def attention(self, x: str) -> str:
        c = self.config
        q = self.heads("q", x, c.n_heads)
        k = self.heads("k", x, c.n_kv_heads)
        v = self.heads("v", x, c.n_kv_heads)
        prefix = self.find("prefix", "")
        params: list[Param] = []
        if prefix is not None:
            count = 2 * prefix.size * c.n_kv_heads * c.head_dim
            params.append(Param("prefix", count, True))
        if self.eager_attention:
            z = self.attention_in_primitives(q, k, v, params)
        else:
            width = c.n_heads * c.head_dim
            z = self.tensor("attn.z", width)
            lse = self.tensor("attn.lse", c.n_heads, dtype=self.exact)
            self.apply("attention", [q, k, v], z, lse, self.probabilities(), params=params)
        last = "attn.proj" if c.post_norm else "attn.out"
        return self.project(last, z, c.d_model, "o", bias=c.o_bias)

    def linear_attention(self, x: str) -> str:
        """Gated linear attention, its gates and its output gate."""
        gla = self.config.gla
        assert gla is not None
        mixed_of = [
            self.project(f"attn.{which}", x, n, which, bias=False)
            for which, n in (("q", gla.k_width), ("k", gla.k_width), ("v", gla.v_width))
        ]
        if gla.conv_size:  # one convolution and one activation over all three
            size = gla.qkv_width * gla.conv_size
            y = self.tensor("attn.qkv.conv", gla.qkv_width)
            self.apply("short_conv", mixed_of, y, params=[Param("conv.weight", size)])
            mixed_of = [self.apply("act", [y], self.tensor("attn.qkv", gla.qkv_width))]
        low = self.tensor("gla.gate.low", gla.gate_rank)
        first = [Param("gate_a.weight", self.width(x) * gla.gate_rank)]
        second = [Param("gate_b.weight", gla.gate_rank * gla.k_width)]
        second.append(Param("gate_b.bias", gla.k_width))
        self.apply("linear", [x], low, params=first)
        logits = self.tensor("gla.gate.logits", gla.k_width)
        self.apply("linear", [low], logits, params=second)
        gate = self.tensor("gla.gate", gla.k_width, dtype=self.exact)
        if self.eager:
            wide = self.cast(logits, self.exact, "gla.gate.logits.float")
            buffer = self.tensor("gla.gate.buffer", gla.k_width, dtype=self.exact)
            self.apply("logsigmoid", [wide], gate, buffer)
        else:
            self.apply("log_gate", [logits], gate)
        z = self.tensor("gla.z", gla.n_heads, gla.head_v)
        self.apply("gla_of_qkv" if gla.conv_size else "gla", [*mixed_of, gate], z)
        r = self.project("gla.r", x, gla.v_width, "r", bias=False)
        normed = self.norm("gla.z.normed", z, "g_norm", width=gla.head_v)
        mixed = self.gated("gla.mixed", r, normed, (gla.v_width,))
        last = "attn.proj" if self.config.post_norm else "attn.out"
        return self.project(last, mixed, self.config.d_model, "o", bias=False)

    @property
    def exact(self) -> str:
        """What sums are accumulated in."""
        return "float64" if self.dtype == "float64" else "float32"

    def probabilities(self, name: str = "attn.prob", dtype: str | None = None) -> str:
        window = self.config.layers[self.layer].window
        prefix = self.find("prefix", "")
        keys = min(self.length, window or self.length) if not self.eager else self.length
        keys += prefix.size if prefix is not None else 0
        return self.tensor(name, self.config.n_heads, keys, dtype=dtype)

    def heads(self, which: str, x: str, count: int) -> str:
        """Queries, keys or values: projected, cut, normalised and turned as the config says."""
        c = self.config
        width = count * c.head_dim
        y = self.project(f"attn.{which}", x, width, which, bias=c.qkv_bias)
        if c.qk_norm != "none" and which != "v":
            shared = c.head_dim if c.qk_norm == "head" else width
            y = self.norm(f"attn.{which}.normed", y, f"{which}_norm", width=shared)
        if c.qkv_clip is not None:
            inside = self.tensor(f"attn.{which}.inside", width, dtype="bit")
            y = self.apply("clip", [y], self.tensor(f"attn.{which}.cut", width), inside)
        if which != "v" and c.layers[self.layer].rope is not None:
            y = self.apply("rope", [y], self.tensor(f"attn.{which}.rot", width))
        if which != "q":
            old = self.graph.tensors[y]
            self.graph.tensors[y] = Tensor(old.name, old.layer, old.shape, old.dtype, cached=True)
        return y

    def attention_in_primitives(self, q: str, k: str, v: str, prefix: Sequence[Param]) -> str:
        c = self.config
        width = c.n_heads * c.head_dim
        if prefix:
            own = self.width(k)
            k = self.apply("prepend", [k], self.tensor("attn.k.all", own), params=prefix)
            v = self.apply("prepend", [v], self.tensor("attn.v.all", own))
        if c.n_heads != c.n_kv_heads:
            k = self.apply("repeat", [k], self.tensor("attn.k.repeated", width))
            v = self.apply("repeat", [v], self.tensor("attn.v.repeated", width))
        p = self.apply("matmul", [q, k], self.probabilities("attn.score"))
        if c.attn_softcap is not None:
            p = self.apply("tanh", [p], self.probabilities("attn.score.capped"))
        p = self.apply("softmax", [p], self.probabilities("attn.prob.float", self.exact))
        if self.exact != self.dtype:
            p = self.apply("cast", [p], self.probabilities("attn.prob"))
        return self.apply("matmul", [p, v], self.tensor("attn.z", width))

    def mlp(self, x: str, f: int, prefix: str, last: str) -> str:
        c = self.config
        beside = "" if prefix == "mlp" else "shared."  # a bypass does not reach into experts
        if c.gated_mlp:
            gate = self.project(f"{prefix}.gate", x, f, f"{beside}gate", bias=c.mlp_bias)
            up = self.project(f"{prefix}.up", x, f, f"{beside}up", bias=c.mlp_bias)
            neuron = self.gated(f"{prefix}.neuron", gate, up, (f,))
        else:
            up = self.project(f"{prefix}.up", x, f, f"{beside}up", bias=c.mlp_bias)
            neuron = self.tensor(f"{prefix}.neuron", f)
            if c.activation == "relu":
                self.apply("relu", [up], neuron, self.tensor(f"{prefix}.sign", f, dtype="bit"))
            else:
                self.apply("act", [up], neuron)
        return self.project(last, neuron, c.d_model, f"{beside}down", bias=c.mlp_bias)

    def gated(self, name: str, gate: str, up: str, shape: tuple[int, ...]) -> str:
        if not self.eager:
            return self.apply("gated", [gate, up], self.tensor(name, *shape))
        active = self.apply("act", [gate], self.tensor(f"{name}.gate", *shape))
        return self.apply("mul", [active, up], self.tensor(name, *shape))

    def mixture(self, x: str, moe: MoEConfig, last: str) -> str:
        """``top_k`` rows a token go through the experts; an always-on expert may stand beside."""
        d, k, f = self.config.d_model, moe.top_k, moe.d_expert
        logits = self.tensor("moe.router", moe.n_experts)
        self.apply("linear", [x], logits, params=[Param("router", moe.n_experts * d)])
        weights = self.tensor("moe.weight", k)
        chosen = self.tensor("moe.chosen", k, dtype="int32")
        rows = x
        if self.eager:
            prob = self.tensor("moe.router.prob", moe.n_experts, dtype=self.exact)
            self.apply("softmax", [logits], prob)
            self.apply("route", [prob], weights, chosen)
            rows = self.apply("gather", [x, chosen], self.tensor("moe.expert.in", k, d))
        else:
            self.apply("route", [logits], weights, chosen)
        size = moe.n_experts * d * f
        gate, up = self.tensor("moe.gate", k, f), self.tensor("moe.up", k, f)
        self.apply("expert_linear", [rows, chosen], gate, params=[Param("experts.gate", size)])
        self.apply("expert_linear", [rows, chosen], up, params=[Param("experts.up", size)])
        neuron = self.gated("moe.neuron", gate, up, (k, f))
        down = [Param("experts.down", size)]
        y = self.tensor("moe.mixed" if moe.d_shared else last, d)
        if self.eager:
            outs = self.tensor("moe.expert.out", k, d)
            self.apply("expert_linear", [neuron, chosen], outs, params=down)
            self.apply("sum_experts", [outs, weights, chosen], y)
        else:
            self.apply("expert_mix", [neuron, weights, chosen], y, params=down)
        if not moe.d_shared:
            return y
        own = self.mlp(x, moe.d_shared, "moe.shared", "moe.shared.proj")
        gate = self.tensor("moe.shared.weight", 1)
        self.apply("linear", [x], gate, params=[Param("shared_gate", d)])
        own = self.apply("row_gate", [own, gate], self.tensor("moe.shared.out", d))
        return self.apply("add", [y, own], self.tensor(last, d))

    def loss(self, h: str) -> None:
        c = self.config
        head = [Param("head.weight", c.vocab_size * c.d_model)]
        loss = self.tensor("loss", 1, dtype=self.exact)
        if self.loss_at_once:
            self.apply("head_loss", [h], loss, self.tensor("loss.grad", c.d_model), params=head)
            return
        y = self.apply("linear", [h], self.tensor("logits.plain", c.vocab_size), params=head)
        if c.logit_softcap is not None:
            y = self.apply("tanh", [y], self.tensor("logits", c.vocab_size))
        y = self.cast(y, self.exact, "logits.float")
        logprob = self.tensor("logprob", c.vocab_size, dtype=self.exact)
        self.apply("add", [self.apply("log_softmax", [y], logprob)], loss)
