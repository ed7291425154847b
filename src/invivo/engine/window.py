"""Token-level fine-tuning: forward windows, backward units, exact whatever the cuts.

A window of a training sequence runs forward in the flat batch like any other rows. Its backward
is cut into *units*: rows [start, stop) through layers [first, last), given out in an order in
which each finds the gradients it needs complete. Cutting changes no gradient.

Two ways (``mode``):

- ``rerun`` runs the rows again under autograd (:mod:`invivo.engine.rerun`): any bypass, any mixer;
- ``tape`` reads what the forward kept (:mod:`invivo.engine.tape`) and follows hand-written
  gradients (:mod:`invivo.engine.layer_backward`): two thirds of the arithmetic.

Two orders (``order``):

- ``window``: all layers of the last window, then of the one before. The gradients of all layers'
  keys and values are held for the whole sequence, a rerun needs nothing else.
- ``layer``: all windows of the last layer, then the layer below. One layer's key and value
  gradients are held; a rerun keeps the input of every layer.

A recurrent layer's carry is its state: a window's forward takes the one before it, its backward the
gradient by the one after it, and gives that by the one before (window order, rerun).

The loss is a sum. Divide the gradients once, by the labelled rows of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from invivo.engine.bypasses import BypassSpec, Parameters, TrainBypass
from invivo.engine.host_shelf import HostShelf
from invivo.engine.host_tape import HostTape, Product
from invivo.engine.layer_backward import LayerBackward, differentiable
from invivo.engine.packing import parts
from invivo.engine.recording import Piece
from invivo.engine.rerun import States, replay, rerun_backward
from invivo.engine.tape import DTYPES, Tape, TapePlan, TapePlanner, layer_inputs
from invivo.engine.train_sequence import TrainSequence
from invivo.engine.trained_hooks import TrainedHooks, trained_hooks
from invivo.engine.transfer import index_on
from invivo.engine.types import BackwardUnit
from invivo.errors import UnsupportedModel
from invivo.kernels.cross_entropy import CrossEntropy, cross_entropy
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder

Mode = Literal["rerun", "tape"]
Order = Literal["window", "layer"]


class WindowTrainer:
    """Runs the micro-steps of one set of trained bypasses over the frozen decoder.

    Gradients gather in ``.grad`` of the parameters until somebody takes them.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        specs: Sequence[BypassSpec],
        parameters: Parameters,
        *,
        mode: Mode = "tape",
        order: Order = "window",
        input_gradients: bool = False,
        tape_bytes: int | None = None,
        hooks: TrainedHooks | None = None,
        shelf: HostShelf | None = None,
    ) -> None:
        """Plan what is kept.

        Args:
            cache: the paged cache that the forward windows write.
            specs: what is trained.
            parameters: by name, see :mod:`invivo.engine.bypasses`; leaves that require gradients.
            input_gradients: also compute the gradient by the embeddings.
            tape_bytes: most bytes that the tape of one sequence may take, the rest is run again
                (a sequence whose tape cannot be so small is refused); None: whatever
                spares a large product is kept.
            hooks: what is trained is in the programs of the sequences, and there are no specs;
                ``rerun`` in window order.
            shelf: host memory for what ``tape_bytes`` have no room for, in layer order; None:
                there is none.

        Raises:
            InvalidRequest: see :func:`invivo.engine.trained_hooks.trained_hooks`.
            UnsupportedModel: ``tape`` for a mixer that the memory plan does not know, or layer
                order for recurrent layers.
        """
        config = decoder.config
        if config.recurrent and (mode, order) != ("rerun", "window"):
            raise UnsupportedModel(
                "recurrent layers are trained by running windows again, the last one first",
                field="mode",
                given=f"{mode}, order {order}",
                remedy="Give mode rerun and order window",
            )
        self.decoder = decoder
        self.mode: Mode = mode
        self.order: Order = order
        self._cache = cache
        trainables = [spec.trainable for spec in specs]
        self.bypass: TrainBypass | None = None
        if hooks is None:
            self.bypass = TrainBypass(config, specs, parameters)
            hooks = trained_hooks(config, trainables, input_gradients=input_gradients)
        else:
            assert not specs
            assert (mode, order) == ("rerun", "window")
        self._hooks = hooks
        self._input_gradients = input_gradients
        self._n_layers = config.n_layers
        self._recurrent = config.recurrent
        dtype = decoder.embed.dtype
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        # A backward in window order goes through all layers for every few rows.
        self._shelf = shelf if (mode, order) == ("tape", "layer") else None
        self._tape_bytes = tape_bytes
        self._planner: TapePlanner | None = None
        self._inputs: TapePlan | None = None
        self._backward: LayerBackward | None = None
        if mode == "tape":
            self._planner = TapePlanner(
                config,
                trainables,
                dtype=dtype,
                input_gradients=input_gradients,
                max_bytes=tape_bytes,
                host=None if self._shelf is None else self._shelf.room,
            )
            self._backward = LayerBackward(decoder, cache, self._hooks)
        elif order == "layer":
            self._inputs = layer_inputs(config, self._hooks, dtype=dtype)

    def bypass_of(
        self, start: int, stop: int, begins: tuple[int, ...] = (0,)
    ) -> TrainBypass | None:
        """What the rows [start, stop) of a sequence run with; None: the base model."""
        return None if self.bypass is None else self.bypass.window(start, stop, begins)

    # --- forward ------------------------------------------------------------------------------
    @property
    def records(self) -> bool:
        """Whether forward windows must run under a :class:`~invivo.engine.recording.Recording`."""
        return self._planner is not None or bool(self._inputs and self._inputs.entries)

    def check_length(self, length: int) -> None:
        """
        Raises:
            InvalidRequest: the tape of so long a sequence does not fit ``tape_bytes``.
        """
        self.planned(length)

    def planned(self, length: int) -> TapePlan | None:
        """What is kept of a sequence of ``length`` rows; None: nothing.

        Raises:
            InvalidRequest: see :meth:`check_length`.
        """
        return self._inputs if self._planner is None else self._planner.plan(length)

    def begin(self, sequence: TrainSequence) -> None:
        """Make room for a micro-step of ``sequence``, forgetting any that was under way.

        Raises:
            InvalidRequest: see :meth:`check_length`.
        """
        plan = None if sequence.held_out else self.planned(sequence.length)
        device, n = sequence.tokens.device, sequence.length
        decoder = self.decoder
        sequence.table = index_on(sequence.blocks, device)
        sequence.loss = torch.zeros((), dtype=self._wide, device=device)
        sequence.n_labels = 0
        sequence.n_correct = torch.zeros((), dtype=torch.int64, device=device)
        sequence.dx = None
        if not sequence.held_out:
            shape = (n, decoder.config.d_model)
            sequence.dx = torch.empty(shape, dtype=decoder.embed.dtype, device=device)
        sequence.drop_tape()
        if plan is not None and plan.entries:
            sequence.tape = self._tape(plan, n)
        sequence.sums = {}
        sequence.d_embeddings = None
        self.rewind(sequence)

    def _tape(self, plan: TapePlan, length: int) -> Tape:
        """Room for what is planned; where the host has none at the moment, more runs again."""
        if not plan.hosted:
            return Tape.of(plan, length)
        assert self._shelf is not None
        assert self._tape_bytes is not None
        assert self._planner is not None
        hosted = HostTape.lent_by(
            self._shelf, product_of(plan), sorted(plan.hosted), length, self._tape_bytes
        )
        if hosted is None:
            plan = self._planner.plan(length, hosted=False)
        return Tape.of(plan, length, hosted)

    def rewind(self, sequence: TrainSequence) -> None:
        """Nothing of ``sequence`` has run: its units can be planned from here on."""
        sequence.forwarded = 0
        sequence.entering = {}
        sequence.placed = None
        sequence.row, sequence.layer = sequence.length, self._n_layers
        if sequence.held_out:
            sequence.row, sequence.layer = 0, self.bottom

    def enters(self, sequence: TrainSequence, start: int, slot: int) -> None:
        """Keep the recurrent states, in ``slot``, with which a forward window begins.

        To be called before each forward window of a model with recurrent layers, after the slot
        was cleared for the first one. It is all that the backward needs of the past: one state a
        window, whatever lies before it.
        """
        states = self._cache.states_at([slot])
        if states is not None:
            sequence.entering[start] = states[0].squeeze(1), states[1].squeeze(1)

    def piece(self, sequence: TrainSequence, start: int, stop: int, row: int) -> Piece:
        """What a recording needs of rows [start, stop), which begin at ``row`` of the batch."""
        assert sequence.tape is not None
        assert sequence.table is not None
        own = [(part, sequence.table_of(part)) for part in parts(sequence.packing, start, stop)]
        return Piece(sequence.tape, own, start, stop, row)

    def forward_done(
        self,
        sequence: TrainSequence,
        start: int,
        stop: int,
        hidden: torch.Tensor,
        *,
        want_logprobs: bool = False,
    ) -> CrossEntropy:
        """Take the final states of a window that ran forward.

        Args:
            hidden: [stop - start, d] normalised final states.

        Returns:
            This window's loss; its gradient is kept for the backward, if there is to be one.
        """
        assert start == sequence.forwarded, "windows run forward in order, each row once"
        decoder = self.decoder
        weights = None if sequence.weights is None else sequence.weights[start:stop]
        labelled = sequence.labelled_within(start, stop)
        if sequence.goal is not None:
            result = sequence.goal.measure(
                decoder,
                hidden,
                sequence.labels[start:stop],
                weights,
                [row for row in sequence.labelled or () if start <= row < stop],
                start,
                want_grad=not sequence.held_out,
            )
        else:
            result = cross_entropy(
                hidden,
                decoder.embed if decoder.head is None else decoder.head,
                sequence.labels[start:stop],
                weights,
                softcap=decoder.config.logit_softcap,
                want_grad=not sequence.held_out,
                want_logprobs=want_logprobs,
                packed=decoder.head_packed,
                at=labelled,
            )
        if sequence.dx is not None:
            assert result.d_hidden is not None
            sequence.dx[start:stop] = result.d_hidden
        assert sequence.loss is not None
        assert sequence.n_correct is not None
        sequence.loss += result.loss
        sequence.n_labels += len(labelled)
        sequence.n_correct += result.n_correct
        sequence.forwarded = stop
        return result

    # --- backward -----------------------------------------------------------------------------
    @property
    def bottom(self) -> int:
        """The lowest layer that a backward visits."""
        return self._hooks.bottom

    def next_unit(
        self, sequence: TrainSequence, tokens: int, layers: int | None = None
    ) -> BackwardUnit | None:
        """The unit that must run next, at most ``tokens`` rows by ``layers`` layers.

        A unit of window order that stopped between layers goes on with the same rows, one of
        layer order with the same layers. None when the micro-step is done. The forward need not
        have run yet.

        Args:
            layers: None takes what suits the order: all layers, or one. A rerun in window order
                always takes all.
        """
        assert tokens >= 1
        if self.done(sequence):
            return None
        rows, through = sequence.window, sequence.layers
        fresh_rows = (max(0, sequence.row - tokens), sequence.row)
        if self.order == "window":
            if layers is None or self.mode == "rerun":
                layers = self._n_layers
            if sequence.layer == self._n_layers:
                rows = fresh_rows
            through = (max(self.bottom, sequence.layer - layers), sequence.layer)
        else:
            if sequence.row == sequence.length:
                through = (max(self.bottom, sequence.layer - (layers or 1)), sequence.layer)
            rows = fresh_rows
        return BackwardUnit(sequence.job, *rows, *through)

    def done(self, sequence: TrainSequence) -> bool:
        """Whether nothing is left of the backward."""
        if self.order == "window":
            return sequence.row == 0
        return sequence.layer == self.bottom

    def units(
        self, sequence: TrainSequence, tokens: int, layers: int | None = None
    ) -> list[BackwardUnit]:
        """All units that are left, in order, cut evenly; runs nothing."""
        before = sequence.row, sequence.layer, sequence.window, sequence.layers
        found = []
        while (unit := self.next_unit(sequence, tokens, layers)) is not None:
            found.append(unit)
            self._advance(sequence, unit)
        sequence.row, sequence.layer, sequence.window, sequence.layers = before
        return found

    def run(self, sequence: TrainSequence, unit: BackwardUnit) -> None:
        """Run the unit that :meth:`next_unit` gave.

        The gradient by the embeddings, where asked for, is in ``sequence.d_embeddings``.
        """
        assert sequence.forwarded == sequence.length, "the backward begins after the last window"
        rows, layers = (unit.start, unit.stop), (unit.first_layer, unit.last_layer)
        self._make_sums(sequence, unit)
        bypass = self.bypass_of(*rows, sequence.begins)
        if self._backward is not None:
            assert bypass is not None
            dx = self._backward.run(sequence, bypass, rows, layers)
        else:
            if self.order == "window":  # nothing but the tokens to start from
                layers = (0, self._n_layers)
            x = None
            if layers[0] > 0:
                assert sequence.tape is not None
                x = sequence.tape.read(layers[0], "layer.input", *rows)
                assert x is not None
                x = differentiable(x)
            entering = self._entering(sequence, unit.start)
            dx = rerun_backward(
                self.decoder, self._cache, self._hooks, sequence, bypass, rows, layers, x, entering
            )
        if dx is not None:
            assert sequence.dx is not None
            if _is_whole(sequence, unit):
                sequence.dx = dx
            else:
                sequence.dx[unit.start : unit.stop] = dx
        self._advance(sequence, unit)
        self._release(sequence)

    def _entering(self, sequence: TrainSequence, start: int) -> States | None:
        """Recurrent states before row ``start``: kept, or computed again from the last kept."""
        if not self._recurrent:
            return None
        kept = max(at for at in sequence.entering if at <= start)
        states = sequence.entering[kept]
        if kept == start:
            return states
        bypass = self.bypass_of(kept, start)
        return replay(self.decoder, self._cache, sequence, bypass, (kept, start), states)

    def _advance(self, sequence: TrainSequence, unit: BackwardUnit) -> None:
        sequence.window = unit.start, unit.stop
        sequence.layers = unit.first_layer, unit.last_layer
        if self.order == "window":
            sequence.layer = unit.first_layer
            if sequence.layer == self.bottom:
                sequence.row, sequence.layer = unit.start, self._n_layers
        else:
            sequence.row = unit.start
            if sequence.row == 0:
                sequence.row, sequence.layer = sequence.length, unit.first_layer

    def _make_sums(self, sequence: TrainSequence, unit: BackwardUnit) -> None:
        """Room for the gradients of keys and values of a unit's layers, if there is none yet."""
        config = self.decoder.config
        shape = (sequence.length, config.n_kv_heads, config.head_dim)
        device = sequence.tokens.device
        # A backward by the tape that takes all rows at once writes the sums and adds nothing.
        written = self._backward is not None and _is_whole(sequence, unit)
        make = torch.empty if written else torch.zeros
        for layer in range(unit.first_layer, unit.last_layer):
            if layer in self._recurrent:
                carries = self._hooks.carries_state(config, layer)
                if carries and layer not in sequence.sums:
                    i = self._recurrent.index(layer)
                    state, tail = next(iter(sequence.entering.values()))
                    sequence.sums[layer] = torch.zeros_like(state[i]), torch.zeros_like(tail[i])
                continue
            if layer not in sequence.sums:
                k, v = (
                    make(shape, dtype=self._wide, device=device) if wanted else None
                    for wanted in self._hooks.carried[layer]
                )
                sequence.sums[layer] = (k, v)

    def _release(self, sequence: TrainSequence) -> None:
        """Let go of what no later unit reads."""
        if self.order == "layer":
            for layer in [layer for layer in sequence.sums if layer >= sequence.layer]:
                del sequence.sums[layer]
            if sequence.tape is not None and sequence.row == sequence.length:
                sequence.tape.let_go(sequence.layer)
        if self.done(sequence):
            if self._input_gradients:
                sequence.d_embeddings = sequence.dx
            sequence.sums = {}
            sequence.entering = {}
            sequence.drop_tape()
            sequence.dx = None


def product_of(plan: TapePlan) -> Product:
    """What a plan keeps in host memory of each of its layers."""
    layer = min(plan.hosted)
    names = ("mlp.gate", "mlp.up") if (layer, "mlp.gate") in plan.entries else ("mlp.up",)
    entry = plan.entries[layer, "mlp.up"]
    return Product(names, entry.shape[0], DTYPES[entry.dtype])


def _is_whole(sequence: TrainSequence, unit: BackwardUnit) -> bool:
    """Whether a unit takes all rows."""
    return (unit.start, unit.stop) == (0, sequence.length)
