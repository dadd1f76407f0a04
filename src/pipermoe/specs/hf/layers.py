"""Which layers are dense instead of a mixture of experts: every dialect's rule as a tuple of dense layers."""

from __future__ import annotations

from pipermoe.specs.hf.reader import ConfigReader
from pipermoe.specs.model import MAX_LAYERS


def count(config: ConfigReader, key: str = "num_hidden_layers") -> int:
    """How many layers there are, within what any model has: every rule below walks over them."""
    return config.size(key, limit=MAX_LAYERS)


def listed(config: ConfigReader, num_layers: int) -> tuple[int, ...] | None:
    """`mlp_layer_types` (transformers 5): "dense" or "sparse" for every layer; None without it."""
    types = config.per_layer("mlp_layer_types", num_layers, ("dense", "sparse"))
    return None if types is None else tuple(layer for layer, kind in enumerate(types) if kind == "dense")


def leading(config: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """DeepSeek: the first `first_k_dense_replace` layers, and those that `moe_layer_freq` leaves out."""
    first = config.size("first_k_dense_replace", 0, zero=True)
    every = config.size("moe_layer_freq", 1)
    by_rule = tuple(layer for layer in range(num_layers) if layer < first or layer % every)
    by_list = listed(config, num_layers)
    return by_rule if by_list is None else by_list


def sparse_step(config: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Qwen: all but every `decoder_sparse_step`-th layer, and `mlp_only_layers`."""
    step = config.size("decoder_sparse_step", 1)
    always = config.layer_list("mlp_only_layers", num_layers)
    return tuple(layer for layer in range(num_layers) if layer in always or (layer + 1) % step)


def interleaved(config: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Llama 4: all but `moe_layers`, or but every `interleave_moe_layer_step`-th layer."""
    if config.has("moe_layers"):
        sparse = config.layer_list("moe_layers", num_layers)
    else:
        step = config.size("interleave_moe_layer_step", 1)
        sparse = tuple(range(step - 1, num_layers, step))
    return tuple(layer for layer in range(num_layers) if layer not in sparse)


def interval(config: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """ERNIE: all but every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`."""
    start = config.size("moe_layer_start_index", 1, zero=True)
    last = num_layers - 1 if config.raw("moe_layer_end_index") in (None, -1) else config.size("moe_layer_end_index")
    every = config.size("moe_layer_interval", 1)
    return tuple(layer for layer in range(num_layers) if not start <= layer <= last or (layer + 1) % every)


def every(config: ConfigReader, key: str, num_layers: int) -> tuple[int, ...]:
    """Arctic: all but every `key`-th layer."""
    step = config.size(key, 1)
    return tuple(layer for layer in range(num_layers) if (layer + 1) % step)
