"""What the resource model can price, as an error a user can act on."""

from __future__ import annotations

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.train import TrainConfig


def require_priced(model: ModelSpec, platform: Platform, train: TrainConfig, world_size: int) -> None:
    """The platform must describe as many ranks and the precision."""
    limit = platform.levels[-1].ranks
    if not 1 <= world_size <= limit:
        raise UserError(
            describe_value("", "ranks", world_size, f"platform {platform.name} describes 1 to {limit} ranks")
        )
    if train.precision not in platform.device.gemm:
        rule = f"platform {platform.name} has rates for {', '.join(platform.device.gemm)}"
        raise UserError(describe_value("", "train.precision", train.precision, rule))
