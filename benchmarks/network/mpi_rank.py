"""One MPI rank of a trial: MPI_Alltoall (even) or MPI_Alltoallv (skewed), timed. Started under mpirun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).parent))
from trial import Clock, byte_matrix, repeats


def main() -> None:
    trial = json.loads(sys.argv[1])
    world = MPI.COMM_WORLD
    rank, ranks = world.rank, world.size
    clock = Clock(trial["clock"], rank, ranks)
    results: dict[str, list[float]] = {}
    for mean_bytes in trial["sizes"]:
        counts = byte_matrix(ranks, mean_bytes, trial["zipf"])
        sent, received = counts[rank].copy(), counts[:, rank].copy()
        before = [np.concatenate([[0], np.cumsum(column)[:-1]]) for column in (sent, received)]
        data = np.random.RandomState(rank).randint(0, 256, int(sent.sum()), dtype=np.uint8)
        output = np.zeros(int(received.sum()), dtype=np.uint8)

        def exchange(data=data, output=output, sent=sent, received=received, before=before, m=mean_bytes):
            if trial["zipf"]:
                world.Alltoallv([data, sent, before[0], MPI.BYTE], [output, received, before[1], MPI.BYTE])
            else:
                world.Alltoall([data, m, MPI.BYTE], [output, m, MPI.BYTE])

        exchange()
        exchange()
        seconds = [clock.seconds(exchange, world.Barrier, repeats(mean_bytes)) for _ in range(trial["iterations"])]
        results[str(mean_bytes)] = seconds
    if rank == 0:
        Path(trial["result"]).write_text(json.dumps(results))


main()
