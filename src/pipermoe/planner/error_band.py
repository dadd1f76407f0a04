"""By how much predicted steps are known to be off on a class of machines: below that, strategies tie."""

from __future__ import annotations

from functools import cache
from importlib import resources

from pydantic import Field

from pipermoe.planner.result import ErrorBand
from pipermoe.specs.base import Frozen
from pipermoe.specs.documents import load
from pipermoe.specs.platform import Platform


class _Class(Frozen):
    """Machines whose device's name begins with one of `devices`, on one node, on several, or (not said) on either."""

    devices: tuple[str, ...] = ()
    several_nodes: bool | None = None
    error: float = Field(gt=0)
    source: str


class _Bands(Frozen):
    bands: tuple[_Class, ...]


def error_band(platform: Platform, world_size: int) -> ErrorBand:
    """The band of the class that `world_size` ranks of `platform` belong to (catalogue/validation/bands.toml)."""
    several = world_size > platform.host.ranks
    found = next(
        each
        for each in _bands()
        if platform.device.name.startswith(each.devices or "") and each.several_nodes in (None, several)
    )
    return ErrorBand(error=found.error, source=found.source)


@cache
def _bands() -> tuple[_Class, ...]:
    with resources.as_file(resources.files("pipermoe") / "catalogue" / "validation" / "bands.toml") as path:
        return load(path, _Bands).bands
