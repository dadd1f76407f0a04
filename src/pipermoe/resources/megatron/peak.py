"""The most bytes that a Megatron rank holds during a step: the static ones and what its schedule keeps in flight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipermoe.resources.megatron.head import EMBEDDING, LOSS, stage_modules
from pipermoe.resources.megatron.job import Machine, MegatronJob
from pipermoe.resources.megatron.static import StaticMemory, rank_stages, static_memory
from pipermoe.resources.megatron.tensors import BF16, BOOL, Module
from pipermoe.schedule.action import Action, Kind, Schedule
from pipermoe.schedule.builders import build
from pipermoe.schedule.memory import ends_life


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """`activations` are in flight at the peak; `transient` is on top of them at that instant."""

    static: StaticMemory
    activations: float
    transient: float

    @property
    def total(self) -> float:
        return self.static.total - self.static.stage_inputs + self.activations + self.transient


def peak_memory(job: MegatronJob, machine: Machine, pipeline_rank: int) -> PeakMemory:
    """The peak of one pipeline rank. The inputs that chunks hold between steps are in flight at the peak."""
    activations, transient = max(_instants(job, pipeline_rank), key=sum)
    mask = job.strategy.micro_batch_size * job.seq_len**2 / job.strategy.context_parallel * BOOL
    return PeakMemory(
        static_memory(job, machine, pipeline_rank), activations, transient + mask * job.options.attention_mask
    )


def schedule_of(job: MegatronJob) -> Schedule:
    """1F1B, interleaved if the ranks hold several chunks."""
    strategy = job.strategy
    return build(strategy.schedule, strategy.pipeline_parallel, job.microbatches, strategy.virtual_stages)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes of one chunk and micro-batch: kept by its layers and by the loss, and what each holds for a moment."""

    layers: float
    loss: float
    forward_extra: float
    loss_extra: float
    backward_extra: float
    embedding_gradient: float

    @classmethod
    def of(cls, modules: tuple[Module, ...]) -> _Chunk:
        losses = [module for module in modules if module.name == LOSS]
        others = [module for module in modules if module.name != LOSS]
        return cls(
            layers=sum(module.saved_bytes for module in others),
            loss=sum(module.saved_bytes for module in losses),
            forward_extra=max(module.forward_extra for module in others),
            loss_extra=max((module.forward_extra for module in losses), default=0.0),
            backward_extra=max(module.backward_extra for module in others if module.name != EMBEDDING),
            embedding_gradient=max((m.backward_extra for m in others if m.name == EMBEDDING), default=0.0),
        )


def _instants(job: MegatronJob, pipeline_rank: int) -> Iterator[tuple[float, float]]:
    """(activations in flight, bytes on top) where a rank can be at its peak.

    In a forward: in the last layer, and in the loss. In a backward: in the last layer, the loss done, and in the
    embedding, the layers done.
    """
    chunks = {
        number * job.strategy.pipeline_parallel + pipeline_rank: _Chunk.of(stage_modules(job, stage))
        for number, stage in enumerate(rank_stages(job, pipeline_rank))
    }
    held = 0.0
    parts = tuple(schedule_of(job).parts(pipeline_rank))
    boundary = job.shard * job.model.hidden_size * BF16
    for part, tensors in zip(parts, boundary_tensors(job, parts), strict=True):
        chunk, beside = chunks[part.stage], tensors * boundary
        if part.kind is Kind.FORWARD:
            held += chunk.layers
            yield held, chunk.forward_extra + beside
            held += chunk.loss
            yield held, chunk.loss_extra + beside
        elif ends_life(part):
            held -= chunk.loss
            yield held, chunk.backward_extra + beside
            held -= chunk.layers
            yield held, chunk.embedding_gradient + beside


def boundary_tensors(job: MegatronJob, parts: Sequence[Action]) -> Iterator[int]:
    """How many inputs and gradients of stages the schedule's own variables hold during each of a rank's `parts`.

    From the first backward on: the gradient that the last one sent, until the next has ended; and what the next
    backward, or this one, starts from. Interleaved, a backward also has the input of the next forward, which is
    received ahead. Source: pipeline_parallel/schedules.py, `input_tensor_grad` and the buffers of both receives.
    """
    last, interleaved = job.strategy.num_stages - 1, job.strategy.virtual_stages > 1
    coming: list[int] = []
    gradient = ahead = False
    for part in reversed(parts):
        if part.kind is Kind.FORWARD:
            ahead = interleaved and part.stage > 0
            coming.append(gradient)
        else:
            gradient = part.stage < last
            coming.append(gradient + ahead)
    sent, begun = False, False
    for part, received in zip(parts, reversed(coming), strict=True):
        begun = begun or part.kind is not Kind.FORWARD
        yield (sent + received) * begun
        if part.kind is not Kind.FORWARD:
            sent = part.stage > 0
