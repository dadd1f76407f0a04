"""Plans on real gloo processes: bitwise equal to torch's all_to_all_single, differentiable, and never hanging."""

import glob
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.distributed.harness import run_ranks
from tests.exchange.live_ranks import LiveRanks

from pipermoe import exchange as api
from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.executor import Exchange
from pipermoe.exchange.executor.process_group import DeviceTransport
from pipermoe.exchange.host import native
from pipermoe.exchange.plan import byte_matrix
from pipermoe.exchange.topology import Topology
from pipermoe.specs.errors import MachineError, UserError

pytestmark = pytest.mark.distributed
TRANSPORTS = ("auto", "sockets", "python", "process_group")
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float16)
SHAPES = {  # ranks: topologies that pretend that they are several nodes; all share this machine's memory
    1: (Topology.even(1),),
    3: (Topology.even(3), Topology(node=(0, 1, 0), nic=(0, 0, 1), group=(0, 0))),
    4: (Topology.even(2, 2, nics_per_node=2), Topology.even(4, groups=2), Topology.even(1, 4)),
    6: (Topology(node=(0, 0, 0, 1, 2, 2), nic=(0, 1, 1, 0, 0, 1), group=(0, 1, 1)),),
}


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


MEMBERS = ((0,), (0, 2, 5), (1, 2, 3, 4), (0, 1, 2, 3, 4, 5))


def serve(rank):
    """A rank that exchanges whatever it is told to, with every builder and transport, until it is told nothing."""
    exchanges = {}
    for members in MEMBERS:
        group = dist.new_group(members)
        if rank in members and isinstance(group, dist.ProcessGroup):
            for topology in SHAPES[len(members)]:
                ways = [Exchange(group, topology, transport=way, timeout=30) for way in TRANSPORTS]
                exchanges[members, topology] = ways

    def exchange_all(members, topology, rows, width, dtype):
        """The builders, with transports, whose bytes differ from the library's."""
        ways = exchanges[members, topology]
        mine = ways[0].rank
        x = random_tensor(int(rows[mine].sum()), width, dtype, seed=rank)
        want = vendor(x, rows, mine, ways[0].group)
        wrong = []
        for name in BUILDERS:  # back to back, no barriers, all exchanges of the group mixed
            for exchange in ways:
                plan = exchange.plan(rows * x.shape[1] * x.element_size(), name)
                output = x.new_empty(int(rows[:, mine].sum()), x.shape[1])
                exchange.run(plan, output, x)
                if not torch.equal(bits(output), want):
                    wrong.append((name, exchange.transport.name))
        return wrong

    return exchange_all


@pytest.fixture(scope="module")
def live():
    with LiveRanks(serve, 6) as ranks:
        yield ranks


@st.composite
def exchanges(draw):
    members = draw(st.sampled_from(MEMBERS))
    size = len(members)
    row = st.lists(st.just(0) | st.integers(1, 9), min_size=size, max_size=size)
    rows = np.array(draw(st.lists(row | st.just([0] * size), min_size=size, max_size=size)), dtype=np.int64)
    width = draw(st.integers(1, 5) | st.just(4001))
    return members, draw(st.sampled_from(SHAPES[size])), rows, width, draw(st.sampled_from(DTYPES))


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=exchanges())
def test_every_builder_and_transport_is_bitwise_equal_to_the_library_in_every_group(live, case):
    assert live.ask(case[0], *case) == [[]] * len(case[0])


def one_way(rank, way):
    """Rank 0 may run ahead of its reader as far as it likes, through memory (to 1) and over sockets (to 2)."""
    exchange = Exchange(topology=Topology.even(2, 2), transport=way, timeout=30)
    counts = np.zeros((4, 4), dtype=np.int64)
    counts[0, 1:3] = 40_000, 50_000
    plan = exchange.plan(counts, "direct")
    right = []
    for number in range(30):
        sent = torch.full((int(counts[rank].sum()),), number, dtype=torch.uint8)
        received = torch.zeros(int(counts[:, rank].sum()), dtype=torch.uint8)
        exchange.run(plan, received, sent)
        right.append(bool((received == number).all()))
    return all(right), exchange.transport.name


@pytest.mark.parametrize(("way", "name"), [("auto", "native"), ("python", "python")])
def test_a_sender_that_runs_ahead_overwrites_nothing(way, name):
    if name == "native" and not native.build():
        pytest.skip("needs a C compiler")
    assert run_ranks(one_way, 4, way) == [(True, name)] * 4


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


def fill_and_destroy_groups(rank: int) -> list[int]:
    """How many files of exchanges are open after one group of two ranks, and after three more."""
    found = []
    for _ in range(4):
        group = dist.new_group([0, 1])
        assert isinstance(group, dist.ProcessGroup)
        api.all_to_all_single(torch.empty(2), torch.ones(2), group=group)
        found.append(sum("pipermoe" in os.path.realpath(link) for link in glob.glob("/proc/self/fd/*")))
        dist.destroy_process_group(group)
    return found


def test_the_exchange_of_a_destroyed_group_is_given_back():
    for first, *later in run_ranks(fill_and_destroy_groups, 2):
        assert first > 0
        assert later == [first] * 3


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
def test_a_missing_rank_is_an_error_on_all_others_not_a_hang(way, tmp_path, monkeypatch):
    monkeypatch.setattr("pipermoe.exchange.host.shared_memory.FOLDER", str(tmp_path))
    answers = run_ranks(missing_rank, 4, way)
    assert all(answers), answers
    assert not list(tmp_path.iterdir())


def test_importing_the_package_does_not_load_torch():
    import subprocess
    import sys

    code = "import sys, pipermoe.exchange, pipermoe.exchange.builders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
