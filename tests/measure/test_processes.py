"""Ranks end together, whatever ends first, and the one that died is named."""

import os
import select
import signal
import subprocess
import sys

import pytest

from pipermoe.measure.processes import run_ranks
from pipermoe.specs.errors import MachineError

pytestmark = pytest.mark.distributed


def ignore(_: str) -> None:
    pass


def test_results_come_in_rank_order_and_rank_zero_tells_its_steps():
    steps = []

    def program(rank, report):
        report(f"step of {rank}")
        return {"rank": rank}

    assert run_ranks(program, 3, steps.append, 20) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert steps == ["step of 0"]


def test_a_killed_rank_is_named_though_its_peers_wait_for_ever():
    def program(rank, report):
        report("all-to-all")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

    with pytest.raises(MachineError, match=r"rank 1 died \(SIGKILL\) while measuring all-to-all"):
        run_ranks(program, 3, ignore, 20)


def test_an_exception_becomes_one_line_with_rank_and_step():
    def program(rank, report):
        report("attention")
        if rank == 2:
            raise RuntimeError("no such kernel\nand a second line")
        signal.pause()

    with pytest.raises(MachineError, match=r"^rank 2 failed while measuring attention: RuntimeError: no such kernel$"):
        run_ranks(program, 3, ignore, 20)


def test_a_rank_that_hangs_ends_at_the_limit():
    with pytest.raises(MachineError, match="did not end in time"):
        run_ranks(lambda rank, report: signal.pause(), 2, ignore, 0.3)


# A shell that starts the tests in the background makes them ignore Ctrl-C; this parent listens again.
INTERRUPTED = """
import os, signal
from pipermoe.measure.processes import run_ranks

signal.signal(signal.SIGINT, signal.default_int_handler)

def program(rank, report):
    report(str(os.getpid()))
    signal.pause()

def on_step(pid):
    print(pid, flush=True)

run_ranks(program, 2, on_step, 60)
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_its_parent(ending):
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run:
        assert run.stdout is not None
        rank = os.pidfd_open(int(run.stdout.readline()))
        run.send_signal(ending)
        try:
            run.wait(timeout=20)
        finally:
            run.kill()
    assert run.returncode != 0
    ended, _, _ = select.select([rank], [], [], 10)
    os.close(rank)
    assert ended, "a rank process is still there"
