"""TrainConfig <-> Megatron-LM arguments: batch, optimizer, losses, number formats.

What one argument says alone is a row of `table.TRAIN`; here is what takes several arguments on either side.
"""

from __future__ import annotations

from pipermoe.specs.documents import validate
from pipermoe.specs.megatron.arguments import Arguments
from pipermoe.specs.megatron.options import Value
from pipermoe.specs.megatron.table import TRAIN, put, read_rows, write_rows
from pipermoe.specs.precision import RECIPES, Precision, StateBytes
from pipermoe.specs.train import AuxiliaryLossLevel, TrainConfig

LOSS_LEVELS: dict[AuxiliaryLossLevel, str] = {
    "micro_batch": "aux_loss",
    "sequence": "seq_aux_loss",
    "global_batch": "global_aux_loss",
}
# fp8 operands as DeepSeek-V3 was trained: e4m3 in blocks (arXiv 2412.19437, section 3.3).
PRECISIONS: dict[Precision, dict[str, Value]] = {
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
        | _write_state(train)
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
    precision = read_precision(arguments)
    put(tree, "precision", precision)
    put(tree, "state_bytes", _read_state(arguments, precision))
    return validate(tree, TrainConfig, where="Megatron arguments")


def unsupported_state(train: TrainConfig) -> str:
    """Why no arguments give the optimizer state of `train`; empty if some do."""
    usual, state = RECIPES[train.precision].state, train.recipe.state
    gradients, moments = ((2, 4), (4, 8)) if usual.master else ((4,), (8,))
    if (state.weight, state.master) != (usual.weight, usual.master):
        return f"weight and master take {usual.weight:g} and {usual.master:g} bytes in {train.precision}"
    if state.gradient not in gradients or state.moments not in moments:
        accepted = [" or ".join(map(str, sizes)) for sizes in (gradients, moments)]
        return f"a gradient takes {accepted[0]} bytes, both moments {accepted[1]} in {train.precision}"
    return ""


def _write_state(train: TrainConfig) -> dict[str, Value]:
    usual, state = RECIPES[train.precision].state, train.recipe.state
    arguments: dict[str, Value] = {}
    if state.gradient < usual.gradient:
        arguments["grad_reduce_in_bf16"] = True
    if state.moments < usual.moments:
        arguments |= {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    return arguments


def _read_state(arguments: Arguments, precision: Precision) -> StateBytes | None:
    usual = RECIPES[precision].state
    sizes = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
    moments = sum(sizes[arguments[name]] for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    gradient = 2 if arguments["grad_reduce_in_bf16"] else usual.gradient
    state = usual.model_copy(update={"gradient": gradient, "moments": moments})
    return None if state == usual else state


def read_precision(arguments: Arguments) -> Precision:
    if arguments["fp8"]:
        return "fp8"
    return "bf16" if arguments["bf16"] else "fp16" if arguments["fp16"] else "fp32"
