"""What collectives and messages cost the cores of a host whose ranks share them.

Such a host has no link beside its cores: bytes are copied and threads are woken by the cores that compute. So a
collective that was measured at t seconds while all ranks took part is t x `Host.rank_share` of work for each of them,
which competes with the computing of others; only what goes to other hosts is waited for without a core.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.platform import Platform
from pipermoe.specs.spread import Spread


def carried_share(platform: Platform, group: Spread) -> NDArray[np.float64]:
    """Seconds of a core for each second of a group's collective.

    0 where ranks have cores (or devices) of their own, and where groups reach other hosts. Broadcasts.
    """
    host, span = platform.host, np.asarray(group.span)
    inside = (span <= host.ranks) & (host.ranks % span == 0)
    return np.where(inside & (host.rank_share < 1), host.rank_share, 0.0)


def meeting_work(platform: Platform, group_size: Any) -> NDArray[np.float64]:
    """Seconds of a core that a rank spends on coming together with the others of a group; 0 in a group of one.

    What `Host.meeting_seconds` lasts while all ranks meet, at a rank's share of the cores. Broadcasts.
    """
    sizes = np.asarray(group_size)
    host, listed = platform.host, sorted(platform.host.meeting_seconds)
    if host.rank_share == 1 or not listed:
        return np.zeros(sizes.shape)
    lasted = np.array([host.meeting_seconds[size] for size in listed])
    nearest = np.minimum(np.searchsorted(listed, sizes), len(listed) - 1)
    return np.where(sizes > 1, host.rank_share * lasted[nearest], 0.0)
