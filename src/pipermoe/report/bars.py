"""Bars of block characters."""

from __future__ import annotations

BAR = 30  # cells of the longest bar


def bar(share: float, cells: int = BAR) -> str:
    """A bar of `share` of `cells` cells, to the eighth: never empty, so that what exists is seen."""
    eighths = max(1, round(share * cells * 8))
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
