"""What a layout policy makes of a plan: experts' time stretched, the worst memory, the price of its moves."""

from __future__ import annotations

from pipermoe.layout.replay import Comparison, Replay
from pipermoe.layout.transfer import expert_bytes
from pipermoe.resources.parameters import expert_parameters
from pipermoe.resources.peak import peak_bytes
from pipermoe.resources.rates import collective_seconds
from pipermoe.resources.step import predict
from pipermoe.specs.base import Frozen
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform import Platform
from pipermoe.specs.spread import spread
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import Balance


class LayoutPrice(Frozen):
    """One policy on a plan. `step_seconds` at the imbalance that the policy met; `move_seconds_per_step` on top where
    experts move with weights, gradients and optimizer state (nothing where these are sharded and the update scatters
    weights anyway); `peak_bytes` at the 95th percentile of the imbalance, weights and gradients of copies included.
    """

    policy: str
    step_seconds: float
    move_seconds_per_step: float
    peak_bytes: int

    @property
    def total_seconds(self) -> float:
        return self.step_seconds + self.move_seconds_per_step


class PricedComparison(Frozen):
    """A comparison of policies with the price of each on a plan; `balanced_seconds` is the step under even routing."""

    comparison: Comparison
    plan: str
    balanced_seconds: float
    prices: tuple[LayoutPrice, ...]


def price_policies(found: Comparison, plan: Plan, platform: Platform) -> PricedComparison:
    """The step of `plan` under every policy of `found`, which must be for the plan's experts and their ranks."""
    return PricedComparison(
        comparison=found,
        plan=plan.name,
        balanced_seconds=predict(plan.model, platform, plan.train, plan.strategy).step_seconds,
        prices=tuple(_price(each, found.every, plan, platform) for each in found.policies),
    )


def _price(replayed: Replay, every: int, plan: Plan, platform: Platform) -> LayoutPrice:
    model, strategy = plan.model, plan.strategy
    layers = -(-len(model.moe_layers) // strategy.pipeline_parallel)
    moved = replayed.arrivals * layers * expert_bytes(expert_parameters(model)) / strategy.expert_tensor_parallel
    group = spread(StrategyTable.of([strategy]), "ep")
    moving = collective_seconds(platform, "all_to_all", group, moved)[0] if moved else 0.0
    state = plan.train.recipe.state
    copies = max(replayed.held - model.moe.num_experts / strategy.expert_parallel, 0.0)
    copied = (
        copies * layers * expert_parameters(model) * (state.weight + state.gradient) / strategy.expert_tensor_parallel
    )
    job = plan.train.model_copy(update={"balance": Balance()})  # whose spare slots `held` counts
    activations = peak_bytes(model, job, StrategyTable.of([strategy]), imbalance=replayed.p95)[0]
    return LayoutPrice(
        policy=replayed.policy,
        step_seconds=predict(model, platform, plan.train, strategy, replayed.met).step_seconds,
        move_seconds_per_step=float(moving) / every,
        peak_bytes=round(activations + copied),
    )
