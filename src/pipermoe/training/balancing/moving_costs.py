"""What a row of an expert takes to compute, and what moving experts takes, from what this run has measured."""

# L MoE layers of the model, N ranks of an expert-parallel group, E logical experts

from __future__ import annotations

import time

import numpy as np
import torch

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.homes import homes_alone
from pipermoe.layout.transfer import Transfer
from pipermoe.resources.flops import model_forward_flops
from pipermoe.resources.parameters import expert_parameters
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.specs.train import Mechanism

STATE_BYTES = 12  # of a parameter whose home moves between steps: fp32 weight and two moments; gradients are zero then
PROBES = 3


class MovingCosts:
    """Made once by every rank: it times a message between the ranks of the expert-parallel group."""

    def __init__(self, mechanism: Mechanism, engine: Engine) -> None:
        assert engine.placement is not None
        self._mechanism, self._placement = mechanism, engine.placement
        self._parameters = expert_parameters(engine.model)
        self._weight_bytes = engine.dtype.itemsize
        self._microbatches, self._stages = engine.microbatches, engine.strategy.pipeline_parallel
        self._ranks = engine.strategy.world_size
        job, model = engine.train, engine.model
        forward = model_forward_flops(model, tokens=job.tokens_per_step, seq_len=job.seq_len, causal=False)
        rows = job.tokens_per_step * model.moe.top_k * len(model.moe_layers)
        self._expert_share = 2.0 * self._parameters * rows / float(forward)
        self._bandwidth = _bandwidth(engine, self._parameters * self._weight_bytes)

    def seconds_per_row(self, compute_seconds: float, rows: int) -> float:
        """Of a step's time, for each row that the busiest rank of a layer has less.

        From the seconds in which a rank computed: experts take their share of FLOPs of them. Layers of different
        pipeline stages compute at the same time.
        """
        return compute_seconds * self._expert_share / max(rows / self._ranks, 1) / self._stages

    def move_seconds(self, before: ExpertLayout, after: ExpertLayout) -> float:
        """Of the step that moves. Decoupled weights travel anyway, and sparse copies in every step."""
        if self._mechanism != "bound":
            return 0.0
        moves = Transfer.between(homes_alone(before), homes_alone(after), self._placement.nodes)
        return moves.seconds(self._parameters * STATE_BYTES, self._bandwidth) if moves.moves else 0.0

    def seconds_per_step(self, layout: ExpertLayout, compute_seconds: float) -> float:
        """Of every step, for copies: weights out and gradients home. Sparse copies travel for every use of a layer, but
        beside computing: of them only what the attention and the rest beside experts do not hide.
        """
        if self._mechanism == "decoupled":
            return 0.0
        copies = Transfer.between(self._homes(layout), layout, self._placement.nodes)
        weights = self._parameters * self._weight_bytes
        gradients = self._parameters * 4
        once = weights + gradients
        if self._mechanism == "sparse":
            once = (2 * weights + gradients) * self._microbatches
        seconds = copies.seconds(once, self._bandwidth) / self._stages if copies.moves else 0.0
        hidden = compute_seconds * (1 - self._expert_share) if self._mechanism == "sparse" else 0.0
        return max(seconds - hidden, 0.0)

    def _homes(self, layout: ExpertLayout) -> ExpertLayout:
        if self._mechanism == "sparse":
            return self._placement.homes
        return homes_alone(layout)


def _bandwidth(engine: Engine, message_bytes: int) -> float:
    """Bytes/s of an all-to-all of as much as one expert's weights, the best of a few. Collective."""
    group = engine.groups.ep
    sent = torch.zeros(max(message_bytes // 4 // group.size(), 1) * group.size(), device=engine.device)
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(PROBES):
        start = time.perf_counter()
        engine.transport.all_to_all(received, sent, None, None).wait()
        received[0].item()
        seconds.append(time.perf_counter() - start)
    return sent.nbytes / float(np.min(seconds))
