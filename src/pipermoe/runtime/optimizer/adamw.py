"""AdamW (Loshchilov & Hutter 2019) over flat parameters, replicated (ZeRO-0) or each rank on its shard (ZeRO-1 to 3).

Moments are fp32, and so is what is updated: where weights are bf16, an fp32 master copy of them, from which they are
rounded after every update. Gradients are summed, not averaged, because each rank's backward has scaled its loss by
1 / (micro-batches of the global batch).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# The function, not the class torch.optim.AdamW, which takes 2 s and 100 MiB of every rank to import a compiler.
from torch.optim.adamw import adamw

from pipermoe.layout.transfer import Transfer
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters, Span
from pipermoe.runtime.optimizer.gradient_norm import clip_scale, owned_squared_norm
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.train import Optimizer as OptimizerConfig


@dataclass(frozen=True, slots=True)
class State:
    """What is kept in fp32 of the parameters that this rank updates: vectors of the length of `flat.updated`.

    `weights` are the model's own where those are fp32, a master copy otherwise.
    """

    flat: FlatParameters
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, flat: FlatParameters) -> State:
        weights = flat.of_updated(flat.weights).float()
        return cls(flat, weights, torch.zeros_like(weights), torch.zeros_like(weights))

    @property
    def has_master(self) -> bool:
        return self.flat.weights.dtype != torch.float32

    def items(self) -> tuple[tuple[str, Tensor], ...]:
        return ("weights", self.weights), ("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of one parameter: its fp32 "weights", or of its moments "exp_avg" or "exp_avg_sq".

    `span` is in elements of the parameter, flattened, or of one routed expert of it; that has `whole` of them.
    """

    kind: str
    span: Span
    whole: int
    values: Tensor


class Optimizer:
    """Updates the weights of `flats` from their gradients. A step is these calls, in this order, on every rank:

    reduce_gradients, owned_squared_norm (summed over the world by the caller), update, gather_weights, zero_gradients.
    """

    def __init__(self, flats: Iterable[FlatParameters], config: OptimizerConfig) -> None:
        self.states = [State.of(flat) for flat in flats]
        self.flats = [state.flat for state in self.states]
        self.config = config
        self.steps_done = 0

    def reduce_gradients(self) -> None:
        """End the sums of gradients over dp (dense) and edp (experts), which the last backwards have begun."""
        for flat in self.flats:
            flat.reduce_gradients()

    def owned_squared_norm(self) -> Tensor:
        """This rank's part of the squared global gradient norm; its sum over all ranks counts each parameter once."""
        return owned_squared_norm(self.flats)

    @torch.no_grad()
    def update(self, gradient_norm: float, learning_rate: float) -> None:
        """Clip by the global norm and update what this rank is responsible for; `gather_weights` publishes it."""
        scale = clip_scale(gradient_norm, self.config.gradient_clip)
        for state in self.states:
            gradients = state.flat.of_updated(state.flat.gradients)
            if scale < 1:
                gradients.mul_(scale)
            self._update(state, gradients, learning_rate)
        self.steps_done += 1

    def _update(self, state: State, gradients: Tensor, learning_rate: float) -> None:
        config, first = self.config, state.flat.updated.start
        for piece, weight_decay in zip(state.flat.decay_slices(), (config.weight_decay, 0.0), strict=True):
            held = slice(piece.start - first, piece.stop - first)
            adamw(
                [state.weights[held]],
                [gradients[held]],
                [state.exp_avg[held]],
                [state.exp_avg_sq[held]],
                [],
                [torch.tensor(float(self.steps_done), device=gradients.device)],
                fused=True,
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=learning_rate,
                weight_decay=weight_decay,
                eps=config.epsilon,
                maximize=False,
            )

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Round master weights into the model's and complete those on every rank that keeps all of them."""
        gathering = []
        for state in self.states:
            if state.has_master:
                state.flat.of_updated(state.flat.weights).copy_(state.weights)
            gathering.append(state.flat.gather_weights())
        for work in gathering:
            if work is not None:
                work.wait()

    def zero_gradients(self) -> None:
        for flat in self.flats:
            flat.zero_gradients()

    @torch.no_grad()
    def adopt(self, homes: Transfer) -> None:
        """Carry the state of experts whose homes move; `gather_weights` then fills their slots."""
        for state in self.states:
            state.flat.adopt(homes, [values for _, values in state.items()])

    def tensors(self) -> dict[MemoryCategory, list[Tensor]]:
        """What a rank holds between steps, by the memory categories "weights", "gradients" and "optimizer"."""
        return {
            "weights": [tensor for flat in self.flats for tensor in flat.resident_weights],
            "gradients": [tensor for flat in self.flats for tensor in flat.resident_gradients],
            "optimizer": [
                values for state in self.states for key, values in state.items() if key != "weights" or state.has_master
            ],
        }

    def updated_parts(self) -> Iterator[Part]:
        """Every part of a parameter that this rank updates; its values can be written to."""
        return (part for state in self.states for part in _parts(state, state.flat.updated))

    def owned_parts(self) -> Iterator[Part]:
        """Those in this rank's shard alone, whatever the level: together the ranks hold every element once."""
        return (part for state in self.states if not state.flat.is_copy for part in _parts(state, state.flat.owned))


def _parts(state: State, held: slice) -> Iterator[Part]:
    first = state.flat.updated.start
    for stretch in state.flat.stretches(held):
        for kind, values in state.items():
            part = values[stretch.held.start - first : stretch.held.stop - first]
            yield Part(kind, stretch.span, stretch.size, part)
