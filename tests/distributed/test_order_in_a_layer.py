"""What a rank does between launching an all-to-all and waiting for it, in one layer with experts."""

from __future__ import annotations

import pytest
import torch
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, batch_for, engine_for

from pipermoe.modules.model import MoELayer
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.pipeline.flight import Collective, Work
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed

SPREAD = Strategy.parse("dp2 ep2")


class Waited:
    """A collective that notes when it is waited for."""

    def __init__(self, work: Work, name: str, log: list[str]):
        self._work, self._name, self._log = work, name, log

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> None:
        self._log.append(f"wait for {self._name}")
        self._work.wait()


class Noted(Collective):
    """torch's all-to-all, which notes what is launched: integers are counts, floats are rows."""

    log: list[str]

    def all_to_all(self, received, sent, received_rows, sent_rows) -> Work:
        name = "rows" if sent.is_floating_point() else "counts"
        self.log.append(f"launch {name}")
        return Waited(super().all_to_all(received, sent, received_rows, sent_rows), name, self.log)


def order(rank: int) -> tuple[list[str], list[str]]:
    """The forward of the first layer with experts, and the backward of the last."""
    groups = ProcessGroups.create(SPREAD)
    transport = Noted(groups.ep)
    transport.log = log = []
    engine = engine_for(MODELS["rich"], SPREAD, groups, transport=transport)
    [stage] = engine.stages.values()

    def note(module, inputs, output: torch.Tensor) -> None:
        log.append("shared experts")
        output.register_hook(lambda gradient: log.append("gradient of shared experts"))

    for layer in stage.model.layers.values():
        if isinstance(layer, MoELayer) and layer.shared is not None:
            layer.shared.register_forward_hook(note)
    engine.step(batch_for(SPREAD, groups.coordinates.dp, 0))
    back = log.index("gradient of shared experts") - 1
    return log[: log.index("launch counts", 1)], log[back : back + 5]


def test_counts_come_first_and_shared_experts_run_while_rows_travel():
    for forward, backward in run_ranks(order, 2):
        assert forward == [
            *("launch counts", "wait for counts", "launch rows", "shared experts", "wait for rows"),
            *("launch rows", "wait for rows"),
        ]
        assert backward == [
            *("launch rows", "gradient of shared experts", "wait for rows"),
            *("launch rows", "wait for rows"),
        ]
