"""A plan whose strategy was chosen elsewhere: what someone runs today, predicted like any other plan."""

from __future__ import annotations

from pipermoe.planner.inputs import plan_inputs
from pipermoe.resources.priced import require_priced
from pipermoe.resources.step import predict
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.errors import UserError
from pipermoe.specs.legality import LEGAL, violations
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform import Platform


def plan_given(given: Configuration, platform: Platform) -> Plan:
    """The plan that runs `given` on `platform`. UserError where it is not legal or cannot be priced."""
    model, train, strategy = given.model, given.train, given.strategy
    if broken := violations(strategy, model, train, strategy.world_size, LEGAL):
        raise UserError(broken[0])
    require_priced(model, platform, train, strategy.world_size)
    budget = platform.device.memory_bytes - platform.reserved_bytes
    return Plan(
        name=f"{model.name} on {strategy.world_size} ranks of {platform.name}, strategy given",
        platform=platform.name,
        memory_budget_bytes=budget,
        model=model,
        train=train,
        strategy=strategy,
        prediction=predict(model, platform, train, strategy),
        inputs=plan_inputs(model, platform, train, strategy.world_size, budget, budget_given=False),
    )
