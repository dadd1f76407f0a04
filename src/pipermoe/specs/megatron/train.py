"""TrainConfig <-> Megatron-LM arguments: batch, optimizer, losses, number formats.

What one argument says alone is a row of `table.TRAIN`; here is what takes several arguments on either side.
"""

from __future__ import annotations

from pipermoe.specs.documents import validate
from pipermoe.specs.megatron.arguments import Arguments
from pipermoe.specs.megatron.options import Value
from pipermoe.specs.megatron.table import TRAIN, put, read_rows, write_rows
from pipermoe.specs.train import AuxiliaryLossLevel, TrainConfig

LOSS_LEVELS: dict[AuxiliaryLossLevel, str] = {
    "micro_batch": "aux_loss",
    "sequence": "seq_aux_loss",
    "global_batch": "global_aux_loss",
}
# fp8 operands as DeepSeek-V3 was trained: e4m3 in blocks (arXiv 2412.19437, section 3.3).
PRECISIONS: dict[str, dict[str, Value]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "fp8": {"bf16": True, "fp8": "e4m3", "fp8_recipe": "blockwise"},
}


def write_train(train: TrainConfig) -> dict[str, Value]:
    """The arguments that describe `train`."""
    balanced = train.auxiliary_loss > 0
    return (
        write_rows(TRAIN, train)
        | {
            "lr_decay_style": "cosine",
            "lr_decay_iters": train.steps,
            "max_position_embeddings": train.seq_len,
            "moe_router_load_balancing_type": [LOSS_LEVELS[train.auxiliary_loss_level] if balanced else "none"],
            "moe_aux_loss_coeff": [train.auxiliary_loss],
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }
        | PRECISIONS[train.precision]
    )


def read_train(arguments: Arguments) -> TrainConfig:
    """The job that `arguments` describe. UserError where they describe none."""
    tree = read_rows(TRAIN, arguments)
    kind = arguments["moe_router_load_balancing_type"][0]
    level = next((ours for ours, theirs in LOSS_LEVELS.items() if theirs == kind), None)
    coefficients = arguments["moe_aux_loss_coeff"]
    put(tree, "auxiliary_loss", coefficients[0] if level else 0.0)
    if level:
        put(tree, "auxiliary_loss_level", level)
    put(tree, "precision", read_precision(arguments))
    if arguments["global_batch_size"] is None and arguments["micro_batch_size"]:
        put(tree, "global_batch_size", arguments["micro_batch_size"])
    return validate(tree, TrainConfig, where="Megatron arguments")


def read_precision(arguments: Arguments) -> str:
    if arguments["fp8"]:
        return "fp8"
    return "bf16" if arguments["bf16"] else "fp16" if arguments["fp16"] else "fp32"
