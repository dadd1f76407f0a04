"""Which part of the model each pipeline stage holds. Stage i lives on pipeline rank i modulo pp.

Source: Megatron-Core, transformer/pipeline_parallel_layer_layout.py and transformer/transformer_block.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.megatron.patterns import Layout
from pipermoe.specs.mesh import split_layers


@dataclass(frozen=True, slots=True)
class StageLayout:
    """One pipeline stage: its layers (0-based) and whether it embeds, predicts further tokens, computes the loss."""

    layers: range
    embedding: bool = False
    mtp_layers: int = 0
    loss: bool = False


def split_stages(
    num_layers: int, stages: int, layer_split: tuple[int, ...], mtp_layers: int
) -> tuple[StageLayout, ...]:
    """The stages of `layer_split` (empty: as even as can be); prediction modules are on the last."""
    sizes = tuple(len(layers) for layers in split_layers(num_layers, stages, layer_split))
    return stages_of(Layout(sizes, (0,) * (stages - 1) + (mtp_layers,)), num_layers, mtp_layers)


def stages_of(layout: Layout, num_layers: int, mtp_layers: int) -> tuple[StageLayout, ...]:
    """The stages of a layout string; one without the letter m has its prediction modules on the last stage."""
    if sum(layout.decoder) != num_layers:
        rule = f"has {sum(layout.decoder)} layers; --num-layers = {num_layers}"
        raise UserError(describe_value("", "--pipeline-model-parallel-layout", str(layout), rule))
    last = len(layout.decoder) - 1
    ends = list(accumulate(layout.decoder))
    return tuple(
        StageLayout(
            range(end - size, end),
            embedding=stage == 0,
            mtp_layers=predicted if any(layout.mtp) else mtp_layers * (stage == last),
            loss=stage == last,
        )
        for stage, (size, predicted, end) in enumerate(zip(layout.decoder, layout.mtp, ends, strict=True))
    )
