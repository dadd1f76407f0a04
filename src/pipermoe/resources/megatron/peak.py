"""The most bytes that a Megatron rank holds during a step: the static ones and what its schedule keeps in flight."""

from __future__ import annotations

from dataclasses import dataclass

from pipermoe.resources.megatron.head import loss_forward_extra, stage_modules
from pipermoe.resources.megatron.job import Machine, MegatronJob
from pipermoe.resources.megatron.static import StaticMemory, rank_stages, static_memory
from pipermoe.resources.megatron.tensors import BOOL
from pipermoe.schedule.action import Kind, Schedule
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


def _instants(job: MegatronJob, pipeline_rank: int) -> list[tuple[float, float]]:
    """(activations in flight, bytes on top) at the end of every forward and in every backward of the rank."""
    pipeline = job.strategy.pipeline_parallel
    kept, forward_extra, backward_extra = {}, {}, {}
    for chunk, stage in enumerate(rank_stages(job, pipeline_rank)):
        index, modules = chunk * pipeline + pipeline_rank, stage_modules(job, stage)
        kept[index] = sum(module.saved_bytes for module in modules)
        forward_extra[index] = loss_forward_extra(job) * stage.loss
        backward_extra[index] = max(module.backward_extra for module in modules)
    held, instants = 0.0, []
    for part in schedule_of(job).parts(pipeline_rank):
        if part.kind is Kind.FORWARD:
            held += kept[part.stage]
            instants.append((held, forward_extra[part.stage]))
        elif ends_life(part):
            instants.append((held, backward_extra[part.stage] if not forward_extra[part.stage] else 0.0))
            held -= kept[part.stage]
    return instants
