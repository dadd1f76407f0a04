"""Who failed, in a world that others have started: each rank tells the rendezvous' store where it is, and all read it.

No parent watches such ranks, and they may be on many hosts. So a thread of each of them writes a sign of life into the
store that the ranks have met in, twice a second and beside the work. When a rank fails, the first that knows why writes
the verdict there, and every rank ends with this one line. What a rank fails with by itself is the verdict. That a
process has ended without a word, its lifeline tells (training/lifelines.py). A witness (a connection was closed, a
collective took too long) looks whose signs have ceased though nothing says that it has ended: a process that was
stopped, or whose machine is gone. If all live, the ranks that were not waiting for others are to blame.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event, Lock, Thread

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store

from pipermoe.processes.blame import Failure, culprit, failure_of, named, not_waiting
from pipermoe.processes.progress import show_cursor
from pipermoe.processes.world import World
from pipermoe.specs.errors import UserError
from pipermoe.training.lifelines import Lifelines

BEAT_SECONDS = 0.5
LEAST_SILENCE_SECONDS = 3.0
SILENCE_SHARE = 0.05  # of the timeout: so long a rank gives no sign of life while a witness looks around
LIMIT = 5  # such silences may one rank's search for a verdict last
VERDICT, SEARCHERS, HEARD, LISTENER = "pipermoe/verdict", "pipermoe/searchers", "pipermoe/heard", "pipermoe/lifelines"


@dataclass(frozen=True, slots=True)
class Sign:
    """What a rank has told last; `beats` goes up while its process lives, `failure` is why it ends."""

    beats: int
    doing: str
    failure: Failure | None


class RollCall:
    """One rank's part. Until it is open, and once it is closed, nobody hears of this rank."""

    def __init__(self, world: World, output: Path, timeout: timedelta) -> None:
        self._rank, self._size, self._output = world.rank, world.size, output
        self._timeout_seconds = timeout / timedelta(seconds=1)
        self._silence_seconds = max(LEAST_SILENCE_SECONDS, SILENCE_SHARE * self._timeout_seconds)
        self._limit_seconds = LIMIT * self._silence_seconds
        self._doing, self._beats = "", 0
        self._host = ""  # what rank 0, which may keep the store, was doing last
        self._failure: Failure | None = None
        self._verdict: Failure | None = None
        self._lock, self._called, self._decided, self._never = Lock(), Event(), Event(), Event()
        self._closing = False
        self._lifelines, self._tied = Lifelines(), False
        self._thread: Thread | None = None

    def open(self, store: Store) -> None:
        """Begin to give signs, through a connection of its own to `store`: that of the ranks' groups may be in use."""
        assert isinstance(store, TCPStore)
        self._store = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
        if self._rank == 0:
            store.set(LISTENER, json.dumps(self._lifelines.listen(self._size)))
        self._sign()
        self._thread = Thread(target=self._attend, name="roll call", daemon=True)
        self._thread.start()

    def tell(self, doing: str) -> None:
        """What this rank is doing; costs next to nothing."""
        self._doing = doing

    def close(self) -> None:
        """End the signs, of all ranks at about the same time: before any of them may leave."""
        self._closing = True
        self._called.set()
        if self._thread is not None:
            self._thread.join()
        self._lifelines.close()

    def verdict(self, error: UserError) -> UserError:
        """What to raise instead of this rank's `error`: what all ranks end with."""
        own = failure_of(self._rank, "rank", error, self._output)
        verdict = self._search(own)
        return error if verdict is None else verdict.error

    def last_words(self) -> str:
        """What a rank that is told to end says: why the run ends, "" if no rank has failed."""
        if self._failure is not None:
            self._never.wait(self._limit_seconds)  # the main thread is about to say it
        verdict = self._search(Failure(self._rank, "told", f"rank {self._rank} was terminated"))
        return "" if verdict is None or verdict.kind == "told" else verdict.message

    def _search(self, own: Failure) -> Failure | None:
        if self._thread is None or self._closing:
            return None
        with self._lock:
            self._failure = own
        self._called.set()
        if self._decided.wait(self._limit_seconds):
            return self._verdict
        return self._without_host("does not answer")

    # What follows runs in the thread.

    def _attend(self) -> None:
        try:
            while not self._closing:
                self._sign()
                self._tie()
                if (verdict := self._known()) is not None:
                    return self._end(verdict)
                if self._failure is not None:
                    return self._end(self._decide(self._failure))
                self._called.wait(BEAT_SECONDS)
        except DistError:
            self._end(self._without_host("is gone"))

    def _sign(self) -> None:
        self._beats += 1
        self._store.set(_key(self._rank), json.dumps(asdict(Sign(self._beats, self._doing, self._failure))))
        if self._rank and self._store.check([_key(0)]):
            self._host = self._read(0).doing

    def _tie(self) -> None:
        """Have a lifeline, once the first rank can be reached."""
        if self._rank and not self._tied and self._store.check([LISTENER]):
            self._lifelines.connect(self._rank, self._store.host, *json.loads(self._store.get(LISTENER)))
            self._tied = True

    def _read(self, rank: int) -> Sign:
        values = json.loads(self._store.get(_key(rank)))
        failure = values.pop("failure")
        return Sign(**values, failure=failure and Failure(**failure))

    def _signs(self) -> dict[int, Sign]:
        return {rank: self._read(rank) for rank in range(self._size) if self._store.check([_key(rank)])}

    def _known(self) -> Failure | None:
        """The verdict, if there is one by now, or a process' end is one."""
        if self._store.check([VERDICT]):
            return Failure(**json.loads(self._store.get(VERDICT)))
        ended = self._lifelines.ended(BEAT_SECONDS)  # one that had something to say has said it before
        return self._write(self._death(ended)) if ended else None

    def _death(self, ended: list[int]) -> Failure:
        signs = self._signs()
        names = ", ".join(named("rank", rank, signs[rank].doing) for rank in ended)
        return Failure(ended[0], "own", f"{names} ended without a word: killed, or the machine is out of memory")

    def _write(self, verdict: Failure) -> Failure:
        """The first that any rank writes is the verdict."""
        return Failure(**json.loads(self._store.compare_set(VERDICT, "", json.dumps(asdict(verdict)))))

    def _decide(self, own: Failure) -> Failure:
        """The verdict on what this rank failed with. One witness searches, for all others."""
        if own.kind in ("witness", "told"):
            patience = LEAST_SILENCE_SECONDS if own.kind == "told" else self._silence_seconds
            if self._store.add(SEARCHERS, 1) > 1 and (verdict := self._heard_within(2 * patience)) is not None:
                return verdict
            own = self._look_around(own, patience)
        return self._write(own)

    def _heard_within(self, seconds: float) -> Failure | None:
        """The verdict, if another rank or a lifeline brings it."""
        until = time.monotonic() + seconds
        while (verdict := self._known()) is None and time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 2)
            self._sign()
        return verdict

    def _look_around(self, own: Failure, patience: float) -> Failure:
        before = self._signs()
        if (verdict := self._heard_within(patience)) is not None:
            return verdict
        now = self._signs()
        failures = {rank: sign.failure for rank, sign in now.items() if sign.failure is not None}
        living = {rank: sign.doing for rank, sign in now.items() if rank not in failures}
        gone = [rank for rank in living if rank in before and now[rank].beats == before[rank].beats]
        if gone:
            names = ", ".join(named("rank", rank, living[rank]) for rank in gone)
            silence = f"has given no sign of life for {patience:g} s: stopped, or its machine is gone"
            return Failure(gone[0], "own", f"{names} {silence}")
        if own.kind == "told":
            return own
        silent = [named("rank", rank, living[rank]) for rank in not_waiting(living)]
        return culprit({self._rank: own, **failures}, silent, self._timeout_seconds)

    def _without_host(self, how: str) -> Failure:
        """The store is no more, and with it rank 0, or the launcher's agent beside it, which kept it."""
        why = "killed or stopped, or its machine is gone"
        message = f"rank 0, which keeps the store that the ranks have met in, {how}: {why}"
        return Failure(0, "own", f"{message}; last heard of: {self._host}" if self._host else message)

    def _end(self, verdict: Failure) -> None:
        """Let the failed main thread say `verdict`, or say it and end the process while that one waits in C++."""
        if self._closing:
            return
        self._verdict = verdict
        try:
            self._store.add(HEARD, 1)
            until = time.monotonic() + LEAST_SILENCE_SECONDS  # while there is a store, others read it
            while self._rank == 0 and self._store.add(HEARD, 0) < self._size and time.monotonic() < until:
                time.sleep(BEAT_SECONDS / 5)
        except DistError:
            pass
        with self._lock:
            if self._failure is None:
                show_cursor()
                for line in verdict.message.splitlines():
                    print(f"pipermoe: {line}", file=sys.stderr, flush=True)
                os._exit(verdict.error.exit_code)
        self._decided.set()


def _key(rank: int) -> str:
    return f"pipermoe/rank-{rank}"
