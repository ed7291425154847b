"""The decoder as a module from tokens to loss: what is recomputed, compiled and sharded.

Its parameters are the decoder's own, by reference. Each layer is a module of its own, so that
``fully_shard`` has a place to gather a layer's parameters before it runs and to scatter its
gradients after; the head's product happens inside the whole, where its parameters are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn

from invivo.kernels.cross_entropy import IGNORED
from invivo.models.decoder import Decoder, Layer
from invivo.models.feedforward.moe import MoE
from invivo.training.forward import Recompute, Table, dense_forward, run_layer, twice
from invivo.training.loss import head_loss
from invivo.training.texts import Texts


class TextLayer(nn.Module):
    """A layer over whole texts.

    Compiled, it is one graph without breaks, which all layers of a kind share; layers with a
    mixture of experts are not compiled, since the shapes of their products depend on the data.
    """

    def __init__(self, layer: Layer, *, recompute: Recompute = "none", compile: bool = False):
        super().__init__()
        self.layer = layer
        self.is_compiled = compile and not isinstance(layer.feedforward, MoE)
        run: Callable[..., torch.Tensor] = run_layer
        if self.is_compiled:
            run = torch.compile(run_layer, fullgraph=True)
        self._recompute = recompute
        self.run_as(run)

    def run_as(self, run: Callable[..., torch.Tensor]) -> None:
        """Let ``run``, of the arguments of :func:`run_layer`, compute this layer."""
        self._run = run if self._recompute == "none" else partial(twice, run)

    def forward(
        self, x: torch.Tensor, rope: Table | None, mask: torch.Tensor | None, texts: Texts
    ) -> torch.Tensor:
        """See :func:`~invivo.training.forward.run_layer`."""
        if self.is_compiled:  # else every number of documents would be compiled for itself
            torch._dynamo.maybe_mark_dynamic(texts.span_start, 0)
            torch._dynamo.maybe_mark_dynamic(texts.span_start_device, 0)
        return self._run(self.layer, x, rope, mask, texts)


Around = Callable[[Callable[[Decoder], torch.Tensor]], torch.Tensor]


class LossModel(nn.Module):
    """:func:`~invivo.training.loss.dense_loss` of one decoder as a module.

    Args:
        decoder: its parameters are set to require gradients.
        dtype: of states and products; None: the parameters'.
        recompute: ``layer`` keeps only the layers' inputs for the backward pass.
        compile: run each layer through torch.compile; the first steps compile for a while.

    Attributes:
        around: calls what runs the decoder, with the decoder, or one that stands for it and has
            embedding, last norm and head at hand.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        dtype: torch.dtype | None = None,
        recompute: Recompute = "none",
        compile: bool = False,
    ):
        super().__init__()
        self.decoder = decoder.requires_grad_(True)
        self.dtype = dtype
        self.around: Around = lambda run: run(decoder)
        self.layers = nn.ModuleList(
            TextLayer(cast(Layer, layer), recompute=recompute, compile=compile)
            for layer in decoder.layers
        )

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of nats [] and count of labels []; tokens, labels and starts [B, T]."""
        loss = self.around(lambda d: head_loss(d, self._states(d, tokens, starts), labels)[0])
        return loss, (labels != IGNORED).sum()

    def states(self, tokens: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised final states [B, T, d]."""
        return self.around(lambda d: self._states(d, tokens, starts))

    def _states(
        self, decoder: Decoder, tokens: torch.Tensor, starts: torch.Tensor | None
    ) -> torch.Tensor:
        layers = list(self.layers)
        return dense_forward(decoder, tokens, starts=starts, dtype=self.dtype, layers=layers)
