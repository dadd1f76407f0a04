"""Computing by module adds up to the computing of a stage."""

import numpy as np
import pytest
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.resources.activations.sizes import Recompute, sizes_of
from pipermoe.resources.compute import layer_seconds, stage_seconds
from pipermoe.resources.parts import part_seconds
from pipermoe.resources.stages import stage_shapes
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable

STRATEGIES = [
    Strategy.parse(text)
    for text in (
        "pp2 dp2 ep2 mbs1",
        "pp2 dp2 ep2 mbs2 full",
        "pp2 dp2 ep1 edp2 mbs2 selective:norm,attention,experts,shared_experts,dense_mlp",
    )
]


@pytest.mark.parametrize("issue_seconds", [0.0, 1.0])
def test_parts_add_up_to_the_stage(issue_seconds):
    table, device = StrategyTable.of(STRATEGIES), machine().device
    device = device.model_copy(update={"issue_seconds": issue_seconds, "layer_forward_seconds": 1e-3})
    sizes, recompute, shapes = sizes_of(MODEL, TRAIN, table), Recompute.of(table), stage_shapes(MODEL, 2)
    parts = part_seconds(device, "fp32", sizes, recompute, shapes)
    whole = stage_seconds(layer_seconds(device, "fp32", sizes, recompute), shapes)
    expected = whole.forward + whole.input_grad + whole.weight_grad
    np.testing.assert_allclose(sum(parts.values()), expected, rtol=1e-12)
    assert (parts["recompute"][0] == 0).all()
    assert (parts["recompute"][1:] > 0).all()
    assert (parts["host"] > 0).all()
    assert min(part.min() for part in parts.values()) >= -1e-12
