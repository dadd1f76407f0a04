"""What torchtitan calls things: models, schedules, number formats, sharding."""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "0.3.0"
TARGET = f"torchtitan {VERSION}"


@dataclass(frozen=True, slots=True)
class Registered:
    """Where torchtitan registers a model: torchtitan.models.`family`.config_registry.`function`."""

    family: str
    function: str


MODELS: dict[str, Registered] = {
    "deepseek-v3": Registered("deepseek_v3", "deepseek_v3_671b"),
    "gpt-oss-20b": Registered("gpt_oss", "gpt_oss_20b"),
    "gpt-oss-120b": Registered("gpt_oss", "gpt_oss_120b"),
    "qwen3-30b-a3b": Registered("qwen3", "qwen3_30b_a3b"),
}
# Schedules of torch.distributed.pipelining whose order is ours, action by action; the others go as CSV.
SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved-1f1b": "Interleaved1F1B",
    "zb-v": "ZBVZeroBubble",
    "dualpipe-v": "DualPipeV",
}
NUMBERS = {"fp32": "float32", "bf16": "bfloat16"}
RESHARD = {2: "never", 3: "always"}  # after the forward pass: FSDP keeps the gathered weights, or frees them
