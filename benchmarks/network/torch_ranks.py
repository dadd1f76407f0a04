"""The torch ranks of a trial: forked into the hosts of the bed, gloo and exchange plans interleaved and timed."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.network import bed as network
from benchmarks.network.trial import Clock, byte_matrix, repeats
from pipermoe.exchange.executor import Exchange
from pipermoe.exchange.topology import Topology

CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000
PR_SET_SECUREBITS, NO_SETUID_FIXUP = 28, 4


def run(trial: dict, topology: Topology, measure: Callable[..., None] | None = None) -> dict:
    """What `measure` (else: all algorithms at all sizes) puts into its results on rank 0.

    Else {algorithm: {size: {"seconds": [...], "wire": bytes counted by the network, "exchanges": how many}}}.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        trial = {**trial, "folder": folder}
        Clock.create(f"{folder}/clock", topology.num_ranks)
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=_rank, args=(r, trial, topology, measure or _measure))
            for r in range(topology.num_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(trial["limit"])
        for process in ranks:
            if process.is_alive():
                process.kill()
        if any(process.exitcode for process in ranks):
            sys.exit(f"torch ranks ended with {[process.exitcode for process in ranks]}")
        return json.loads(Path(f"{folder}/result").read_text())


def _enter(host: int, local: int, nics: int) -> None:
    """This process becomes local rank `local` of `host`: namespace, host name, and the user whose route is its NIC."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{network.name_of(host)}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), "cannot enter the namespace")
    socket.sethostname(network.name_of(host))
    if nics > 1:
        libc.prctl(PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0)  # keep the right to open shared memory
        os.setresuid(*(network.FIRST_UID + local,) * 3)
    os.environ["GLOO_SOCKET_IFNAME"] = f"nic{local if nics > 1 else 0}"


def _rank(rank: int, trial: dict, topology: Topology, measure: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # one rank's complaints are enough
    os.nice(-15)
    _enter(topology.node[rank], int(topology.local_index[rank]), trial["nics"])
    os.umask(0)
    limit = timedelta(seconds=trial["limit"])
    place = f"file://{trial['folder']}/store"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=topology.num_ranks, timeout=limit)
    exchanges = {way: Exchange(topology=topology, timeout=trial["limit"], transport=way) for way in trial["transports"]}
    clock = Clock(f"{trial['folder']}/clock", rank, topology.num_ranks)
    results: dict = {name: {} for name in trial["algorithms"]}
    for size in trial["sizes"]:
        measure(rank, size, trial, exchanges, clock, results)
    if rank == 0:
        Path(f"{trial['folder']}/result").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)


def _measure(rank: int, size: int, trial: dict, exchanges: dict, clock: Clock, results: dict) -> None:
    counts = byte_matrix(dist.get_world_size(), size, trial["zipf"])
    data = torch.randint(0, 256, (int(counts[rank].sum()),), dtype=torch.uint8)
    outputs, calls = {}, {}
    for name in trial["algorithms"]:
        output = outputs[name] = torch.zeros(int(counts[:, rank].sum()), dtype=torch.uint8)
        if name == "gloo":
            splits = (counts[:, rank].tolist(), counts[rank].tolist()) if trial["zipf"] else (None, None)
            calls[name] = lambda output=output, splits=splits: dist.all_to_all_single(output, data, *splits)
        else:
            recipe, _, way = name.partition("@")
            exchange = exchanges[way or "auto"]
            builder, _, parameters = recipe.partition(":")
            options = {key: int(value) for key, value in (p.split("=") for p in parameters.split(",") if p)}
            plan = exchange.plan(counts, builder, **options)
            calls[name] = lambda output=output, plan=plan, ex=exchange: ex.run(plan, output, data)
    reference = torch.zeros_like(data.new_empty(int(counts[:, rank].sum())))
    dist.all_to_all_single(reference, data, counts[:, rank].tolist(), counts[rank].tolist())
    for name, call in calls.items():
        call()
        call()
        right = torch.tensor([torch.equal(outputs[name], reference)], dtype=torch.int64)
        dist.all_reduce(right, op=dist.ReduceOp.MIN)
        if not right.item():
            sys.exit(f"{name}: wrong bytes")
        results[name][str(size)] = {"seconds": [], "wire": 0, "exchanges": 0}
    for iteration in range(trial["iterations"]):
        names = list(calls)
        random.Random(iteration * 31 + size).shuffle(names)
        for name in names:
            dist.barrier()
            before = sum(network.counters()["down"]) if rank == 0 else 0
            seconds = clock.seconds(calls[name], dist.barrier, repeats(size))
            if rank == 0:
                entry = results[name][str(size)]
                entry["seconds"].append(seconds)
                entry["wire"] += sum(network.counters()["down"]) - before
                entry["exchanges"] += repeats(size)
