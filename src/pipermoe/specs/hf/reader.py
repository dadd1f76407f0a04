"""Typed access to the keys of one `config.json`; every error names the file, the key, the value and the rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.model import MAX_WIDTH

REQUIRED: Any = object()


class ConfigReader:
    """The keys of a config, or of one of its sections. `read` collects every key that was asked for."""

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self._data = data
        self._where = where
        self._prefix = prefix
        self.read: set[str] = set()

    def error(self, key: str, rule: str) -> UserError:
        """The error that `key` breaks `rule`; raise what this returns."""
        name = self._prefix + key
        if key not in self._data:
            return UserError(f"{self._where}: {name}: {rule}")
        value = self._data[key]
        shown = value if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
        return UserError(describe_value(self._where, name, shown, rule))

    def has(self, key: str) -> bool:
        """Whether `key` is there with a value other than null."""
        self.read.add(key)
        return self._data.get(key) is not None

    def keys(self) -> list[str]:
        return list(self._data)

    def raw(self, key: str) -> Any:
        self.read.add(key)
        return self._data.get(key)

    def size(self, key: str, default: Any = REQUIRED, *, zero: bool = False, limit: int = MAX_WIDTH) -> Any:
        """A whole number above zero (or `zero` itself); null and missing give `default` when there is one."""
        value = self._value(key, default)
        if value is default:
            return default
        return self._check_size(key, value, zero, limit)

    def uniform_size(self, key: str, default: Any = REQUIRED, *, limit: int = MAX_WIDTH) -> Any:
        """A size, or a list that gives the same size for every layer."""
        value = self._value(key, default)
        if not isinstance(value, list):
            return self.size(key, default, limit=limit)
        if not value or any(item != value[0] for item in value):
            raise self.error(key, "differs from layer to layer, which is not priced yet; one size for all is accepted")
        return self._check_size(key, value[0], False, limit)

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A finite number above zero."""
        value = self._value(key, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(key, "must be a number above zero")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def choice(self, key: str, options: tuple[str, ...], default: str) -> str:
        value = self._value(key, default)
        if value not in options:
            raise self.error(key, f"must be one of {', '.join(options)}")
        return value

    def layer_list(self, key: str, num_layers: int) -> tuple[int, ...]:
        """Indices of layers, each below `num_layers`; null is none."""
        value = self._value(key, [])
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise self.error(key, "must be a list of layer numbers")
        if any(not 0 <= layer < num_layers for layer in value):
            raise self.error(key, f"must name layers from 0 to {num_layers - 1}")
        return tuple(sorted(set(value)))

    def per_layer(self, key: str, num_layers: int, options: tuple[Any, ...]) -> list[Any] | None:
        """A list with one of `options` for every layer, or None when null or missing."""
        value = self._value(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < num_layers:
            raise self.error(key, f"must be a list with an entry for each of the {num_layers} layers")
        wrong = [item for item in value if item not in options]
        if wrong:
            raise self.error(key, f"has the entry {wrong[0]!r}; accepted: {', '.join(map(str, options))}")
        return value[:num_layers]

    def section(self, key: str) -> ConfigReader:
        """The nested table `key`."""
        value = self._value(key, REQUIRED)
        if not isinstance(value, dict):
            raise self.error(key, "must be a table of keys and values")
        return ConfigReader(value, self._where, f"{self._prefix}{key}.")

    def require(self, key: str, value: Any, reason: str) -> None:
        """Refuse a config whose `key` says something else than `value`; missing is as `value`."""
        if self._value(key, value) != value:
            raise self.error(key, reason)

    def _value(self, key: str, default: Any) -> Any:
        self.read.add(key)
        value = self._data.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise self.error(key, "required key is missing" if key not in self._data else "must be given")
        return default

    def _check_size(self, key: str, value: Any, zero: bool, limit: int) -> int:
        least = 0 if zero else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"must be a whole number of at least {least}")
        if value > limit:
            raise self.error(key, f"must be at most {limit:,}")
        return value
