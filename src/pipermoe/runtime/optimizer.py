"""AdamW (Loshchilov & Hutter 2019) over flat parameters, replicated (ZeRO-0) or with sharded moments (ZeRO-1).

ZeRO: Rajbhandari et al. 2020, stage 1. Dense parameters are reduced and sharded over dp, routed experts over edp: the
gradient of an expert already holds the tokens of all ep ranks, which the all-to-all brought to it. Gradients are
summed, not averaged, because each rank's backward has scaled its loss by 1 / (micro-batches of the global batch).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# The function, not the class torch.optim.AdamW, which takes 2 s and 100 MiB of every rank to import a compiler.
from torch.optim.adamw import adamw

from pipermoe.runtime.flat_parameters import FlatParameters, Span
from pipermoe.runtime.gradient_norm import clip_scale, owned_squared_norm
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.weights import is_expert
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Optimizer as OptimizerConfig


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of the parameters that this rank updates: vectors of the length of `flat.updated`."""

    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def zeros(cls, flat: FlatParameters) -> Moments:
        updated = flat.weights_N[flat.updated]
        return cls(torch.zeros_like(updated), torch.zeros_like(updated))

    def items(self) -> tuple[tuple[str, Tensor], ...]:
        return ("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)


class Optimizer:
    """Owns the storage of weights, gradients and moments. A step is these calls, in this order, on every rank:

    reduce_gradients, owned_squared_norm (summed over the world by the caller), update, gather_weights, zero_gradients.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        groups: ProcessGroups,
        strategy: Strategy,
        config: OptimizerConfig,
    ) -> None:
        parameters = list(named_parameters)
        dense = [(name, parameter) for name, parameter in parameters if not is_expert(name)]
        expert = [(name, parameter) for name, parameter in parameters if is_expert(name)]
        kinds = ((dense, groups.dp, strategy.zero_dense), (expert, groups.edp, strategy.zero_expert))
        self.flats = [FlatParameters(held, group, sharded=zero >= 1) for held, group, zero in kinds if held]
        self.moments = [Moments.zeros(flat) for flat in self.flats]
        self.config = config
        self.steps_done = 0

    def reduce_gradients(self) -> None:
        """Sum gradients over dp (dense) and edp (experts)."""
        for flat in self.flats:
            flat.reduce_gradients()

    def owned_squared_norm(self) -> Tensor:
        """This rank's part of the squared global gradient norm; its sum over all ranks counts each parameter once."""
        return owned_squared_norm(self.flats)

    @torch.no_grad()
    def update(self, gradient_norm: float, learning_rate: float) -> None:
        """Clip by the global norm and update the weights that this rank is responsible for."""
        scale = clip_scale(gradient_norm, self.config.gradient_clip)
        for flat, moments in zip(self.flats, self.moments, strict=True):
            if scale < 1:
                flat.gradients_N[flat.updated].mul_(scale)
            self._update(flat, moments, learning_rate)
        self.steps_done += 1

    def _update(self, flat: FlatParameters, moments: Moments, learning_rate: float) -> None:
        config, first = self.config, flat.updated.start
        for piece, weight_decay in zip(flat.decay_slices(), (config.weight_decay, 0.0), strict=True):
            held = slice(piece.start - first, piece.stop - first)
            adamw(
                [flat.weights_N[piece]],
                [flat.gradients_N[piece]],
                [moments.exp_avg[held]],
                [moments.exp_avg_sq[held]],
                [],
                [torch.tensor(float(self.steps_done), device=flat.weights_N.device)],
                fused=True,
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=learning_rate,
                weight_decay=weight_decay,
                eps=config.epsilon,
                maximize=False,
            )

    def gather_weights(self) -> None:
        """Complete the weights on every rank (nothing to do without sharding)."""
        for flat in self.flats:
            flat.gather_weights()

    def zero_gradients(self) -> None:
        for flat in self.flats:
            flat.gradients_N.zero_()

    def tensors(self) -> dict[MemoryCategory, list[Tensor]]:
        """What the optimizer holds, by the memory categories "weights", "gradients" and "optimizer"."""
        return {
            "weights": [flat.weights_N for flat in self.flats],
            "gradients": [flat.gradients_N for flat in self.flats],
            "optimizer": [values for moments in self.moments for _, values in moments.items()],
        }

    def moment_parts(self) -> Iterator[tuple[str, Span, Tensor]]:
        """(moment, part, values) of every part of a parameter that this rank updates; values can be written to.

        The part is in elements of the parameter as it lies on this rank, flattened.
        """
        for flat, moments in zip(self.flats, self.moments, strict=True):
            first = flat.updated.start
            for whole, part in flat.updated_spans():
                local = Span(whole.name, part.start - whole.start, part.stop - whole.start)
                for moment, values in moments.items():
                    yield moment, local, values[part.start - first : part.stop - first]
