"""SoftwareProfile: what a training stack makes of a device and a network, as factors on their rates."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import TypeVar

import numpy as np
from pydantic import PositiveFloat

from pipermoe.specs.base import Frozen
from pipermoe.specs.catalogue import names_in, unknown_name
from pipermoe.specs.device import Device, GroupedCurve, RateCurve
from pipermoe.specs.documents import load
from pipermoe.specs.errors import UserError
from pipermoe.specs.network import CollectiveRate, Level
from pipermoe.specs.platform import Platform
from pipermoe.specs.precision import Precision
from pipermoe.specs.units import Seconds

Curve = TypeVar("Curve", bound=RateCurve)


class SoftwareProfile(Frozen):
    """Factors on a platform's rates, fitted on the published runs that `fitted_on` names (ids of rows).

    - `products`: on matrix products and attention, per precision (fp8: casting and scaling included).
    - `memory_bound`: on element-wise work: above 1 where fusion saves passes, below where kernels are slow.
    - `exchange`: on the all-to-all of the library, beyond what a dispatcher saves by sending a token once.
    - `product_per_expert`: experts' products are dense ones in turn, not one grouped kernel (`product_per_expert`).
    - `issue_seconds`: the host's time to issue one layer in one direction (`Device.issue_seconds`).
    """

    name: str
    description: str = ""
    products: dict[Precision, PositiveFloat]
    memory_bound: PositiveFloat = 1.0
    exchange: PositiveFloat = 1.0
    product_per_expert: bool = False
    issue_seconds: Seconds = 0.0
    fitted_on: tuple[str, ...] = ()


def load_software(name: str) -> SoftwareProfile:
    """The profile of catalogue/software with this name. Raises `UserError`."""
    names = names_in("software")
    if name not in names:
        raise UserError(unknown_name(name, names, "software"))
    with resources.as_file(resources.files("pipermoe") / "catalogue" / "software" / f"{name}.toml") as path:
        return load(path, SoftwareProfile)


def under(
    platform: Platform, software: SoftwareProfile, dispatch: Mapping[str, CollectiveRate] | None = None
) -> Platform:
    """The platform as this software uses it: the same machine with other rates.

    `dispatch` gives per level what the stack's own dispatcher makes of the link, in place of the library's all-to-all.
    """
    rates = dispatch or {}
    levels = tuple(_exchanging(level, rates.get(level.name), software.exchange) for level in platform.levels)
    return platform.model_copy(update={"device": _computing(platform.device, software), "levels": levels})


def _computing(device: Device, software: SoftwareProfile) -> Device:
    def products(curves):
        return {precision: _times(curve, software.products.get(precision, 1.0)) for precision, curve in curves.items()}

    grouped = {
        precision: tuple(_times(curve, software.products.get(precision, 1.0)) for curve in curves)
        for precision, curves in device.grouped_gemm.items()
    }
    return device.model_copy(
        update={
            "gemm": products(device.gemm),
            "grouped_gemm": grouped,
            "attention": products(device.attention),
            "attention_backward": products(device.attention_backward),
            "memory_bound": _times(device.memory_bound, software.memory_bound),
            "issue_seconds": max(device.issue_seconds, software.issue_seconds),
        }
    )


def _exchanging(level: Level, rate: CollectiveRate | None, factor: float) -> Level:
    if level.link is None or "all_to_all" not in level.link.collectives:
        return level
    faster = _times(rate or level.link.collectives["all_to_all"], factor)
    link = level.link.model_copy(update={"collectives": level.link.collectives | {"all_to_all": faster}})
    return level.model_copy(update={"link": link})


def _times(curve: Curve, factor: float) -> Curve:
    return curve.model_copy(update={"rate": tuple(rate * factor for rate in curve.rate)})


def product_per_expert(platform: Platform, hidden_size: int, width: int) -> Platform:
    """The platform where every expert's product is a dense one of its own: its rate is `gemm`'s at its FLOPs.

    So Transformer Engine's GroupedLinear runs them, on several streams over cuBLAS (docs of TE 2, GroupedLinear).
    """
    device = platform.device
    rows = tuple(2.0**n for n in range(4, 18))
    sizes = np.log([2 * count * hidden_size * width for count in rows])
    grouped = {}
    for precision, curve in device.gemm.items():
        rates = np.interp(sizes, np.log(curve.size), curve.rate).tolist()
        grouped[precision] = (GroupedCurve(width=width, size=rows, rate=tuple(rates)),)
    return platform.model_copy(update={"device": device.model_copy(update={"grouped_gemm": grouped})})
