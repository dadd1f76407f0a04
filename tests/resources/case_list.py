"""The cases on which the resource model equals the dry run, made by rule: every schedule in several arrangements, all
else (families of models, recomputation, sharding, dispatch, precision) covered pair by pair."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.pairwise import covering
from tests.runtime.tiny import GROUPED, LATENT, PLAIN, RICH, SINKS

from pipermoe.schedule.builders import RECIPES, illegal
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Recompute, Strategy
from pipermoe.specs.train import TrainConfig


def _grown(model: ModelSpec) -> ModelSpec:
    """Wide enough that what is small beside the rest in a real model is small here too."""
    update: dict[str, Any] = {
        "hidden_size": 64,
        "vocab_size": 256,
        "moe": model.moe.model_copy(update={"expert_width": 96}),
    }
    if model.local_attention is not None:
        update["local_attention"] = model.local_attention.model_copy(update={"size": 48})
    return model.model_copy(update=update)


FAMILIES = {model.name: _grown(model) for model in (PLAIN, RICH, LATENT, SINKS, GROUPED)}
SCHEDULES = tuple(RECIPES)
# (pipeline, data, expert parallel)
ARRANGEMENTS = ((1, 4, 4), (1, 4, 2), (2, 2, 1), (2, 2, 2), (2, 4, 2), (4, 1, 1), (4, 2, 2))
OPTIONS: dict[str, tuple[Any, ...]] = {
    "family": tuple(FAMILIES),
    "recompute": ((), "full", RECOMPUTE_MODULES, ("norm", "attention"), ("moe_act", "shared_experts")),
    "zero_dense": (0, 1, 2, 3),
    "zero_expert": (0, 1, 2, 3),
    "dispatcher": ("all_to_all", "deduplicated"),
    "split": ("even", "uneven"),
    "precision": ("fp32", "bf16"),
    "capacity_factor": (0.0, 0.5, 1.0),
}


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained, and how."""

    model: ModelSpec
    train: TrainConfig
    strategy: Strategy

    def __str__(self) -> str:
        strategy, train = self.strategy, self.train
        rebuilt = "+".join(strategy.recompute_modules) or strategy.recompute
        words = [self.model.name, strategy.schedule, strategy.compact(), strategy.dispatcher, rebuilt, train.precision]
        words += [f"capacity {train.capacity_factor}"] * (train.capacity_factor > 0)
        return " ".join([*words, *["uneven"] * bool(strategy.layer_split)])


@cache
def cases() -> tuple[Case, ...]:
    """One for every schedule and arrangement that can meet."""
    rows = [
        (schedule, arrangement)
        for (i, schedule), (j, arrangement) in itertools.product(enumerate(SCHEDULES), enumerate(ARRANGEMENTS))
        if (i + j) % 3
        and not illegal(schedule, arrangement[0], _microbatches(arrangement), RECIPES[schedule].virtual_stages[0])
    ]
    return tuple(_case(schedule, arrangement, options) for (schedule, arrangement), options in covering(rows, OPTIONS))


def _microbatches(arrangement: tuple[int, int, int]) -> int:
    return max(2 * arrangement[0], 4)


def _case(schedule: Any, arrangement: Any, options: dict[str, Any]) -> Case:
    pp, dp, ep = arrangement
    stages = pp * RECIPES[schedule].virtual_stages[0]
    layers = max(stages, 2) + 1  # the longest stage holds two
    modules = options["recompute"] if isinstance(options["recompute"], tuple) else ()
    recompute: Recompute = "full" if options["recompute"] == "full" else "selective" if modules else "none"
    strategy = Strategy(
        pipeline_parallel=pp,
        virtual_stages=stages // pp,
        data_parallel=dp,
        expert_parallel=ep,
        expert_data_parallel=dp // ep,
        schedule=schedule,
        layer_split=(*[1] * (stages - 1), layers - stages + 1) if options["split"] == "uneven" else (),
        recompute=recompute,
        recompute_modules=modules,
        **{key: options[key] for key in ("zero_dense", "zero_expert", "dispatcher")},
    )
    train = TrainConfig(
        seq_len=128,
        global_batch_size=dp * _microbatches(arrangement),
        precision=options["precision"],
        capacity_factor=options["capacity_factor"],
    )
    model = FAMILIES[options["family"]].model_copy(update={"num_layers": layers})
    return Case(model, train, strategy)
