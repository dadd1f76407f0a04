"""The mixture-of-experts block of a config: how many experts, how wide, how chosen."""

from __future__ import annotations

from typing import Literal

from pipermoe.specs.hf.reader import ConfigReader
from pipermoe.specs.model import MAX_EXPERTS, MixtureOfExperts, Router


def experts(
    config: ConfigReader,
    router: Router,
    *,
    count: str,
    top_k: str = "num_experts_per_tok",
    width: int | None = None,
    shared_width: int = 0,
    shared_gate: bool = False,
    expert_bias: bool = False,
    expert_matrices: Literal[2, 3] = 3,
    swiglu_limit: float = 0.0,
) -> MixtureOfExperts:
    """The block whose number of experts is in the key `count` and whose experts per token are in `top_k`.

    `width` of an expert is by default that of a dense layer, `intermediate_size`.
    """
    num_experts, chosen = config.uniform_size(count, limit=MAX_EXPERTS), config.uniform_size(top_k)
    if chosen > num_experts:
        raise config.error(top_k, f"must be at most {count} = {num_experts}")
    if num_experts % router.num_groups:
        raise config.error(count, f"must be a multiple of n_group = {router.num_groups}")
    return MixtureOfExperts(
        num_experts=num_experts,
        top_k=chosen,
        expert_width=config.size("intermediate_size") if width is None else width,
        shared_width=shared_width,
        shared_gate=shared_gate,
        expert_matrices=expert_matrices,
        expert_bias=expert_bias,
        swiglu_limit=swiglu_limit,
        router=router,
    )


def grouped_router(
    config: ConfigReader,
    *,
    score: Literal["softmax", "sigmoid"],
    normalize: bool,
    correction_bias: bool,
) -> Router:
    """DeepSeek's router: groups of experts, a scaling factor, and a correction bias that training moves by load."""
    groups = config.size("n_group", 1, limit=MAX_EXPERTS)
    chosen = config.size("topk_group", groups)
    if chosen > groups:
        raise config.error("topk_group", f"must be at most n_group = {groups}")
    return Router(
        score=score,
        normalize_top_k=config.flag("norm_topk_prob", normalize),
        scaling_factor=config.number("routed_scaling_factor", 1.0),
        correction_bias="buffer" if correction_bias else "none",
        num_groups=groups,
        top_k_groups=chosen,
    )
