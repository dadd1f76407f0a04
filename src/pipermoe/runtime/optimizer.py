"""AdamW (Loshchilov & Hutter 2019) over flat parameters, replicated (ZeRO-0) or with sharded moments (ZeRO-1).

ZeRO: Rajbhandari et al. 2020, stage 1. Dense parameters are reduced and sharded over dp, routed experts over edp: the
gradient of an expert already holds the tokens of all ep ranks, which the all-to-all brought to it. Gradients are
summed, not averaged, because each rank's backward has scaled its loss by 1 / (micro-batches of the global batch).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipermoe.runtime.flat_parameters import FlatParameters, Span
from pipermoe.runtime.gradient_norm import clip_scale, owned_squared_norm
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.weights import is_expert
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Optimizer as OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        self.gradient_clip = config.gradient_clip
        self._adamw = torch.optim.AdamW(
            [group for flat in self.flats for group in _parameter_groups(flat, config.weight_decay)],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self._allocate_moments()

    def _allocate_moments(self) -> None:
        """Now, not in the first step as torch does: what a rank holds is then known before it trains."""
        for group in self._adamw.param_groups:
            for slice_ in group["params"]:
                state = {moment: torch.zeros_like(slice_, requires_grad=False) for moment in MOMENTS}
                self._adamw.state[slice_] = {"step": torch.zeros((), device=slice_.device), **state}

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
        scale = clip_scale(gradient_norm, self.gradient_clip)
        if scale < 1:
            for flat in self.flats:
                flat.gradients_N[flat.updated].mul_(scale)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()

    def gather_weights(self) -> None:
        """Complete the weights on every rank (nothing to do without sharding)."""
        for flat in self.flats:
            flat.gather_weights()

    def zero_gradients(self) -> None:
        for flat in self.flats:
            flat.gradients_N.zero_()

    def tensors(self) -> dict[str, list[Tensor]]:
        """What the optimizer holds, by the memory categories "weights", "gradients" and "optimizer"."""
        return {
            "weights": [flat.weights_N for flat in self.flats],
            "gradients": [flat.gradients_N for flat in self.flats],
            "optimizer": [state[key] for state in self._adamw.state.values() for key in (*MOMENTS, "step")],
        }

    def moments(self) -> Iterator[tuple[str, Span, Tensor]]:
        """(moment, part, values) of every part of a parameter that this rank updates; values can be written to.

        The part is in elements of the parameter as it lies on this rank, flattened.
        """
        groups = iter(self._adamw.param_groups)
        for flat in self.flats:
            for within in (piece for piece in flat.decay_slices() if piece.start < piece.stop):
                (held,) = next(groups)["params"]
                for whole, part in flat.updated_spans():
                    start, stop = max(part.start, within.start), min(part.stop, within.stop)
                    if start < stop:
                        local = Span(whole.name, start - whole.start, stop - whole.start)
                        for moment in MOMENTS:
                            values = self._adamw.state[held][moment]
                            yield moment, local, values[start - within.start : stop - within.start]

    def set_step(self, step: int) -> None:
        """The number of updates done, which AdamW's bias correction needs; for resuming."""
        for state in self._adamw.state.values():
            state["step"].fill_(step)


def _parameter_groups(flat: FlatParameters, weight_decay: float) -> Iterator[dict]:
    """torch's parameter groups for what this rank updates of `flat`: a slice with weight decay and one without."""
    for piece, decay in zip(flat.decay_slices(), (weight_decay, 0.0), strict=True):
        if piece.start < piece.stop:
            held = torch.nn.Parameter(flat.weights_N[piece])
            held.grad = flat.gradients_N[piece]
            yield {"params": [held], "weight_decay": decay}
