"""A platform file is read strictly, and its evidence is found by the longest known key."""

import copy
from typing import Any

import pytest

from pipermoe.specs.documents import validate
from pipermoe.specs.errors import UserError
from pipermoe.specs.network import COLLECTIVES
from pipermoe.specs.platform import Platform

CURVE = {"size": [1.0], "rate": [1e12]}
PLATFORM = {
    "name": "two",
    "device": {
        "name": "chip",
        "memory_bytes": "80GiB",
        "peak_flops_per_s": {"fp32": "20TFLOP/s"},
        **{key: {"fp32": CURVE} for key in ("gemm", "attention", "attention_backward")},
        "grouped_gemm": {"fp32": [CURVE | {"width": 64}]},
        "memory_bound": CURVE,
        "kernel_seconds": "5us",
    },
    "host": {"ranks": 2, "compute_slots": 2},
    "levels": [
        {
            "name": "node",
            "ranks": 2,
            "cost": {name: {"latency_seconds": "2us", "bandwidth_bytes_per_s": "400Gb/s"} for name in COLLECTIVES},
        }
    ],
    "evidence": {
        "device": {"kind": "datasheet", "source": "a"},
        "device.gemm": {"kind": "measured", "source": "b"},
    },
}


def changed(path: str, value: object) -> dict:
    data = copy.deepcopy(PLATFORM)
    *folders, last = path.split(".")
    place: Any = data
    for name in folders:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return data


def test_units_become_base_units():
    platform = validate(PLATFORM, Platform, "p.toml")
    assert platform.device.memory_bytes == 80 * 2**30
    assert platform.levels[0].cost["send"].bandwidth_bytes_per_s == 50e9
    assert platform.device.layer_forward_seconds == 0


def test_evidence_is_that_of_the_longest_known_prefix():
    platform = validate(PLATFORM, Platform, "p.toml")
    sources = [platform.evidence_for(key) for key in ("device.gemm.fp32", "device.attention", "host")]
    assert [found and found.source for found in sources] == ["b", "a", None]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("levels.0.cost.send.bandwidth_bytes_per_s", -1, "bandwidth_bytes_per_s"),
        ("levels.0.cost.send.bandwidth_bytes_per_s", "5 parsec", "unknown unit 'parsec'"),
        ("levels.0.cost", {}, "cost is missing for send"),
        ("levels.0.group_cost", {2: {}}, r"group_cost sizes \[2\] must be below ranks = 2"),
        ("levels", [], "levels"),
        ("device.memory_bound", {"size": [2.0, 1.0], "rate": [1.0, 1.0]}, "size must ascend"),
        ("device.gem", {}, "did you mean 'gemm'"),
        ("host.compute_slots", 0, "compute_slots"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(path, value, message):
    with pytest.raises(UserError, match=message) as caught:
        validate(changed(path, value), Platform, "p.toml")
    assert str(caught.value).startswith("p.toml")
