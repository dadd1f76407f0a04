"""Resolve what a user calls a machine to a Platform: a catalogue name, or a file whose parts may name entries.

In a platform file `device` may be the name of an entry of catalogue/devices, or a table with `base = NAME` and what
differs; a device's `curves` names an entry of catalogue/curves, whose rates its `scale` multiplies (a table of curve
and factor); a link's `collectives` names one of catalogue/collectives.
An entry brings its own `evidence`, which moves to the platform under the entry's key.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

from pipermoe.specs.catalogue import looks_like_a_path, names_in, unknown_name
from pipermoe.specs.documents import load_mapping, validate
from pipermoe.specs.errors import UserError, describe_value, either
from pipermoe.specs.platform import Platform

Table = dict[str, Any]
CURVES = ("gemm", "grouped_gemm", "attention", "attention_backward", "memory_bound")


def load_platform(reference: str) -> Platform:
    """The machine that `reference` names: a name of catalogue/platforms, a TOML or a JSON file. Raises `UserError`."""
    if reference.lower() in platform_names():
        return validate(_resolved(_entry("platforms", reference, "")), Platform, where=f"{reference.lower()}.toml")
    if not looks_like_a_path(reference) and not Path(reference).exists():
        raise UserError(unknown_name(reference, platform_names(), "platform", files="a .toml or .json file"))
    try:
        table = _resolved(load_mapping(reference))
    except UserError as error:
        where = "" if str(error).startswith(f"{reference}:") else f"{reference}: "
        raise UserError(f"{where}{error}") from None
    return validate(table, Platform, where=reference)


def platform_names() -> list[str]:
    """The names of the machines in the catalogue, sorted."""
    return names_in("platforms")


def _resolved(platform: Table) -> Table:
    """The platform with every entry that it names put in its place."""
    evidence: Table = {}
    device = platform.get("device")
    if isinstance(device, str):
        device = {"base": device}
    if isinstance(device, dict):
        if "base" in device:
            device = _merged(_entry("devices", device["base"], "device.base"), _without(device, "base"))
        if "curves" in device:
            curves = _entry("curves", device["curves"], "device.curves")
            device = _merged(_supported(curves, device), _without(device, "curves"))
        device = _scaled(device)
        evidence |= _keyed("device", device.pop("evidence", {}))
        platform = platform | {"device": device}
    levels = platform.get("levels")
    if isinstance(levels, list):
        platform = platform | {"levels": [_level(level, evidence) for level in levels]}
    return platform | {"evidence": evidence | platform.get("evidence", {})}


def _level(level: Any, evidence: Table) -> Any:
    link = level.get("link") if isinstance(level, dict) else None
    if not isinstance(link, dict) or not isinstance(link.get("collectives"), str):
        return level
    key = f"levels.{level.get('name')}.link.collectives"
    collectives = _entry("collectives", link["collectives"], key)
    evidence[key] = collectives.pop("evidence", None)
    return level | {"link": link | {"collectives": collectives}}


def _supported(curves: Table, device: Table) -> Table:
    """The curves of the precisions for which the device names a peak."""
    peaks = device.get("peak_flops_per_s", {})
    return {
        key: {precision: curve for precision, curve in table.items() if precision in peaks} if key in CURVES else table
        for key, table in curves.items()
    }


def _scaled(device: Table) -> Table:
    """The device with the rates of each curve in its `scale` multiplied."""
    factors = device.pop("scale", {})
    for curve, factor in factors.items():
        if curve not in device or not isinstance(factor, int | float) or factor <= 0:
            rule = f"must be a curve of the device with a positive factor; curves: {', '.join(CURVES)}"
            raise UserError(describe_value("", f"device.scale.{curve}", factor, rule))
    return device | {curve: _times(device[curve], factor) for curve, factor in factors.items()}


def _times(value: Any, factor: float) -> Any:
    """Every list of rates inside `value` times `factor`."""
    if isinstance(value, list):
        return [_times(each, factor) for each in value]
    if isinstance(value, dict):
        return {
            key: [rate * factor for rate in each] if key == "rate" else _times(each, factor)
            for key, each in value.items()
        }
    return value


def _entry(kind: str, name: Any, key: str) -> Table:
    names = names_in(kind)
    if not isinstance(name, str) or name.lower() not in names:
        close = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.5)
        rule = f"must be an entry of catalogue/{kind}; did you mean {either(close or names)}?"
        raise UserError(describe_value("", key, name, rule))
    with resources.as_file(resources.files("pipermoe") / "catalogue" / kind / f"{name.lower()}.toml") as path:
        return load_mapping(path)


def _merged(base: Table, over: Table) -> Table:
    """`over` on top of `base`, table by table; anything but two tables is replaced."""
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over.keys() if _tables(base[key], over[key])}
    return base | over | both


def _tables(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _without(table: Table, key: str) -> Table:
    return {name: value for name, value in table.items() if name != key}


def _keyed(prefix: str, evidence: Any) -> Table:
    return {f"{prefix}.{key}": found for key, found in evidence.items()} if isinstance(evidence, dict) else {}
