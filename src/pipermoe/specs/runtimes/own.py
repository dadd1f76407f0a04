"""What this project's own runtime trains."""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.specs.legality import Job
from pipermoe.specs.model import LatentAttention, ModelSpec
from pipermoe.specs.runtimes.limits import job_limit, limit, parts_limit

TARGET = "pipermoe"
PRECISIONS = ("fp32", "bf16")


def unbuildable_parts(model: ModelSpec) -> Iterator[tuple[str, object, str]]:
    """(key, value, rule) of every part of the model that modules/model.py does not build."""
    attention = model.attention
    if model.norms_per_layer != 2:
        rule = "this runtime builds 2, before attention and before the experts"
        yield "norms_per_layer", model.norms_per_layer, rule
    if isinstance(attention, LatentAttention):
        if attention.indexer is not None:
            yield "attention.indexer", attention.indexer, "selected keys are not implemented; leave it out"
        if model.no_rope_layers:
            rule = "latent attention has positions in every layer; leave it out"
            yield "no_rope_layers", model.no_rope_layers, rule
        rotated = "qk_rope_head_dim"
    else:
        rotated = "rotary_dim" if attention.rotary_dim else "head_dim"
    if attention.rotated % 2:
        yield f"attention.{rotated}", attention.rotated, "must be even: rotary positions turn pairs"


def untrainable_parts(model: ModelSpec) -> Iterator[tuple[str, object, str]]:
    """The same of what it does not train; a dry run may have positions of any kind: they change no count."""
    yield from unbuildable_parts(model)
    if stretch := model.attention.rope_stretch:
        yield (
            "attention.rope_stretch",
            stretch,
            "this runtime does not turn positions like that; leave it out, or use yarn",
        )


def _unsupported(job: Job) -> Iterator[tuple[str, object, str]]:
    return ((f"model.{key}", value, rule) for key, value, rule in untrainable_parts(job.model))


EXECUTABLE = (
    *(
        limit(key, lambda table, job, key=key: getattr(table, key) == 1, "this runtime executes 1 only")
        for key in ("context_parallel", "tensor_parallel", "expert_tensor_parallel")
    ),
    job_limit(
        "train.precision",
        lambda job: job.train.precision in PRECISIONS,
        f"this runtime executes {' or '.join(PRECISIONS)} only",
    ),
    job_limit(
        "train.state_bytes",
        lambda job: job.train.state_bytes is None,
        "this runtime keeps the bytes of the precision's own recipe; leave it out to run",
    ),
)
RULES = (*EXECUTABLE, parts_limit(_unsupported))
