"""Megatron-LM's arguments as a dialect: read into a model, a job and a strategy, and written from them."""

from __future__ import annotations

from pipermoe.specs.configuration import Configuration
from pipermoe.specs.errors import UserError
from pipermoe.specs.megatron.arguments import Arguments
from pipermoe.specs.megatron.model import read_model, unsupported_parts, write_model
from pipermoe.specs.megatron.options import VERSION
from pipermoe.specs.megatron.strategy import read_strategy, write_strategy
from pipermoe.specs.megatron.train import read_train, write_train
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

__all__ = ["VERSION", "Arguments", "read_configuration", "unsupported_parts", "write_arguments"]

# What Megatron takes from elsewhere, or trains a dense model without.
REQUIRED = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_experts"),
    *("seq_length", "global_batch_size", "micro_batch_size"),
)


def write_arguments(model: ModelSpec, train: TrainConfig, strategy: Strategy) -> Arguments:
    """The arguments of a run. Nothing that Megatron cannot express may be asked (export/megatron.py)."""
    given = write_model(model) | write_train(train) | write_strategy(strategy, model)
    return Arguments({name: value for name, value in given.items() if value is not None})


def read_configuration(arguments: Arguments, world_size: int, name: str = "megatron") -> Configuration:
    """What a run with `arguments` on `world_size` ranks does. UserError where the arguments say nothing legal."""
    missing = [f"--{key.replace('_', '-')}" for key in REQUIRED if arguments[key] is None]
    if arguments["vocab_size"] is None and arguments["padded_vocab_size"] is None:
        missing.append("--vocab-size")
    if missing:
        raise UserError(f"Megatron arguments: {', '.join(missing)} must be given")
    model = read_model(arguments, name)
    strategy, remarks = read_strategy(arguments, world_size, model.num_layers)
    train = read_train(arguments)
    return Configuration(model=model, train=train, strategy=strategy, remarks=tuple(remarks))
