"""Forward and backward of one micro-batch on one pipeline stage, as generators that yield at each collective.

T tokens, K choices a token, E experts, B sequences (or 1), D hidden size

A layer is a chain of pieces, differentiable functions with autograd graphs of their own, and collectives between them.
runtime/pipeline/interleave.py runs the generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipermoe.runtime.balance import Balance, balancing_loss
from pipermoe.runtime.modules.model import DenseLayer, MoELayer, StageModel
from pipermoe.runtime.modules.rotary import Rotation, rotation_of
from pipermoe.runtime.optimizer.sharding import Sharding
from pipermoe.runtime.pipeline.dispatch import Dispatcher, Journey
from pipermoe.runtime.pipeline.gradients import Accumulate, WeightGradients
from pipermoe.runtime.pipeline.interleave import Pause, Steps
from pipermoe.runtime.pipeline.piece import Piece
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy


@dataclass(slots=True)
class DenseRecord:
    """What the backward of a dense layer needs."""

    unit: str
    layer: Piece


@dataclass(slots=True)
class MoERecord:
    """What the backward of a MoE layer needs."""

    unit: str
    attend: Piece
    shared: Piece | None
    journey: Journey
    share_gradient_BE: Tensor


@dataclass(slots=True)
class Tape:
    """What the backward of one micro-batch on one stage needs, and where its weight gradients go.

    `loss` is the last stage's mean cross-entropy, `auxiliary` and `z_loss` the sums of this stage's load-balancing and
    router z-losses, `dropped` counts the choices beyond the capacity of their experts; of an evaluation (`training`
    false) they are all that remains.
    """

    training: bool = True
    records: list[DenseRecord | MoERecord] = field(default_factory=list)
    tokens_T: Tensor | None = None
    loss_piece: Piece | None = None
    loss: Tensor | None = None
    auxiliary: Tensor | None = None
    z_loss: Tensor | None = None
    dropped: Tensor | None = None
    weight_gradients: list[Accumulate] | None = None

    def record(self, record: DenseRecord | MoERecord) -> None:
        if self.training:
            self.records.append(record)


class Stage:
    """One pipeline stage of one rank: its modules, and how a micro-batch passes them.

    Full recomputation drops the graphs of layers between forward and backward, selective those of some modules;
    embedding and head always keep theirs.
    `auxiliary_weight` and `z_weight` are the weights of one layer's load-balancing and z-loss relative to the
    cross-entropy. `slots` is how many experts this rank holds of a layer, `dispatcher(unit)` brings that layer's tokens
    to them. The weights of a unit (embedding, a layer, head) are used inside of `sharding.weights(unit)` only.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: range,
        slots: int,
        dispatcher: Callable[[str], Dispatcher],
        sharding: Sharding,
        *,
        seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        strategy: Strategy,
        balance: Balance,
        auxiliary_weight: float,
        z_weight: float,
    ):
        self.spec, self.dispatcher, self.sharding = spec, dispatcher, sharding
        self.recompute = strategy.recompute == "full"
        self.balance, self.auxiliary_weight, self.z_weight = balance, auxiliary_weight, z_weight
        self.gradients = WeightGradients()
        with torch.device(device):
            drops = strategy.recompute_modules
            self.model = StageModel(spec, layers, slots, seq_len, dtype, self.gradients, drops)
        self.units = tuple(self.model.units())
        cosine, sine = rotation_of(spec.attention, seq_len, dtype)
        self.rotation: Rotation = (cosine.to(device), sine.to(device))

    def forward(self, x: Tensor, targets_T: Tensor | None, tape: Tape) -> Steps[Tensor | None]:
        """The stage's output (T, D), or None on the last stage, where the loss is on the tape.

        `x` is the output of the stage before, or on the first stage the tokens (T,).
        """
        keep = tape.training and not self.recompute
        if self.model.embedding is not None:
            tape.tokens_T = x
            with self._weights("embedding"):
                x = self.model.embedding(x)
        tape.auxiliary, tape.z_loss = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        tape.dropped = torch.zeros((), dtype=torch.int64, device=x.device)
        for name, layer in self.model.layers.items():
            unit = f"layers.{name}"
            with self._weights(unit):
                if isinstance(layer, MoELayer):
                    x = yield from self._moe_forward(unit, layer, x, tape, keep)
                else:
                    x = self._dense_forward(unit, layer, x, tape, keep)
        if targets_T is None:
            return x
        with self._weights("head"):
            tape.loss_piece = Piece(self.model.loss, tape.training)
            tape.loss = tape.loss_piece.forward(x, targets_T)
        return None

    def backward(self, tape: Tape, gradient_TD: Tensor | None, scale: float) -> Steps[Tensor | None]:
        """The gradient of the stage's input (None on the first stage); weight gradients are accumulated or queued.

        `gradient_TD` is the gradient of the output, None on the last stage, where the loss is weighted by `scale`.
        """
        if tape.loss_piece is not None:
            assert tape.loss is not None
            with self._gradients("head", tape):
                (gradient_TD,) = self._run_backward(tape, tape.loss_piece, torch.full_like(tape.loss, scale))
            tape.loss_piece = None
        assert gradient_TD is not None
        while tape.records:
            record = tape.records.pop()
            with self._gradients(record.unit, tape):
                if isinstance(record, MoERecord):
                    gradient_TD = yield from self._moe_backward(record, gradient_TD, tape, scale)
                else:
                    (gradient_TD,) = self._run_backward(tape, record.layer, gradient_TD)
        if self.model.embedding is None:
            return gradient_TD
        assert tape.tokens_T is not None
        with self._gradients("embedding", tape), self.gradients.deferred_to(tape.weight_gradients):
            self.model.embedding.backward(tape.tokens_T, gradient_TD)
        return None

    @contextmanager
    def _weights(self, unit: str, *, step: int = 1) -> Iterator[None]:
        """The weights of `unit` are here; those of the unit that comes `step` later set out."""
        following = self.units.index(unit) + step
        ahead = self.units[following] if 0 <= following < len(self.units) else None
        with self.sharding.weights(unit, ahead):
            yield

    @contextmanager
    def _gradients(self, unit: str, tape: Tape) -> Iterator[None]:
        """Weights as in forward; the unit's gradients are reduced as soon as all that this block computes are there."""
        with self._weights(unit, step=-1):
            self._in_turn(tape, unit, self.sharding.open_gradients)
            yield
            self._in_turn(tape, unit, self.sharding.reduce_gradients)

    def _in_turn(self, tape: Tape, unit: str, act: Callable[[str], None]) -> None:
        """`act` on the unit in the order of its weight gradients: now, or where they are queued."""
        if self.sharding.scatters(unit):
            with self.gradients.deferred_to(tape.weight_gradients):
                self.gradients.add(lambda: act(unit))

    def _dense_forward(self, unit: str, layer: nn.Module, x_TD: Tensor, tape: Tape, keep: bool) -> Tensor:
        assert isinstance(layer, DenseLayer)
        piece = Piece(lambda x: layer(x, self.rotation), keep)
        tape.record(DenseRecord(unit, piece))
        return piece.forward(x_TD)

    def _moe_forward(self, unit: str, layer: MoELayer, x_TD: Tensor, tape: Tape, keep: bool) -> Steps[Tensor]:
        dispatcher, tokens = self.dispatcher(unit), x_TD.shape[0]
        group = dispatcher.group
        planned_TK = group.planned_choices(tokens, x_TD.device)
        sequences, z_loss = self.balance.sequences(tokens), self.z_weight > 0
        attend = Piece(lambda x: layer.attend(x, self.rotation, planned_TK, sequences, z_loss), keep)
        h_TD, normed_TD, weights_TK, share_BE, z, experts_TK = attend.forward(x_TD)
        choices = dispatcher.choices(experts_TK, weights_TK)
        counts = dispatcher.exchange_counts(choices)
        load = self.balance.observe(layer.router, experts_TK, group.num_experts, training=tape.training)
        yield Pause(counts, brief=True)
        journey = dispatcher.journey(choices, counts, layer.experts, keep=keep)
        dispatched = journey.dispatch(normed_TD, weights_TK)
        yield Pause(dispatched)
        shared = Piece(layer.shared, keep) if layer.shared is not None else None
        shared_TD = shared.forward(normed_TD) if shared else None
        del normed_TD
        combined = journey.compute(dispatched)
        yield Pause(combined)
        out_TD = journey.merge(combined).add_(h_TD)
        auxiliary, share_gradient_BE = balancing_loss(share_BE, load.wait())
        self._count(tape, auxiliary, z, choices.dropped)
        tape.record(MoERecord(unit, attend, shared, journey, share_gradient_BE))
        return out_TD if shared_TD is None else out_TD.add_(shared_TD)

    def _moe_backward(self, record: MoERecord, gradient_TD: Tensor, tape: Tape, scale: float) -> Steps[Tensor]:
        journey = record.journey
        with self.gradients.deferred_to(tape.weight_gradients):
            dispatched = journey.dispatch_gradient(gradient_TD)
        yield Pause(dispatched)
        to_shared_TD = self._run_backward(tape, record.shared, gradient_TD)[0] if record.shared else None
        with self.gradients.deferred_to(tape.weight_gradients):
            combined = journey.compute_gradient(dispatched)
        yield Pause(combined)
        to_normed_TD, to_weights_TK = journey.merge_gradient(combined)
        if to_shared_TD is not None:
            to_normed_TD += to_shared_TD
        to_share_BE = record.share_gradient_BE * (scale * self.auxiliary_weight)
        gradients = [gradient_TD, to_normed_TD, to_weights_TK, to_share_BE]
        if self.z_weight:
            gradients.append(torch.full((), scale * self.z_weight, device=gradient_TD.device))
        return self._run_backward(tape, record.attend, *gradients)[0]

    @staticmethod
    def _count(tape: Tape, auxiliary: Tensor, z: Tensor, dropped: Tensor | None) -> None:
        assert tape.auxiliary is not None
        assert tape.z_loss is not None
        assert tape.dropped is not None
        tape.auxiliary += auxiliary
        tape.z_loss += z
        if dropped is not None:
            tape.dropped += dropped

    def _run_backward(self, tape: Tape, piece: Piece, *gradients: Tensor) -> tuple[Tensor, ...]:
        with self.gradients.deferred_to(tape.weight_gradients):
            return piece.backward(*gradients)
