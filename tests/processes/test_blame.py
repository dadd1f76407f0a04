"""Of ranks that have stopped the one that failed by itself is named."""

from __future__ import annotations

from pipermoe.processes.blame import WAITING, Failure, culprit, failure_of, not_waiting
from pipermoe.specs.errors import MachineError, UserError

WITNESS = Failure(0, "witness", "rank 0: RuntimeError: Connection closed by peer")


def test_a_culprit_is_preferred_to_witnesses_and_silence_to_their_words():
    own = Failure(2, "own", "rank 2 was killed by SIGKILL")
    assert culprit({0: WITNESS, 2: own}, ["rank 1"], 5.0) == own
    silent = culprit({0: WITNESS}, ["rank 1", "rank 3"], 5.0)
    assert isinstance(silent.error, MachineError)
    assert silent.message.startswith("rank 1, rank 3 stalled: no answer within 5 s")
    assert culprit({0: WITNESS}, [], 5.0) == WITNESS


def test_who_waits_is_not_blamed_unless_all_do():
    assert not_waiting({1: "step 2, update", 3: f"step 2, update{WAITING}"}) == [1]
    assert not_waiting({1: f"step 2{WAITING}", 3: f"step 1{WAITING}"}) == [1, 3]


def test_a_closed_connection_makes_a_witness_and_wrong_input_no_traceback(tmp_path):
    assert failure_of(0, "rank", RuntimeError("Connection closed by peer [::1]"), tmp_path).kind == "witness"
    assert type(failure_of(0, "rank", UserError("no"), tmp_path).error) is UserError
    assert not list(tmp_path.iterdir())
    timed_out = failure_of(0, "rank", RuntimeError("[/src/gloo/tcp/buffer.cc:129] Timed out waiting 5000ms"), tmp_path)
    assert timed_out.message == "rank 0: RuntimeError: Timed out waiting 5000ms"
    own = failure_of(1, "rank", ValueError("a bug"), tmp_path)
    assert (own.kind, own.message) == ("own", f"rank 1: ValueError: a bug (traceback in {tmp_path}/rank-1.error.txt)")
