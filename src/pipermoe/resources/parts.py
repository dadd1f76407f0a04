"""Where the computing of a stage goes, module by module; the parts add up to what `compute.stage_seconds` says."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.activations.sizes import Recompute, Sizes
from pipermoe.resources.compute import (
    GroupedGemm,
    LayerSeconds,
    Seconds,
    attention_work,
    dense_work,
    join_work,
    layer_seconds,
    moe_work,
    rebuilt_work,
    shared_work,
    stage_seconds,
    total_seconds,
)
from pipermoe.resources.stages import StageShapes
from pipermoe.specs.device import Device
from pipermoe.specs.precision import Precision

Part = Literal["attention", "experts", "routing", "dense_mlp", "head", "recompute", "host"]
PARTS: tuple[Part, ...] = (
    "attention",  # norm, projections, rotation, core and residual
    "experts",  # the grouped products of the routed experts
    "routing",  # router, permutations, casts, activations and residuals of the MoE block
    "dense_mlp",  # dense layers' and shared experts' MLPs
    "head",  # embedding, final norm, logits and loss; what multi-token prediction has beside its layer
    "recompute",  # what is computed once more for the backward
    "host",  # waiting for the host to issue a layer, and a layer's fixed cost
)
_NOTHING = Seconds(0.0, 0.0, 0.0)


def part_seconds(
    device: Device, precision: Precision, sizes: Sizes, recompute: Recompute, shapes: StageShapes
) -> dict[Part, NDArray[np.float64]]:
    """Forward and backward seconds of one micro-batch by part: arrays (rows, stages)."""

    def on_stages(moe: Seconds = _NOTHING, dense: Seconds = _NOTHING) -> Any:
        return _both_directions(stage_seconds(LayerSeconds(moe, dense, _NOTHING, _NOTHING, moe), shapes))

    def seconds(work) -> Seconds:
        return total_seconds(work, device, precision)

    moe, shared, whole = moe_work(sizes), shared_work(sizes), layer_seconds(device, precision, sizes, recompute)
    attention, experts = seconds(attention_work(sizes)), seconds([w for w in moe if isinstance(w, GroupedGemm)])
    rebuilt = [
        (1.0 * mask, seconds(in_moe), seconds(in_dense)) for mask, in_moe, in_dense in rebuilt_work(sizes, recompute)
    ]
    layers, join = (seconds(moe), seconds(dense_work(sizes))), seconds(join_work(sizes))
    again = [
        Seconds(
            0.0,
            (attention + layer).forward * recompute.full + sum(each[0] * each[kind].forward for each in rebuilt),
            0.0,
        )
        for kind, layer in enumerate(layers, start=1)
    ]
    parts: dict[Part, Any] = {
        "attention": on_stages(attention, attention),
        "experts": on_stages(experts),
        "routing": on_stages(layers[0]) - on_stages(experts) - on_stages(seconds(shared)),
        "dense_mlp": on_stages(seconds(shared), layers[1]),
        "head": _both_directions(
            stage_seconds(
                LayerSeconds(_NOTHING, _NOTHING, whole.has_embedding, whole.has_head, whole.has_head + join), shapes
            )
        ),
        "recompute": on_stages(*again),
    }
    parts["host"] = _both_directions(stage_seconds(whole, shapes)) - sum(parts.values())
    return {part: np.asarray(parts[part], dtype=float) for part in PARTS}


def _both_directions(seconds: Seconds) -> Any:
    return seconds.forward + seconds.input_grad + seconds.weight_grad
