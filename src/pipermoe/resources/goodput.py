"""How much of the time a long run makes progress: checkpoints cost time, failures cost what came after the last one."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reliability:
    """What interrupts a run and what it costs; seconds, bytes per second.

    - `device_mtbf_seconds`: mean time between failures of one device with its share of the machine. Default: 419
      interruptions in 54 days on 16,384 H100 (Llama 3, arXiv 2407.21783, section 3.3.4).
    - `checkpoint_bytes_per_s`: what one rank writes. `restart_seconds`: from a failure to the next step. Both assumed.
    """

    device_mtbf_seconds: float = 16_384 * 54 * 86_400 / 419
    checkpoint_bytes_per_s: float = 1e9
    restart_seconds: float = 600.0

    def mtbf_seconds(self, world_size: int) -> float:
        """Of the whole job: any device's failure ends a step."""
        return self.device_mtbf_seconds / world_size


def checkpoint_interval(checkpoint_seconds: float, mtbf_seconds: float) -> float:
    """The interval that loses least, sqrt(2 x checkpoint x MTBF) (Young, CACM 17(9), 1974)."""
    return math.sqrt(2 * checkpoint_seconds * mtbf_seconds)


def goodput(checkpoint_seconds: float, mtbf_seconds: float, restart_seconds: float) -> float:
    """The share of time that is progress at that interval.

    Each interval also writes a checkpoint, and each failure costs half an interval and the restart (Daly, FGCS 22(3),
    2006, first order).
    """
    interval = checkpoint_interval(checkpoint_seconds, mtbf_seconds)
    writing = checkpoint_seconds / interval if interval else 0.0
    repeating = (interval / 2 + restart_seconds) / mtbf_seconds
    return 1 / (1 + writing + repeating)
