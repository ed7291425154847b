"""The hand-written backward of one layer for one window, from what the tape kept.

Each kept tensor is read, each other one rebuilt from those by cheap operations, or by the maps
and the attention that the tape's plan lets run again; the graph of the memory plan
(:mod:`invivo.engine.training_graph`) says that this suffices. Frozen weights get no gradient. A
LoRA has hand-written gradients; any other bypass is differentiated by autograd over that bypass
alone, a mixture of experts by autograd over its feed-forward. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from invivo.engine.bypasses import LowRank, TrainBypass
from invivo.engine.packing import Part, parts
from invivo.engine.tape import output_parts
from invivo.engine.train_sequence import TrainSequence
from invivo.engine.trained_hooks import TrainedHooks
from invivo.engine.transfer import to_device
from invivo.kernels.activation import activation, gated_activation
from invivo.kernels.activation_backward import activation_backward, gated_activation_backward
from invivo.kernels.attention import attention_with_lse
from invivo.kernels.attention_backward import attention_backward, attention_lse
from invivo.kernels.linear import linear as linear_map
from invivo.kernels.norm import rms_norm
from invivo.kernels.norm_backward import layer_norm_backward, rms_norm_backward
from invivo.kernels.paging import PagedLayout
from invivo.kernels.rotary import turn_back, turn_heads
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder, Layer
from invivo.models.feedforward.mlp import MLP
from invivo.models.mixers.attention import Attention
from invivo.models.norm import Norm


class LayerBackward:
    """Backward units of the tape mode."""

    def __init__(self, decoder: Decoder, cache: KVCache, hooks: TrainedHooks) -> None:
        self._decoder = decoder
        self._cache = cache
        self._hooks = hooks

    def run(
        self,
        sequence: TrainSequence,
        bypass: TrainBypass,
        rows: tuple[int, int],
        layers: tuple[int, int],
    ) -> torch.Tensor | None:
        """Gradient by the residual stream before ``layers``; parameters gather theirs in ``.grad``.

        Args:
            bypass: differentiable, for these rows.
            rows, layers: ranges, the ends exclusive.

        Returns:
            [s, d], None where nothing reads it.
        """
        assert sequence.dx is not None
        dx: torch.Tensor | None = sequence.dx
        if rows != (0, sequence.length):
            dx = sequence.dx[slice(*rows)]
        window = _Window(self._decoder, self._cache, self._hooks, sequence, bypass, rows)
        with torch.no_grad():
            for layer in reversed(range(*layers)):
                if sequence.tape is not None:
                    sequence.tape.look_ahead(layer)
                window.enter(layer)
                assert dx is not None
                if layer == self._decoder.config.n_layers - 1:
                    dx = norm_backward(self._decoder.final_norm, dx, window.layer_output())
                dx = window.backward(dx)
        return dx


class LowRankBackward:
    """Through one LoRA beside a map, ``y += scale (x A^T) B^T``.

    With e = scale dy B: dx += e A, dA = e^T x, dB = scale dy^T (x A^T).
    """

    def __init__(self, part: LowRank, d_out: torch.Tensor) -> None:
        """d_out [s, d_out]: gradient by the map's output."""
        self._part = part
        self._outer = part.of(d_out)
        self.a, b = part.cast(d_out.dtype)
        self.inner = _scaled_product(self._outer, b, part.scale)  # e [s, R]

    def add_gradients(self, x: torch.Tensor) -> None:
        """Add to the parameters' gradients; x [s, d_in] is what map and LoRA read."""
        part = self._part
        reduced = _scaled_product(x, self.a.T, part.scale)
        for parameter, left, right in (
            (part.a, self.inner.T, x),
            (part.b, self._outer.T, reduced),
        ):
            gradient = _product_in(parameter.dtype, left, right)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient


def low_rank_input(
    beside: Sequence[LowRankBackward], d_out: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Gradient by what a frozen map and the LoRAs beside it read: [s, d_in]."""
    if not beside:
        return d_out @ weight
    d_x = beside[0].inner @ beside[0].a
    for part in beside[1:]:
        d_x.addmm_(part.inner, part.a)
    return d_x.addmm_(d_out, weight)


def _scaled_product(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale x y`` [s, R], rounded once."""
    out = x.new_empty((x.shape[0], y.shape[1]))
    return out.addmm_(x, y, beta=0, alpha=scale)


def _product_in(dtype: torch.dtype, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x y`` in ``dtype``; on a GPU as the sums come, without rounding in between."""
    if x.is_cuda and dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, y, out_dtype=dtype)
    return (x @ y).to(dtype)


def norm_backward(
    norm: Norm, dy: torch.Tensor, x: torch.Tensor, beside: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient of a norm of the decoder by its input x [s, d], plus ``beside``."""
    if norm.is_rms:
        return rms_norm_backward(
            dy, x, norm.weight, norm.eps, unit_offset=norm.unit_offset, beside=beside
        )
    dx = layer_norm_backward(dy, x, norm.weight, norm.eps)
    return dx if beside is None else dx.add_(beside)


def window_in_pages(sequence: TrainSequence, start: int, stop: int, block_size: int) -> PagedLayout:
    """Rows [start, stop) of a sequence as spans over its blocks, one a text; for reading the cache
    only."""
    assert sequence.table is not None
    if sequence.packing is not None:
        return _packed_in_pages(sequence, start, stop, block_size)
    device, n = sequence.tokens.device, stop - start
    nowhere = torch.empty(0, dtype=torch.int64, device=device)
    return PagedLayout(
        positions=nowhere,
        slots=nowhere,
        # Made on the device: a copy from the host would wait for everything launched so far.
        span_start=torch.arange(0, n + 1, n, dtype=torch.int32, device=device),
        kv_len=torch.full((1,), stop, dtype=torch.int32, device=device),
        block_table=sequence.table.to(torch.int32)[None],
        block_size=block_size,
        n_decode=int(n == 1),
        max_query=n,
        max_kv=stop,
        span_start_host=[0, n],
        kv_len_host=[stop],
    )


def _packed_in_pages(
    sequence: TrainSequence, start: int, stop: int, block_size: int
) -> PagedLayout:
    assert sequence.table is not None
    device = sequence.tokens.device
    own = parts(sequence.packing, start, stop)
    starts = [own[0].start - start, *(part.stop - start for part in own)]
    lengths = [part.stop - part.begin for part in own]
    width = -(-max(lengths) // block_size)
    # Blocks past the end of a text belong to the next one: nobody reads so far.
    at = np.array([part.block for part in own])[:, None] + np.arange(width)
    at = to_device(np.minimum(at, len(sequence.blocks) - 1), device)
    nowhere = torch.empty(0, dtype=torch.int64, device=device)
    return PagedLayout(
        positions=nowhere,
        slots=nowhere,
        span_start=to_device(np.array(starts, dtype=np.int32), device),
        kv_len=to_device(np.array(lengths, dtype=np.int32), device),
        block_table=sequence.table[at].to(torch.int32),
        block_size=block_size,
        n_decode=0,
        max_query=max(part.stop - part.start for part in own),
        max_kv=max(lengths),
        span_start_host=starts,
        kv_len_host=lengths,
    )


class _Window:
    """One layer over rows [start, stop) of one sequence."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        hooks: TrainedHooks,
        sequence: TrainSequence,
        bypass: TrainBypass,
        rows: tuple[int, int],
    ) -> None:
        assert sequence.tape is not None
        self.decoder = decoder
        self.config = decoder.config
        self.cache = cache
        self.hooks = hooks
        self.sequence = sequence
        self.tape = sequence.tape
        self.bypass = bypass
        self.start, self.stop = rows
        self.parts = parts(sequence.packing, *rows)
        self.dtype = decoder.embed.dtype
        self.index = -1

    def enter(self, layer: int) -> None:
        """Turn to ``layer``."""
        self.index = layer
        self.layer: Layer = self.decoder.layers[layer]  # type: ignore[assignment]
        assert isinstance(self.layer.mixer, Attention)  # no tape has another
        self.mixer = self.layer.mixer
        self.hooked = self.hooks.names.get(layer, frozenset())
        self.reads = self.hooks.reads.get(layer, frozenset())
        self.last_hook = self.hooks.last_hook if layer == self.hooks.bottom else None
        self.rerun = self.tape.plan.rerun.get(layer, frozenset())
        self.made: dict[str, torch.Tensor] = {}

    # --- tensors of the forward pass ------------------------------------------------------------
    def get(self, name: str) -> torch.Tensor:
        """A tensor of the forward pass, these rows: from the tape, or rebuilt."""
        value = self.made.get(name)
        if value is None:
            value = self.tape.read(self.index, name, self.start, self.stop)
            if value is None:
                value = _REBUILT[name](self)
            self.made[name] = value
        return value

    def held(self, name: str) -> bool:
        return (self.index, name) in self.tape.entries

    def layer_input(self) -> torch.Tensor:
        """The residual stream between two layers: behind the hook at the end of the one below."""
        below = self.index - 1
        if below < 0:
            return self.embeddings()
        kept = self.tape.read(below, "resid.post", self.start, self.stop)
        assert kept is not None
        hooked = "resid.post" in self.hooks.names.get(below, ())
        return self.bypass.rows("resid.post", below, kept) if hooked else kept

    def layer_output(self) -> torch.Tensor:
        return self.hook_rows("resid.post", self.get("resid.post"))

    def embeddings(self) -> torch.Tensor:
        positions = self.sequence.positions(self.start, self.stop)
        tokens = self.sequence.tokens[self.start : self.stop]
        return self.decoder.embedded(tokens, positions, self.bypass)

    def resid_pre(self) -> torch.Tensor:
        return self.hook_rows("resid.pre", self.get("layer.input"))

    def attn_in(self) -> torch.Tensor:
        norm = self.layer.norm1
        return self.get("resid.pre") if norm is None else norm.forward(self.get("resid.pre"))

    def attn_in_hooked(self) -> torch.Tensor:
        return self.hook_rows("attn.in", self.get("attn.in"))

    def resid_mid(self) -> torch.Tensor:
        before = self.get("resid.pre")
        out = self.hook_rows("attn.out", self.get("attn.out"))
        if "attn.out" not in self.reads:
            self.made.pop("attn.out", None)  # nobody asks again
        norm = self.layer.norm2
        wanted = self.reads & {"gate_up", "up"} or self.rerun & {"gate", "up"}
        if norm is None or "resid.mid" in self.hooked or not wanted:
            return before + out
        # As in the forward: the sum and what the feed-forward reads, in one pass.
        self.made["mlp.in"], total = norm.add(out, before)
        return total

    def resid_mid_hooked(self) -> torch.Tensor:
        return self.hook_rows("resid.mid", self.get("resid.mid"))

    def mlp_in(self) -> torch.Tensor:
        norm, x = self.layer.norm2, self.get("resid.mid.hooked")
        return x if norm is None else norm.forward(x)

    def mlp_in_hooked(self) -> torch.Tensor:
        return self.hook_rows("mlp.in", self.get("mlp.in"))

    def resid_post(self) -> torch.Tensor:
        return self.get("resid.mid.hooked") + self.hook_rows("mlp.out", self.get("mlp.out"))

    def attn_out(self) -> torch.Tensor:
        post = self.layer.post1
        return self.attn_proj() if post is None else post.forward(self.get("attn.proj"))

    def attn_proj(self) -> torch.Tensor:
        y = self.linear_output("o")
        return self.bypass(self.index, "o", self.linear_input("o", y), y)

    def mlp_out(self) -> torch.Tensor:
        post = self.layer.post2
        assert post is not None
        return post.forward(self.get("mlp.proj"))

    def neuron(self) -> torch.Tensor:
        kind = self.config.activation
        if not self.config.gated_mlp:
            return activation(self.get("mlp.up"), kind)
        return gated_activation(torch.cat((self.get("mlp.gate"), self.get("mlp.up")), -1), kind)

    def hooked_neuron(self) -> torch.Tensor:
        return self.hook_rows("mlp.neuron", self.get("mlp.neuron"))

    def hook_rows(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return self.bypass.rows(name, self.index, value) if name in self.hooked else value

    def remade(self, part: str) -> torch.Tensor:
        """A part of a map's output: from that before a trained vector, or by the map again."""
        if part.startswith("attn."):
            linear = "qkv"
        else:
            linear = "gate_up" if self.config.gated_mlp else "up"
        if linear not in self.hooked:
            self.made.update(self.run_again(linear))
            if linear != "qkv" and "mlp.in" not in self.reads:  # nobody asks again
                self.made.pop("mlp.in", None)
                self.made.pop("mlp.in.hooked", None)
            return self.made[part]
        y = self.linear_output(linear)
        y = self.bypass(self.index, linear, self.linear_input(linear, y), y)
        for name, cut in output_parts(self.config, linear):
            if self.runs_again(name) or self.held(f"{name}.unscaled"):
                self.made[name] = y[:, cut]
        return self.made[part]

    def runs_again(self, name: str) -> bool:
        """Whether the map behind this part of an output may run again."""
        place = "o" if name in ("attn.proj", "attn.out") else name.rpartition(".")[2]
        return place in self.rerun

    def run_again(self, linear: str) -> dict[str, torch.Tensor]:
        """The parts of a frozen map's output that the tape left to it."""
        x = self.get(_LINEAR_READS[linear]).flatten(1)
        weight, bias, packed = self.frozen(linear)
        parts = output_parts(self.config, linear)
        wanted = [
            (name, cut) for name, cut in parts if self.runs_again(name) and not self.held(name)
        ]
        if len(wanted) == len(parts):
            y = linear_map(x, weight, bias, packed)
            return {name: y[:, cut] for name, cut in parts}
        return {
            name: linear_map(x, weight[cut], None if bias is None else bias[cut])
            for name, cut in wanted
        }

    def frozen(self, linear: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Matrix, bias and packed matrix of a map that may run again."""
        mixer, mlp = self.mixer, self.layer.feedforward
        if linear == "qkv":
            return mixer.qkv, mixer.qkv_bias, mixer.qkv_packed
        if linear == "o":
            return mixer.o, mixer.o_bias, mixer.o_packed
        assert isinstance(mlp, MLP)
        if mlp.gated:
            return mlp.gate_up, mlp.gate_up_bias, mlp.up_packed
        return mlp.up, mlp.up_bias, mlp.up_packed

    def linear_input(self, linear: str, y: torch.Tensor) -> torch.Tensor:
        """[s, d_in] what a map and the bypass beside it read; a placeholder where none reads."""
        if linear in self.reads:
            return self.get(_LINEAR_READS[linear]).flatten(1)
        return y.new_zeros(()).expand(y.shape[0], 1)

    def linear_output(self, linear: str) -> torch.Tensor:
        """What a map gave before its hook, where that is kept or made again; zeros elsewhere."""
        parts = output_parts(self.config, linear)
        width = parts[-1][1].stop
        again = self.run_again(linear) if any(self.runs_again(name) for name, _ in parts) else {}
        if len(parts) == 1 and again:
            return again[parts[0][0]]
        y = torch.zeros(
            self.stop - self.start, width, dtype=self.dtype, device=self.sequence.tokens.device
        )
        for name, cut in parts:
            kept = self.tape.read(self.index, f"{name}.unscaled", self.start, self.stop)
            if kept is None:
                kept = again.get(name)
            if kept is not None:
                y[:, cut] = kept
        return y

    def mixed(self) -> torch.Tensor:
        """Attention's result once more; its log-sum-exps are at hand then, too."""
        mixer, queries = self.mixer, self.get("attn.q.final")
        queries = queries.view(queries.shape[0], -1, mixer.head_dim)
        keys, values = self.cache.layers[self.index]
        layout = window_in_pages(self.sequence, self.start, self.stop, self.cache.block_size)
        z, lse = attention_with_lse(
            queries,
            keys,
            values,
            layout,
            scale=mixer.scale,
            window=mixer.window,
            softcap=mixer.softcap,
        )
        if lse is not None and layout.n_decode == 0:
            self.made["attn.lse"] = lse
        return z.flatten(1)

    def log_sums(self) -> torch.Tensor:
        """Log-sum-exps once more."""
        if self.runs_again("attention") and not self.held("attn.z"):
            self.get("attn.z")
            if "attn.lse" in self.made:
                return self.made["attn.lse"]
        mixer, queries = self.mixer, self.get("attn.q.final")
        queries = queries.view(queries.shape[0], -1, mixer.head_dim)
        found = [
            attention_lse(
                self.rows_of(part, queries),
                self.cache.layers[self.index][0],
                self.sequence.table_of(part),
                part.start - part.begin,
                scale=mixer.scale,
                window=mixer.window,
                softcap=mixer.softcap,
            )
            for part in self.parts
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def rows_of(self, part: Part, value: torch.Tensor) -> torch.Tensor:
        """A part's rows of a tensor of these."""
        if len(self.parts) == 1:
            return value
        return value[part.start - self.start : part.stop - self.start]

    def rows_in(self, value: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor of the whole sequence."""
        whole = self.stop - self.start == self.sequence.length
        return value if whole else value[self.start : self.stop]

    def query_final(self) -> torch.Tensor:
        """Queries as they attend: normalised, cut and turned."""
        q = self.heads("attn.q")
        if self.mixer.qk_norm != "none":
            q = self.normed("attn.q")
        if self.mixer.qkv_clip is not None:
            q = q.clamp(-self.mixer.qkv_clip, self.mixer.qkv_clip)
        return self.turned(q, torch.empty_like(q, dtype=self.dtype), backward=False)

    def heads(self, name: str) -> torch.Tensor:
        return self.get(name).view(self.stop - self.start, -1, self.mixer.head_dim)

    def normed(self, name: str) -> torch.Tensor:
        x, weight = self.qk_norm_input(name)
        m = self.mixer
        y = rms_norm(x, weight, m.eps, unit_offset=m.unit_offset)
        return y.view(self.stop - self.start, -1, m.head_dim)

    def qk_norm_input(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.heads(name)
        weight = self.mixer.q_norm if name == "attn.q" else self.mixer.k_norm
        return (x if self.mixer.qk_norm == "head" else x.flatten(1)), weight

    def turned(self, x: torch.Tensor, out: torch.Tensor, *, backward: bool) -> torch.Tensor:
        """x [s, heads, D] by the rotary angles, or by their transpose: ``out``, of its shape."""
        rope = self.decoder.rope_of(self.index)
        if rope is None:
            return out.copy_(x)
        positions = self.sequence.positions(self.start, self.stop)
        turn_heads(x, *rope, positions, out, backward=backward)
        return out

    # --- backward -------------------------------------------------------------------------------
    def backward(self, dx: torch.Tensor) -> torch.Tensor | None:
        """Gradient by the layer's input from that by its output [s, d]; None: nobody reads it."""
        d_mid = self.feedforward_backward(dx)
        d_x = None if d_mid is None else self.attention_backward(d_mid)
        if d_x is not None and self.index == 0 and "embed" in self.bypass.at:
            self.vjp(self.embeddings, [], d_x)
        return d_x

    def feedforward_backward(self, dx: torch.Tensor) -> torch.Tensor | None:
        """Gradient by ``resid.mid`` before any bypass there."""
        dx_end = self.rows_vjp("resid.post", dx)
        d_out = None if dx_end is None else self.rows_vjp("mlp.out", dx_end)
        if dx_end is None or d_out is None:
            return None
        if self.layer.post2 is not None:
            d_out = norm_backward(self.layer.post2, d_out, self.get("mlp.proj"))
        d_in: torch.Tensor | None
        feedforward, norm = self.layer.feedforward, self.layer.norm2
        if isinstance(feedforward, MLP):
            d_in = self.mlp_backward(feedforward, d_out)
        else:
            d_in = self.vjp(feedforward.forward, [self.get("mlp.in.hooked")], d_out)[0]
        d_in = None if d_in is None else self.rows_vjp("mlp.in", d_in)
        if d_in is None:
            return None
        if norm is None:
            return self.rows_vjp("resid.mid", dx_end + d_in)
        before = self.get("resid.mid.hooked")
        return self.rows_vjp("resid.mid", norm_backward(norm, d_in, before, dx_end))

    def mlp_backward(self, mlp: MLP, d_out: torch.Tensor) -> torch.Tensor | None:
        if mlp.gated:
            return self.gated_backward(mlp, d_out)
        kind = self.config.activation
        d_neuron = self.linear_vjp("down", mlp.down, d_out)
        d_neuron = None if d_neuron is None else self.rows_vjp("mlp.neuron", d_neuron)
        if d_neuron is None:
            return None
        if kind == "relu" and not self.held("mlp.up"):
            if self.held("mlp.sign"):
                sign = self.get("mlp.sign")
            elif self.held("mlp.neuron"):
                sign = self.get("mlp.neuron") > 0
            else:
                sign = self.get("mlp.up") > 0
            d_up = d_neuron * sign
        else:
            d_up = activation_backward(d_neuron, self.get("mlp.up"), kind)
        return self.linear_vjp("up", mlp.up, d_up)

    def gated_backward(self, mlp: MLP, d_out: torch.Tensor) -> torch.Tensor | None:
        """Through a gated MLP. The neurons are needed only by a bypass that reads them: they come
        last, out of the pass that makes the gradients of gate and up."""
        low = self.bypass.low_rank(self.index, "down") if "down" in self.hooked else ()
        late = low is not None and self.last_hook != "down" and "mlp.neuron" not in self.hooked
        if late:
            assert low is not None
            inner = [LowRankBackward(part, d_out) for part in low]
            d_neuron: torch.Tensor | None = low_rank_input(inner, d_out, mlp.down)
        else:
            d_neuron = self.linear_vjp("down", mlp.down, d_out)
            d_neuron = None if d_neuron is None else self.rows_vjp("mlp.neuron", d_neuron)
        if d_neuron is None:
            return None
        gate, up = self.get("mlp.gate"), self.get("mlp.up")
        n, width = d_neuron.shape
        d_up = self.tape.lend(self.index, self.start, self.stop)
        if d_up is None:
            d_up = gate if gate._base is None else gate._base
            free = not self.held("mlp.gate")
            if d_up is not up._base or d_up.shape != (n, 2 * width) or not free:
                d_up = torch.empty(n, 2 * width, dtype=gate.dtype, device=gate.device)
        neuron = gated_activation_backward(d_neuron, gate, up, self.config.activation, d_up)
        if late:
            for part in inner:
                part.add_gradients(neuron)
        for name in ("mlp.gate", "mlp.up", "mlp.neuron"):  # overwritten, or no longer needed
            self.made.pop(name, None)
        del gate, up, neuron, d_neuron
        return self.linear_vjp("gate_up", mlp.gate_up, d_up)

    def attention_backward(self, d_mid: torch.Tensor) -> torch.Tensor | None:
        mixer, sequence = self.mixer, self.sequence
        d_out = self.rows_vjp("attn.out", d_mid)
        if d_out is None:
            return None
        if self.layer.post1 is not None:
            d_out = norm_backward(self.layer.post1, d_out, self.get("attn.proj"))
        d_z = self.linear_vjp("o", mixer.o, d_out)
        if d_z is None:
            return None
        keys, values = self.cache.layers[self.index]
        assert sequence.table is not None
        dk, dv = sequence.sums[self.index]
        queries = self.index > self.hooks.bottom or self.hooks.bottom_queries
        mixed = queries or dk is not None  # the gradient of values alone does not read z
        d_z = d_z.view(d_z.shape[0], -1, mixer.head_dim)
        q, lse = self.get("attn.q.final").view(d_z.shape), self.get("attn.lse")
        fresh = (self.start, self.stop) == (0, sequence.length)  # the sums hold nothing yet
        z = self.get("attn.z").view(d_z.shape) if mixed else None
        found = [
            attention_backward(
                self.rows_of(part, d_z),
                self.rows_of(part, q),
                keys,
                values,
                sequence.table_of(part),
                part.start - part.begin,
                None if z is None else self.rows_of(part, z),
                self.rows_of(part, lse),
                scale=mixer.scale,
                window=mixer.window,
                softcap=mixer.softcap,
                dk=dk if dk is None or not part.begin else dk[part.begin :],
                dv=dv if dv is None or not part.begin else dv[part.begin :],
                fresh=fresh,
            )
            for part in self.parts
        ]
        dq = found[0] if len(found) == 1 else _joined(found)
        for name in ("attn.q.final", "attn.z", "attn.lse"):
            self.made.pop(name, None)
        d_qkv = d_z.new_empty((d_z.shape[0], sum(mixer.split), mixer.head_dim))
        self.split_backward(dq if queries else None, dk, dv, d_qkv)
        if self.is_last("attn.kvhead.k"):
            return None
        d_in = self.linear_vjp("qkv", mixer.qkv, d_qkv.flatten(1))
        d_in = None if d_in is None else self.rows_vjp("attn.in", d_in)
        if d_in is None:
            return None
        norm = self.layer.norm1
        if norm is None:
            return self.rows_vjp("resid.pre", d_mid + d_in)
        before = self.get("resid.pre")
        return self.rows_vjp("resid.pre", norm_backward(norm, d_in, before, d_mid))

    def split_backward(
        self,
        dq: torch.Tensor | None,
        dk: torch.Tensor | None,
        dv: torch.Tensor | None,
        d_qkv: torch.Tensor,
    ) -> None:
        """From queries as they attend, and the sums of keys and values, back to what the map gave:
        every part is written where the map's gradient reads it, ``d_qkv`` [s, H + 2 G, D]."""
        mixer, rope = self.mixer, self.decoder.rope_of(self.index)
        own_k, own_v = (None if d is None else self.rows_in(d) for d in (dk, dv))
        hooked = not self.hooked.isdisjoint(("attn.kvhead.k", "attn.kvhead.v"))
        straight = mixer.qk_norm == "none" and mixer.qkv_clip is None and not hooked
        if straight and not (rope is None or dq is None or own_k is None or own_v is None):
            positions = self.sequence.positions(self.start, self.stop)
            turn_back(dq, own_k, own_v, *rope, positions, d_qkv)
            return
        to_q, to_k, to_v = d_qkv.split_with_sizes(mixer.split, 1)
        d_q = None if dq is None else self.turned(dq, to_q, backward=True)
        d_k = d_v = None
        if own_k is not None:
            d_k = self.rows_vjp("attn.kvhead.k", self.turned(own_k, to_k, backward=True))
        if own_v is not None:
            d_v = self.rows_vjp("attn.kvhead.v", to_v.copy_(own_v))
        if self.is_last("attn.kvhead.k"):
            return
        self.map_output_backward("attn.q", d_q, to_q)
        self.map_output_backward("attn.k", d_k, to_k)
        self.map_output_backward("attn.v", d_v, to_v)

    def map_output_backward(self, name: str, d: torch.Tensor | None, out: torch.Tensor) -> None:
        """Back through clip and QK-norm to what the map gave, into ``out`` [s, heads, D].

        ``d`` [s, heads, D] may be ``out``; None, which nobody reads, gives zeros.
        """
        m = self.mixer
        if d is None:
            out.zero_()
            return
        d = self.clip_backward(name, d)
        if m.qk_norm != "none" and name != "attn.v":
            x, weight = self.qk_norm_input(name)
            d = rms_norm_backward(d.reshape(x.shape), x, weight, m.eps, unit_offset=m.unit_offset)
        if d is not out:
            out.copy_(d.view(out.shape))

    def clip_backward(self, name: str, d: torch.Tensor) -> torch.Tensor:
        """Zero where the clip cut."""
        clip = self.mixer.qkv_clip
        if clip is None:
            return d
        if self.held(f"{name}.inside"):
            inside = self.get(f"{name}.inside").view(d.shape)
        elif self.mixer.qk_norm != "none" and name != "attn.v":
            inside = self.normed(name).abs() <= clip
        else:
            inside = self.heads(name).abs() <= clip
        return d * inside

    # --- bypasses -------------------------------------------------------------------------------
    def rows_vjp(self, name: str, d: torch.Tensor) -> torch.Tensor | None:
        """Through the hook at a site; None where it is the last one."""
        if name not in self.hooked:
            return d
        layer, bypass = self.index, self.bypass
        # Steering vectors and virtual rows read nothing, so that nothing may be kept for them.
        value = (
            differentiable(self.get("layer.input" if name == "resid.pre" else name))
            if name in self.reads
            else torch.zeros_like(d)
        )
        if self.is_last(name):
            self.vjp(lambda: bypass.rows(name, layer, value), [], d)
            return None
        return self.vjp(lambda v: bypass.rows(name, layer, v), [value], d)[0]

    def is_last(self, name: str) -> bool:
        """Whether nothing trained lies before this hook."""
        if self.last_hook == "attn.kvhead.k":  # keys and values have theirs side by side
            return name in ("attn.kvhead.k", "attn.kvhead.v")
        return name == self.last_hook

    def linear_vjp(
        self, linear: str, weight: torch.Tensor, d_out: torch.Tensor
    ) -> torch.Tensor | None:
        """Through a frozen map and the hook beside it; None where it is the last hook."""
        if linear not in self.hooked:
            return d_out @ weight
        layer, bypass = self.index, self.bypass
        low = bypass.low_rank(layer, linear)
        if low is not None:
            x = self.get(_LINEAR_READS[linear]).flatten(1)
            inner = [LowRankBackward(part, d_out) for part in low]
            for part in inner:
                part.add_gradients(x)
            return None if linear == self.last_hook else low_rank_input(inner, d_out, weight)
        parts = output_parts(self.config, linear)
        scaled = any((layer, name) in self.tape.plan.scaled for name, _ in parts)
        y = self.linear_output(linear) if scaled else torch.zeros_like(d_out)
        x, y = differentiable(self.linear_input(linear, y)), differentiable(y)
        if linear == self.last_hook:
            self.vjp(lambda: bypass(layer, linear, x, y), [], d_out)
            return None
        d_x, d_y = self.vjp(lambda a, b: bypass(layer, linear, a, b), [x, y], d_out)
        return d_x.addmm_(d_y, weight) if linear in self.reads else d_y @ weight

    @staticmethod
    def vjp(
        function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], d_out: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients by ``inputs``; parameters inside gather theirs in ``.grad``."""
        with torch.enable_grad():
            leaves = [differentiable(value).detach().requires_grad_() for value in inputs]
            out = function(*leaves)
            if out.requires_grad:
                torch.autograd.backward([out], [d_out.view(out.shape)])
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def differentiable(x: torch.Tensor) -> torch.Tensor:
    """``x`` as autograd takes it: a copy where it was made in inference mode."""
    return x.clone() if x.is_inference() else x


def _joined(found: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """All rows, where there are any."""
    there = [one for one in found if one is not None]
    return torch.cat(there) if there else None


def _remade(part: str) -> Callable[[_Window], torch.Tensor]:
    return lambda window: window.remade(part)


_REBUILT: dict[str, Callable[[_Window], torch.Tensor]] = {
    "layer.input": _Window.layer_input,
    "resid.pre": _Window.resid_pre,
    "attn.in": _Window.attn_in,
    "attn.in.hooked": _Window.attn_in_hooked,
    "attn.q": _remade("attn.q"),
    "attn.k": _remade("attn.k"),
    "attn.v": _remade("attn.v"),
    "attn.q.final": _Window.query_final,
    "attn.z": _Window.mixed,
    "attn.lse": _Window.log_sums,
    "attn.proj": _Window.attn_proj,
    "attn.out": _Window.attn_out,
    "resid.mid": _Window.resid_mid,
    "resid.mid.hooked": _Window.resid_mid_hooked,
    "mlp.in": _Window.mlp_in,
    "mlp.in.hooked": _Window.mlp_in_hooked,
    "mlp.gate": _remade("mlp.gate"),
    "mlp.up": _remade("mlp.up"),
    "mlp.neuron": _Window.neuron,
    "mlp.neuron.hooked": _Window.hooked_neuron,
    "mlp.out": _Window.mlp_out,
    "resid.post": _Window.resid_post,
}
_LINEAR_READS = {
    "qkv": "attn.in.hooked",
    "o": "attn.z",
    "gate_up": "mlp.in.hooked",
    "up": "mlp.in.hooked",
    "down": "mlp.neuron.hooked",
}
