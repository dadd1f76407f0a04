"""Forward and backward of one micro-batch on one pipeline stage, as generators that yield at each collective.

T tokens, K choices a token, E experts, B sequences (or 1), S + 1 tokens in each, D hidden size

A layer is a chain of pieces, differentiable functions with autograd graphs of their own, and collectives between them.
runtime/pipeline/interleave.py runs the generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipermoe.modules.model import MoELayer, PredictionLayer, StageModel
from pipermoe.modules.rotary import Rotation, rotation_of
from pipermoe.modules.weight_gradients import Accumulate, Milestone, WeightGradients
from pipermoe.runtime.balance import Balance, balancing_loss
from pipermoe.runtime.optimizer.sharding import Sharding
from pipermoe.runtime.pipeline.dispatch import Dispatcher, Journey
from pipermoe.runtime.pipeline.interleave import Pause, Steps
from pipermoe.runtime.pipeline.piece import Piece
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy

NO_TARGET = -1  # where a sequence ends before the token that should be predicted


@dataclass(slots=True)
class EmbeddingRecord:
    """What the backward of the embedding needs. `place`, here and below: where in `Stage.units`."""

    place: int
    tokens_T: Tensor


@dataclass(slots=True)
class PieceRecord:
    """What the backward of a dense layer or of a norm before the head needs."""

    place: int
    piece: Piece


@dataclass(slots=True)
class LossRecord:
    """What the backward of a loss of the state needs; the state goes on unchanged."""

    place: int
    piece: Piece
    weight: float


@dataclass(slots=True)
class JoinRecord:
    """What the backward needs of joining the state with embedded tokens."""

    place: int
    piece: Piece
    tokens_T: Tensor


@dataclass(slots=True)
class MoERecord:
    """What the backward of a MoE layer needs."""

    place: int
    attend: Piece
    shared: Piece | None
    journey: Journey
    share_gradient_BE: Tensor


Record = EmbeddingRecord | PieceRecord | LossRecord | JoinRecord | MoERecord


@dataclass(slots=True)
class Tape:
    """What the backward of one micro-batch on one stage needs, and where its weight gradients go.

    `loss` is the last stage's mean cross-entropy, `mtp_loss` the mean of those of multi-token prediction, `auxiliary`
    and `z_loss` the sums of this stage's load-balancing and router z-losses, `dropped` counts the choices beyond the
    capacity of their experts; of an evaluation (`training` false) they are all that remains.
    """

    training: bool = True
    records: list[Record] = field(default_factory=list)
    loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    auxiliary: Tensor | None = None
    z_loss: Tensor | None = None
    dropped: Tensor | None = None
    weight_gradients: list[Accumulate] | None = None

    def record(self, record: Record) -> None:
        if self.training:
            self.records.append(record)


class Stage:
    """One pipeline stage of one rank: its modules, and how a micro-batch passes them.

    Full recomputation drops the graphs of layers between forward and backward, selective those of some modules;
    embedding and head always keep theirs.
    `auxiliary_weight`, `z_weight` and `mtp_weight` are the weights of one layer's load-balancing, z- and prediction
    loss relative to the cross-entropy. `slots` is how many experts this rank holds of a layer, `dispatcher(unit)`
    brings that layer's tokens to them. The weights of a unit (embedding, a layer, head) are used inside of `_weights`
    only. An evaluation predicts the next token alone.
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
        mtp_weight: float,
    ):
        self.spec, self.dispatcher, self.sharding = spec, dispatcher, sharding
        self.recompute = strategy.recompute == "full"
        self.balance, self.auxiliary_weight, self.z_weight = balance, auxiliary_weight, z_weight
        self.mtp_weight = mtp_weight
        self.gradients = WeightGradients()
        with torch.device(device):
            drops = strategy.recompute_modules
            self.model = StageModel(spec, layers, slots, seq_len, dtype, self.gradients, drops)
        self.units = tuple(self.model.units())
        cosine, sine = rotation_of(spec.attention, seq_len, dtype)
        self.rotation: Rotation = (cosine.to(device), sine.to(device))

    def forward(self, x_TD: Tensor | None, tokens_BS: Tensor, tape: Tape) -> Steps[Tensor | None]:
        """The stage's output (T, D), or None on the last stage, where the losses are on the tape.

        `x_TD` is the output of the stage before, None on the first stage; `tokens_BS` are the tokens of the micro-batch
        (B, S + 1): each but the last predicts the next.
        """
        x_TD = yield from self.hidden(x_TD, tokens_BS, tape)
        if not self.model.last:
            return x_TD
        place = self.units.index("head")
        with self._weights(place):
            x_TD = self._normed(place, self.model.final_norm, x_TD, tape)
            tape.loss = self._loss(place, x_TD, shifted(tokens_BS, 1, NO_TARGET), 1.0, tape)
        if tape.training and self.model.predictions:
            yield from self._predict_on(x_TD, tokens_BS, tape)
        return None

    def hidden(self, x_TD: Tensor | None, tokens_BS: Tensor, tape: Tape) -> Steps[Tensor]:
        """What the stage's embedding and layers make of it (T, D), before the head."""
        device = tokens_BS.device
        tape.auxiliary, tape.z_loss = torch.zeros((), device=device), torch.zeros((), device=device)
        tape.dropped = torch.zeros((), dtype=torch.int64, device=device)
        place = 0
        if self.model.first:
            x_TD, tokens_T = self._embedded(place, shifted(tokens_BS, 0, 0))
            tape.record(EmbeddingRecord(place, tokens_T))
            place += 1
        assert x_TD is not None
        for name, layer in self.model.layers.items():
            if name in self.model.predictions:
                break
            with self._weights(place):
                if isinstance(layer, MoELayer):
                    x_TD = yield from self._moe_forward(place, layer, x_TD, tape)
                else:
                    dense = partial(layer, rotation=self.rotation)
                    x_TD = self._run(PieceRecord(place, Piece(dense, self._keeps(tape))), x_TD, tape)
            place += 1
        return x_TD

    def _predict_on(self, state_TD: Tensor, tokens_BS: Tensor, tape: Tape) -> Steps[None]:
        """The losses of the tokens after the next one, depth by depth, from the state that has predicted the next."""
        place = self.units.index("head")
        losses = []
        for depth, name in enumerate(self.model.predictions, start=1):
            layer = self.model.layers[name]
            assert isinstance(layer, PredictionLayer)
            token_TD, tokens_T = self._embedded(place + 1, shifted(tokens_BS, depth, 0))
            place += 2
            with self._weights(place):
                join = Piece(layer.join, self._keeps(tape))
                tape.record(JoinRecord(place, join, tokens_T))
                x_TD = join.forward(state_TD, token_TD)
                del token_TD
                x_TD = yield from self._moe_forward(place, layer, x_TD, tape)
                state_TD = self._normed(place, layer.head_norm, x_TD, tape)
            place += 1
            with self._weights(place):
                targets_T = shifted(tokens_BS, depth + 1, NO_TARGET)
                losses.append(self._loss(place, state_TD, targets_T, self.mtp_weight, tape))
        tape.mtp_loss = torch.stack(losses).mean()

    def _embedded(self, place: int, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of tokens (T, D), and the tokens."""
        assert self.model.embedding is not None
        with self._weights(place):
            return self.model.embedding(tokens_T), tokens_T

    def _keeps(self, tape: Tape) -> bool:
        """Whether the graphs of layers stay until their backward."""
        return tape.training and not self.recompute

    def _normed(self, place: int, norm: nn.Module, x_TD: Tensor, tape: Tape) -> Tensor:
        return self._run(PieceRecord(place, Piece(norm, tape.training)), x_TD, tape)

    def _loss(self, place: int, state_TD: Tensor, targets_T: Tensor, weight: float, tape: Tape) -> Tensor:
        piece = Piece(self.model.loss, tape.training)
        tape.record(LossRecord(place, piece, weight))
        return piece.forward(state_TD, targets_T)

    @staticmethod
    def _run(record: PieceRecord, x_TD: Tensor, tape: Tape) -> Tensor:
        tape.record(record)
        return record.piece.forward(x_TD)

    def backward(self, tape: Tape, gradient_TD: Tensor | None, scale: float) -> Steps[Tensor | None]:
        """The gradient of the stage's input (None on the first stage); weight gradients are accumulated or queued.

        `gradient_TD` is the gradient of the output, None on the last stage, where the loss is weighted by `scale`.
        """
        while tape.records:
            place = tape.records[-1].place
            with self._gradients(place, tape):
                while tape.records and tape.records[-1].place == place:
                    gradient_TD = yield from self._record_backward(tape.records.pop(), gradient_TD, tape, scale)
        return gradient_TD

    def _record_backward(
        self, record: Record, gradient_TD: Tensor | None, tape: Tape, scale: float
    ) -> Steps[Tensor | None]:
        """The gradient of the record's input (None of tokens) from that of its output (None before any loss)."""
        if isinstance(record, LossRecord):
            weight = torch.full((), scale * record.weight, device=self.rotation[0].device)
            (from_loss_TD,) = self._run_backward(tape, record.piece, weight)
            return from_loss_TD if gradient_TD is None else from_loss_TD.add_(gradient_TD)
        assert gradient_TD is not None
        match record:
            case MoERecord():
                return (yield from self._moe_backward(record, gradient_TD, tape, scale))
            case PieceRecord():
                return self._run_backward(tape, record.piece, gradient_TD)[0]
            case JoinRecord():
                to_state_TD, to_token_TD = self._run_backward(tape, record.piece, gradient_TD)
                with self._gradients(record.place - 1, tape):
                    self._embedding_backward(record.tokens_T, to_token_TD, tape)
                return to_state_TD
            case EmbeddingRecord():
                self._embedding_backward(record.tokens_T, gradient_TD, tape)
                return None

    def _embedding_backward(self, tokens_T: Tensor, gradient_TD: Tensor, tape: Tape) -> None:
        assert self.model.embedding is not None
        with self.gradients.deferred_to(tape.weight_gradients):
            self.model.embedding.backward(tokens_T, gradient_TD)

    @contextmanager
    def _weights(self, place: int, *, step: int = 1) -> Iterator[None]:
        """The weights of the unit at `place` are here; those of the unit that comes `step` later set out."""
        following = place + step
        ahead = self.units[following] if 0 <= following < len(self.units) else None
        with self.sharding.weights(self.units[place], ahead):
            yield

    @contextmanager
    def _gradients(self, place: int, tape: Tape) -> Iterator[None]:
        """Weights as in forward; the unit's gradients are reduced as soon as all that this block computes are there."""
        unit = self.units[place]
        with self._weights(place, step=-1):
            scatters, stays = self.sharding.scatters(unit), self.sharding.stays(unit)
            if scatters:
                self._in_turn(tape, partial(self.sharding.open_gradients, unit))
            yield
            if scatters:
                self._in_turn(tape, partial(self.sharding.reduce_gradients, unit))
            if stays:
                self._in_turn(tape, Milestone(partial(self.sharding.filled, unit)))

    def _in_turn(self, tape: Tape, act: Accumulate) -> None:
        """`act` in the order of weight gradients: now, or where they are queued."""
        with self.gradients.deferred_to(tape.weight_gradients):
            self.gradients.add(act)

    def _moe_forward(self, place: int, layer: MoELayer, x_TD: Tensor, tape: Tape) -> Steps[Tensor]:
        dispatcher, tokens, keep = self.dispatcher(self.units[place]), x_TD.shape[0], self._keeps(tape)
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
        tape.record(MoERecord(place, attend, shared, journey, share_gradient_BE))
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
        with self.gradients.deferred_to(tape.weight_gradients):
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


def shifted(tokens_BS: Tensor, by: int, fill: int) -> Tensor:
    """The token `by` places after each of the first S positions of every sequence (T,), `fill` where it has ended."""
    present_BS = tokens_BS[:, by : by + tokens_BS.shape[1] - 1]
    return (F.pad(present_BS, (0, by - 1), value=fill) if by > 1 else present_BS).flatten()
