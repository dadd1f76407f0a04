"""What all ranks of a trial share, whichever library they run: the byte matrix and a common instant to start at.

NumPy only, so that MPI ranks in another virtual environment can import it.
"""

from __future__ import annotations

import time

import numpy as np

STARTS = 4000
LEAD_SECONDS = 0.004  # between the announcement of the common start and the start


def byte_matrix(ranks: int, mean_bytes: int, zipf: float, seed: int = 0) -> np.ndarray:
    """Even (`zipf` = 0), or a popularity of destinations that falls as rank^-zipf, with noise per source."""
    if not zipf:
        return np.full((ranks, ranks), mean_bytes, dtype=np.int64)
    generator = np.random.RandomState(seed)
    popularity = 1 / np.arange(1, ranks + 1) ** zipf
    generator.shuffle(popularity)
    counts = np.zeros((ranks, ranks), dtype=np.int64)
    for source in range(ranks):
        share = popularity * generator.gamma(8, 1 / 8, ranks)
        counts[source] = np.round(share / share.sum() * ranks * mean_bytes / 64).astype(np.int64) * 64
    return counts


def repeats(mean_bytes: int) -> int:
    """Exchanges per timing: several where one is short."""
    return 10 if mean_bytes <= 1024 else 5 if mean_bytes <= 4096 else 3 if mean_bytes <= 16384 else 1


class Clock:
    """Times exchanges from one common instant to the end of the slowest rank. The machine has one monotonic clock."""

    def __init__(self, path: str, rank: int, ranks: int):
        self.table = np.memmap(path, dtype=np.float64, mode="r+", shape=(STARTS, ranks + 1))
        self.rank, self.ranks, self.row = rank, ranks, 0

    @staticmethod
    def create(path: str, ranks: int) -> None:
        np.zeros((STARTS, ranks + 1)).tofile(path)

    def seconds(self, exchange, barrier, times: int) -> float:
        """Seconds per exchange of the slowest rank (on rank 0; elsewhere nan)."""
        row, self.row = self.table[self.row], self.row + 1
        barrier()
        if self.rank == 0:
            row[self.ranks] = time.monotonic() + LEAD_SECONDS
        while not row[self.ranks]:
            time.sleep(0.0002)
        start = float(row[self.ranks])
        time.sleep(max(0.0, start - time.monotonic()))
        for _ in range(times):
            exchange()
        row[self.rank] = time.monotonic()
        barrier()
        return (row[: self.ranks].max() - start) / times if self.rank == 0 else float("nan")
