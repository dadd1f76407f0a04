"""Plans on real gloo processes: bitwise equal to torch's all_to_all_single, differentiable, and never hanging."""

import glob
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.distributed.harness import run_ranks

from pipermoe import exchange as api
from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.executor import Exchange
from pipermoe.exchange.executor.process_group import DeviceTransport
from pipermoe.exchange.plan import byte_matrix
from pipermoe.exchange.topology import Topology
from pipermoe.specs.errors import MachineError, UserError

pytestmark = pytest.mark.distributed
TRANSPORTS = ("auto", "python", "process_group")
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float16)
SHAPES = {  # ranks: topologies that pretend that they are several nodes; all share this machine's memory
    1: (Topology.even(1),),
    3: (Topology.even(3), Topology(node=(0, 1, 0), nic=(0, 0, 1), group=(0, 0))),
    4: (Topology.even(2, 2, nics_per_node=2), Topology.even(4, groups=2), Topology.even(1, 4)),
    6: (Topology(node=(0, 0, 0, 1, 2, 2), nic=(0, 1, 1, 0, 0, 1), group=(0, 1, 1)),),
}


def random_rows(generator, size):
    """Rows from source to destination: some zero, some ranks empty."""
    rows = generator.integers(0, 9, (size, size)) * (generator.random((size, size)) < 0.7)
    if generator.random() < 0.5:
        rows[generator.integers(size)] = 0
    if generator.random() < 0.5:
        rows[:, generator.integers(size)] = 0
    return rows


def bits(x):
    """[rows, bytes of a row]"""
    width = int(np.prod(x.shape[1:])) * x.element_size()
    return x.reshape(-1).view(torch.uint8).reshape(len(x), width)


def vendor(x, rows, rank, group=None):
    sent = bits(x)
    received = torch.empty(int(rows[:, rank].sum()), sent.shape[1], dtype=torch.uint8)
    dist.all_to_all_single(received, sent, rows[:, rank].tolist(), rows[rank].tolist(), group=group)
    return received


def random_tensor(rows, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, (rows, width), generator=generator).to(dtype)


def every_builder_many_cases(rank, cases):
    size = dist.get_world_size()
    exchanges = [Exchange(topology=topology, transport=way) for topology in SHAPES[size] for way in TRANSPORTS]
    for case in range(cases):
        generator = np.random.default_rng(case)
        rows, dtype = random_rows(generator, size), DTYPES[case % len(DTYPES)]
        x = random_tensor(int(rows[rank].sum()), int(generator.integers(1, 6)), dtype, seed=100 * case + rank)
        want = vendor(x, rows, rank)
        for name in BUILDERS:  # back to back, no barriers, all exchanges of the group mixed
            for exchange in exchanges:
                plan = exchange.plan(rows * x.shape[1] * x.element_size(), name)
                output = x.new_empty(int(rows[:, rank].sum()), x.shape[1])
                exchange.run(plan, output, x)
                assert torch.equal(bits(output), want), (case, name)
    return len(exchanges)


@pytest.mark.parametrize("size", SHAPES)
def test_every_builder_is_bitwise_equal_to_the_vendor(size):
    assert set(run_ranks(every_builder_many_cases, size, 5)) == {len(TRANSPORTS) * len(SHAPES[size])}


def gradients(rank, name, way):
    topology = Topology.even(2, 2, nics_per_node=2)
    exchange = Exchange(topology=topology, transport=way)
    rows = np.array([[1, 2, 0, 3], [0, 0, 4, 1], [2, 2, 2, 2], [0, 5, 0, 1]])
    x = random_tensor(int(rows[rank].sum()), 3, torch.float64, rank).requires_grad_()
    y = api.all_to_all(x, rows, name, exchange)
    weight = torch.arange(float(y.numel()), dtype=torch.float64).reshape(y.shape) + 1000 * rank
    (y * weight).sum().backward()
    back = vendor(weight, rows.T, rank)
    assert x.grad is not None
    return torch.equal(bits(x.grad), back)


@pytest.mark.parametrize(
    ("name", "way"), [("hierarchical", "auto"), ("nic_balanced", "python"), ("log_step", "process_group")]
)
def test_backward_sends_the_gradients_back_the_way_the_rows_came(name, way):
    assert all(run_ranks(gradients, 4, name, way))


def in_subgroups(rank):
    odd, even = dist.new_group([1, 3]), dist.new_group([2, 0])
    group = odd if rank % 2 else even
    assert isinstance(group, dist.ProcessGroup)
    member = group.rank()
    rows = np.array([[2, 1], [0, 3]])
    x = random_tensor(int(rows[member].sum()), 2, torch.float32, rank)
    want = vendor(x, rows, member, group)
    outputs, handles = [torch.empty(int(rows[:, member].sum()), 2) for _ in range(4)], []
    for output in outputs:
        splits = rows[:, member].tolist(), rows[member].tolist()
        handles.append(api.all_to_all_single(output, x, *splits, group=group, async_op=True))
    for handle in reversed(handles):
        handle.wait()
    return [torch.equal(bits(output), want) for output in outputs] + [handles[0].is_completed()]


def test_the_drop_in_works_inside_process_groups_and_in_the_background():
    assert run_ranks(in_subgroups, 4) == [[True] * 5] * 4


def even_drop_in(rank):
    x, output = torch.arange(12.0).reshape(6, 2) + 100 * rank, torch.empty(6, 2)
    assert api.all_to_all_single(output, x) is None
    want = torch.empty(6, 2)
    dist.all_to_all_single(want, x)
    return torch.equal(output, want)


def test_the_drop_in_divides_evenly_without_splits():
    assert all(run_ranks(even_drop_in, 3))


def world():
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def levels_on_gloo(rank):
    topology, size = Topology.even(2, 2), 4
    rows = np.array([[1, 2, 0, 3], [0, 0, 4, 1], [2, 2, 2, 2], [0, 5, 0, 1]])
    agreed = []
    for name, builder in BUILDERS.items():
        plan = builder(byte_matrix(rows * 8), topology)
        x = random_tensor(int(rows[rank].sum()), 1, torch.int64, rank)
        output, staging = (
            torch.empty(int(rows[:, rank].sum()), 1, dtype=torch.int64),
            torch.empty(4096, dtype=torch.uint8),
        )
        transport = DeviceTransport(world())
        transport.run(transport.prepare(plan), [bits(x).view(-1), bits(output).view(-1), staging])
        agreed.append(torch.equal(bits(output), vendor(x, rows, rank)) or name)
    return agreed, size


def test_level_by_level_execution_as_for_nccl_gives_the_same_bytes():
    assert all(agreed == [True] * len(BUILDERS) for agreed, _ in run_ranks(levels_on_gloo, 4))


def bad_arguments(rank, kind):
    x, output, splits = torch.zeros(4, 2), torch.zeros(4, 2), ([2, 2], [2, 2])
    if rank == 1:
        if kind == "sum":
            splits = ([2, 2], [2, 1])
        if kind == "dtype":
            x, output = x.double(), output.double()
        if kind == "contiguous":
            x = torch.zeros(2, 4).T
        if kind == "unmatched":
            splits = ([1, 3], [2, 2])
        if kind == "length":
            splits = ([2, 2], [4])
        if kind == "negative":
            splits = ([2, 2], [5, -1])
        if kind == "mixed":
            output = output.double()
    try:
        api.all_to_all_single(output, x, *splits)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("sum", "rank 1: input_split_sizes sums to 3, but input has 4 rows"),
        ("dtype", "dtype differs: torch.float32 on rank 0, torch.float64 on rank 1"),
        ("contiguous", "rank 1: input must be contiguous; call .contiguous() first"),
        ("unmatched", "rank 0 sends 2 rows to rank 1, which expects 1"),
        ("length", "rank 1: input_split_sizes has 1 entries for 2 ranks"),
        ("negative", "rank 1: input_split_sizes = [5, -1]: must be 0 or more"),
        ("mixed", "rank 1: input is torch.float32, output is torch.float64: must be the same"),
    ],
)
def test_wrong_arguments_on_one_rank_are_the_same_error_on_all(kind, problem):
    assert run_ranks(bad_arguments, 2, kind) == [f"all_to_all: {problem}"] * 2


def missing_rank(rank, way):
    group = dist.new_group(range(4))  # of its own: gloo closes the connections of a group that has timed out
    assert isinstance(group, dist.ProcessGroup)
    exchange = Exchange(group, Topology.even(2, 2), timeout=1.0, transport=way)
    if rank == 3:
        return "absent", os.getpid()
    try:
        api.all_to_all_single(torch.empty(4), torch.zeros(4), exchange=exchange)
    except MachineError as error:
        return str(error), os.getpid()


@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_missing_rank_is_an_error_on_all_others_not_a_hang(way):
    answers = run_ranks(missing_rank, 4, way)
    assert all(answers), answers
    assert not glob.glob("/dev/shm/pipermoe-*")


def test_importing_the_package_does_not_load_torch():
    import subprocess
    import sys

    code = "import sys, pipermoe.exchange, pipermoe.exchange.builders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
