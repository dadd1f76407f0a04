"""Weights that are whole on a rank only while they are used, and the parameters that hold them meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class LentWeights:
    """The weights of `parameters`, end to end in one buffer that comes for every use and goes after it.

    Between uses the parameters keep their shapes, and whoever reads them reads NaN.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], whole_N: Tensor | None = None) -> None:
        self._parameters = tuple(parameters)
        self._users = 0
        self._arrive: Callable[[], object] | None = None
        self.whole = whole_N

    def launch(self, whole_N: Tensor, arrive: Callable[[], object]) -> None:
        """The weights are on their way into `whole_N`; after `arrive` they are there."""
        self.whole, self._arrive = whole_N, arrive

    def wait(self) -> None:
        """Wait for weights on their way, and let the parameters hold them."""
        if self._arrive is not None:
            assert self.whole is not None
            self._arrive()
            self._arrive = None
            sizes = [parameter.numel() for parameter in self._parameters]
            for parameter, part in zip(self._parameters, self.whole[: sum(sizes)].split(sizes), strict=True):
                parameter.data = part.view(parameter.shape)

    def acquire(self) -> None:
        """Keep the weights from being dropped, as often as `release` has not been called."""
        self._users += 1

    def release(self) -> None:
        self._users -= 1

    @property
    def in_use(self) -> bool:
        return self._users > 0

    def drop(self) -> Tensor | None:
        """Let go of the weights; the buffer that they lay in, if there was one."""
        if self._arrive is not None:
            self._arrive()
            self._arrive = None
        dropped, self.whole = self.whole, None
        first = self._parameters[0]
        nothing = torch.full((), math.nan, dtype=first.dtype, device=first.device)
        for parameter in self._parameters:
            parameter.data = nothing.expand(parameter.shape)
        return dropped
