"""A torchtitan module as a plan."""

from __future__ import annotations

import ast
import posixpath
from typing import Any

from pipermoe.export.torchtitan.names import SCHEDULES
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.documents import validate
from pipermoe.specs.errors import UserError
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.runtimes.torchtitan import MODELS, NUMBERS
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import SCHEDULE_NAMES
from pipermoe.specs.train import TrainConfig


def read(text: str, where: str, world_size: int) -> Configuration:
    """The configuration that a module such as `module_text` writes returns. UserError for any other code."""
    values = _literals(text, where)
    names = {registered.function: name for name, registered in MODELS.items()}
    if (function := values.get("model")) not in names:
        raise UserError(f"{where}: must start from one of {', '.join(names)}, not from {function}")
    model = load_model(names[function])
    train = validate(_read_train(values, world_size), TrainConfig, where)
    strategy = validate(_read_strategy(values, world_size, model.num_layers, where), Strategy, where)
    return Configuration(model=model, train=train, strategy=strategy)


def _literals(text: str, where: str) -> dict[str, Any]:
    """Everything assigned to `config`, by dotted key; "model" is the function that made it."""
    values: dict[str, Any] = {}
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        raise UserError(f"{where}: is not Python") from None
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        key = ast.unparse(node.targets[0])
        match node.value:
            case ast.Call(func=ast.Name(id=name)) if key == "config":
                values["model"] = name
            case ast.Call(keywords=keywords):
                values[key] = ast.unparse(node.value.func)
                values |= {f"{key}.{word.arg}": _literal(word.value, where) for word in keywords}
            case value:
                values[key] = _literal(value, where)
    return {key.removeprefix("config."): value for key, value in values.items()}


def _literal(node: ast.expr, where: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UserError(f"{where}: line {node.lineno}: {ast.unparse(node)!r} is not a literal") from None


def _read_train(values: dict[str, Any], world_size: int) -> dict[str, Any]:
    numbers = {theirs: ours for ours, theirs in NUMBERS.items()}
    batch = values.get("training.global_batch_size", -1)
    if batch < 0:
        batch = values.get("training.local_batch_size", 8) * _degrees(values, world_size)["data_parallel"]
    rate = values.get("optimizer.lr", 8e-4)
    beta1, beta2 = values.get("optimizer.betas", (0.9, 0.95))
    return {
        "seq_len": values.get("training.seq_len", 2048),
        "global_batch_size": batch,
        "steps": values.get("training.steps", 10000),
        "precision": numbers.get(values.get("training.mixed_precision_param", "bfloat16")),
        "optimizer": {
            "learning_rate": rate,
            "minimum_learning_rate": float(f"{rate * values.get('lr_scheduler.min_lr_factor', 0.0):.12g}"),
            "warmup_steps": values.get("lr_scheduler.warmup_steps", 200),
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": values.get("optimizer.eps", 1e-8),
            "weight_decay": values.get("optimizer.weight_decay", 0.1),
            "gradient_clip": values.get("training.max_norm", 1.0),
        },
    }


def _degrees(values: dict[str, Any], world_size: int) -> dict[str, int]:
    def degree(name: str) -> int:
        return values.get(f"parallelism.{name}_degree", 1)

    pp, tp, cp, ep = (degree(f"{name}_parallel") for name in ("pipeline", "tensor", "context", "expert"))
    replicate, shard = degree("data_parallel_replicate"), values.get("parallelism.data_parallel_shard_degree", -1)
    if shard == -1:
        shard = world_size // (replicate * pp * tp * cp)
    if replicate * shard * pp * tp * cp != world_size:
        raise UserError(f"--world-size = {world_size}: the degrees make {replicate * shard * pp * tp * cp} ranks")
    etp = 1 if ep > 1 else tp
    return {
        "pipeline_parallel": pp,
        "tensor_parallel": tp,
        "context_parallel": cp,
        "data_parallel": replicate * shard,
        "expert_parallel": ep,
        "expert_tensor_parallel": etp,
        "expert_data_parallel": replicate * shard * tp * cp // (ep * etp),
    }


def _read_strategy(values: dict[str, Any], world_size: int, num_layers: int, where: str) -> dict[str, Any]:
    degrees = _degrees(values, world_size)
    pp = degrees["pipeline_parallel"]
    parts = values.get("parallelism.module_fqns_per_model_part")
    split = tuple(sum(name.startswith("layers.") for name in part) for part in parts) if parts else ()
    if split and list(split) == [len(layers) for layers in split_layers(num_layers, len(split))]:
        virtual_stages, split = len(split) // pp, ()
    else:
        virtual_stages = max(1, len(split) // pp)
    schedule = _read_schedule(values, where) if pp > 1 else "1f1b"
    if not parts and pp > 1 and schedule not in ("1f1b", "gpipe"):
        virtual_stages = 2  # torchtitan's default for schedules with several chunks
    level = _read_level(values, pp)
    return degrees | {
        "virtual_stages": virtual_stages,
        "layer_split": split,
        "micro_batch_size": values.get("parallelism.pipeline_parallel_microbatch_size", 1)
        if pp > 1
        else values.get("training.local_batch_size", 8),
        "schedule": schedule,
        "recompute": "full" if values.get("activation_checkpoint") == "FullAC.Config" else "none",
        "zero_dense": level if degrees["data_parallel"] * degrees["context_parallel"] > 1 else 0,
        "zero_expert": level if degrees["expert_data_parallel"] > 1 else 0,
    }


def _read_schedule(values: dict[str, Any], where: str) -> str:
    names = {theirs.lower(): ours for ours, theirs in SCHEDULES.items()}
    theirs = values.get("parallelism.pipeline_parallel_schedule", "1F1B")
    ours = names.get(theirs.lower(), theirs)
    if file := values.get("parallelism.pipeline_parallel_schedule_csv"):
        ours = posixpath.splitext(posixpath.basename(file))[0]
    if ours not in SCHEDULE_NAMES:
        accepted = [*SCHEDULES.values(), *(f"{name}.csv" for name in SCHEDULE_NAMES if name not in SCHEDULES)]
        raise UserError(f"{where}: schedule {ours!r} is not known; accepted: {', '.join(accepted)}")
    return ours


def _read_level(values: dict[str, Any], pp: int) -> int:
    if values.get("parallelism.data_parallel_replicate_degree", 1) > 1:
        return 0
    policy = values.get("parallelism.fsdp_reshard_after_forward", "default")
    return 3 if policy == "always" or (policy == "default" and pp == 1) else 2
