"""Forward and backward of one micro-batch on one pipeline stage, as generators that yield at each collective.

T tokens, K choices a token, A = T * K assignments, R rows of this rank's experts, D hidden size

A layer is a chain of pieces, differentiable functions with autograd graphs of their own, and collectives between them.
A generator yields right after launching a collective, so its caller may run another generator meanwhile. Running it to
its end at once, `drain`, is the serial execution that defines the result of every other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pipermoe.runtime.balance import Balance, balancing_loss
from pipermoe.runtime.dispatch import Exchange, Route
from pipermoe.runtime.gradients import Accumulate, WeightGradients
from pipermoe.runtime.model import DenseLayer, MoELayer, StageModel
from pipermoe.runtime.rotary import Rotation, rotation_of
from pipermoe.specs.model import ModelSpec

Result = TypeVar("Result")
Steps = Generator[None, None, Result]


def drain(steps: Steps[Result]) -> Result:
    """Run a generator to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Piece:
    """A differentiable function run forward once and backward once, with a graph of its own.

    The graph starts at detached copies of the inputs. Without `keep` only the inputs stay and backward rebuilds the
    graph; as collectives lie between pieces, none is repeated. Outputs are never kept: backward enters by their edges.
    """

    def __init__(self, function: Callable[..., Any], keep: bool):
        self._function, self._keep = function, keep
        self._inputs: tuple[Tensor, ...] = ()
        self._edges: list[GradientEdge] = []

    def forward(self, *inputs: Tensor) -> Any:
        """The function's outputs, detached."""
        self._inputs = tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs)
        with torch.set_grad_enabled(self._keep):
            outputs = self._function(*self._inputs)
        several = isinstance(outputs, tuple)
        if self._keep:
            self._edges = _edges(outputs if several else (outputs,))
        return tuple(output.detach() for output in outputs) if several else outputs.detach()

    def backward(self, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the inputs from those of the differentiable outputs; the piece is empty afterwards."""
        edges, inputs = self._edges, self._inputs
        if not self._keep:
            with torch.enable_grad():
                outputs = self._function(*inputs)
            edges = _edges(outputs if isinstance(outputs, tuple) else (outputs,))
            del outputs
        self._edges, self._inputs = [], ()
        torch.autograd.backward(edges, gradients)
        results = []
        for tensor in inputs:
            if tensor.requires_grad:
                assert tensor.grad is not None
                results.append(tensor.grad)
        return tuple(results)


def _edges(outputs: tuple[Tensor, ...]) -> list[GradientEdge]:
    return [get_gradient_edge(output) for output in outputs if output.requires_grad]


@dataclass(slots=True)
class DenseRecord:
    """What the backward of a dense layer needs."""

    layer: Piece


@dataclass(slots=True)
class MoERecord:
    """What the backward of a MoE layer needs."""

    attend: Piece
    shared: Piece | None
    experts: Piece
    merge: Piece
    route: Route
    top_k: int
    share_gradient_BE: Tensor


@dataclass(slots=True)
class Tape:
    """What the backward of one micro-batch on one stage needs, and where its weight gradients go.

    `loss` is the last stage's mean cross-entropy, `auxiliary` and `z_loss` the sums of this stage's load-balancing and
    router z-losses; of an evaluation (`training` false) they are all that remains.
    """

    training: bool = True
    records: list[DenseRecord | MoERecord] = field(default_factory=list)
    tokens_T: Tensor | None = None
    loss_piece: Piece | None = None
    loss: Tensor | None = None
    auxiliary: Tensor | None = None
    z_loss: Tensor | None = None
    weight_gradients: list[Accumulate] | None = None

    def record(self, record: DenseRecord | MoERecord) -> None:
        if self.training:
            self.records.append(record)


class Stage:
    """One pipeline stage of one rank: its modules, and how a micro-batch passes them.

    `recompute` drops the graphs of layers between forward and backward; embedding and head always keep theirs.
    `auxiliary_weight` and `z_weight` are the weights of one layer's load-balancing and z-loss relative to the
    cross-entropy.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: range,
        exchange: Exchange,
        *,
        seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        recompute: bool,
        balance: Balance,
        auxiliary_weight: float,
        z_weight: float,
    ):
        self.spec, self.exchange, self.recompute = spec, exchange, recompute
        self.balance, self.auxiliary_weight, self.z_weight = balance, auxiliary_weight, z_weight
        self.gradients = WeightGradients()
        with torch.device(device):
            self.model = StageModel(spec, layers, exchange.local_experts, seq_len, dtype, self.gradients)
        cosine, sine = rotation_of(spec.attention, seq_len, dtype)
        self.rotation: Rotation = (cosine.to(device), sine.to(device))

    def forward(self, x: Tensor, targets_T: Tensor | None, tape: Tape) -> Steps[Tensor | None]:
        """The stage's output (T, D), or None on the last stage, where the loss is on the tape.

        `x` is the output of the stage before, or on the first stage the tokens (T,).
        """
        keep = tape.training and not self.recompute
        if self.model.embedding is not None:
            tape.tokens_T = x
            x = self.model.embedding(x)
        tape.auxiliary, tape.z_loss = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        for layer in self.model.layers.values():
            if isinstance(layer, MoELayer):
                x = yield from self._moe_forward(layer, x, tape, keep)
            else:
                x = self._dense_forward(layer, x, tape, keep)
        if targets_T is None:
            return x
        tape.loss_piece = Piece(self.model.loss, tape.training)
        tape.loss = tape.loss_piece.forward(x, targets_T)
        return None

    def backward(self, tape: Tape, gradient_TD: Tensor | None, scale: float) -> Steps[Tensor | None]:
        """The gradient of the stage's input (None on the first stage); weight gradients are accumulated or queued.

        `gradient_TD` is the gradient of the output, None on the last stage, where the loss is weighted by `scale`.
        """
        if tape.loss_piece is not None:
            assert tape.loss is not None
            (gradient_TD,) = self._run_backward(tape, tape.loss_piece, torch.full_like(tape.loss, scale))
            tape.loss_piece = None
        assert gradient_TD is not None
        while tape.records:
            record = tape.records.pop()
            if isinstance(record, MoERecord):
                gradient_TD = yield from self._moe_backward(record, gradient_TD, tape, scale)
            else:
                (gradient_TD,) = self._run_backward(tape, record.layer, gradient_TD)
        if self.model.embedding is None:
            return gradient_TD
        assert tape.tokens_T is not None
        with self.gradients.deferred_to(tape.weight_gradients):
            self.model.embedding.backward(tape.tokens_T, gradient_TD)
        return None

    def _dense_forward(self, layer: nn.Module, x_TD: Tensor, tape: Tape, keep: bool) -> Tensor:
        assert isinstance(layer, DenseLayer)
        piece = Piece(lambda x: layer(x, self.rotation), keep)
        tape.record(DenseRecord(piece))
        return piece.forward(x_TD)

    def _moe_forward(self, layer: MoELayer, x_TD: Tensor, tape: Tape, keep: bool) -> Steps[Tensor]:
        exchange, top_k = self.exchange, self.spec.moe.top_k
        planned_TK = exchange.planned_choices(x_TD.shape[0], top_k, x_TD.device)
        sequences, z_loss = self.balance.sequences(x_TD.shape[0]), self.z_weight > 0
        attend = Piece(lambda x: layer.attend(x, self.rotation, planned_TK, sequences, z_loss), keep)
        h_TD, normed_TD, weights_TK, share_BE, z, experts_TK = attend.forward(x_TD)
        counts = exchange.exchange_counts(experts_TK)
        load = self.balance.observe(layer.router, experts_TK, exchange.num_experts, training=tape.training)
        yield
        route = exchange.route(experts_TK, counts)
        dispatched = exchange.to_experts(normed_TD, route.order_A // top_k, route)
        yield
        shared = Piece(layer.shared, keep) if layer.shared is not None else None
        shared_TD = shared.forward(normed_TD) if shared else None
        del normed_TD
        experts = Piece(lambda x: layer.experts(x, route.rows), keep)
        y_RD = experts.forward(dispatched.wait())
        combined = exchange.to_tokens(y_RD, route)
        del y_RD
        yield
        merge = Piece(layer.merge, keep)
        out_TD = merge.forward(combined.wait().view(-1, top_k, x_TD.shape[1]), weights_TK).add_(h_TD)
        auxiliary, share_gradient_BE = balancing_loss(share_BE, load.wait())
        assert tape.auxiliary is not None
        assert tape.z_loss is not None
        tape.auxiliary += auxiliary
        tape.z_loss += z
        tape.record(MoERecord(attend, shared, experts, merge, route, top_k, share_gradient_BE))
        return out_TD if shared_TD is None else out_TD.add_(shared_TD)

    def _moe_backward(self, record: MoERecord, gradient_TD: Tensor, tape: Tape, scale: float) -> Steps[Tensor]:
        exchange, route = self.exchange, record.route
        to_returned_TKD, to_weights_TK = self._run_backward(tape, record.merge, gradient_TD)
        returned = exchange.to_experts(to_returned_TKD.flatten(0, 1), route.order_A, route)
        del to_returned_TKD
        yield
        to_shared_TD = self._run_backward(tape, record.shared, gradient_TD)[0] if record.shared else None
        (to_rows_RD,) = self._run_backward(tape, record.experts, returned.wait())
        dispatched = exchange.to_tokens(to_rows_RD, route)
        del to_rows_RD
        yield
        to_normed_TD = dispatched.wait().view(-1, record.top_k, gradient_TD.shape[1]).sum(1)
        if to_shared_TD is not None:
            to_normed_TD += to_shared_TD
        to_share_BE = record.share_gradient_BE * (scale * self.auxiliary_weight)
        gradients = [gradient_TD, to_normed_TD, to_weights_TK, to_share_BE]
        if self.z_weight:
            gradients.append(torch.full((), scale * self.z_weight, device=gradient_TD.device))
        return self._run_backward(tape, record.attend, *gradients)[0]

    def _run_backward(self, tape: Tape, piece: Piece, *gradients: Tensor) -> tuple[Tensor, ...]:
        with self.gradients.deferred_to(tape.weight_gradients):
            return piece.backward(*gradients)
