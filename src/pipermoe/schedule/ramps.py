"""How a named schedule ramps up and down: what every rank holds at least, and which of its passes no other one hides.

Closed forms of the builders' orders, so that many pipelines are bounded without building any. Counts are micro-batches
of a rank's chunks, in the order of `stages_of_ranks`; p ranks, v chunks, m micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

Chunks = tuple[int, ...]


class Ramp(NamedTuple):
    """One rank. `kept`: for some instants, the whole activations that it holds at least, while a pair runs none of its
    forward. `waiting`: for instants at which a backward runs, what else is held then: (kept, micro-batches whose
    weight gradients are still to come).

    Of its lowest stage it never holds more than `most` (0: not known), so the backward of a micro-batch comes before
    the forward of the `most`-th after it. Between the backwards of its highest and its lowest stage are never more than
    `returning` (0: not known), so a micro-batch has come back through the stages in between before the
    `returning`-th after it sets out; but for the `last` micro-batches, which may be closer. In schedules of pairs,
    `alone_forward` and `alone_backward` passes are in no pair, and none at all of a chunk that is `never_paired` (1);
    `paired` are chunks of which a forward and a backward are a pair at some instant, with all that is held then at
    least, both of them included, and how many buffers of messages.
    """

    kept: tuple[Chunks, ...]
    most: int = 0
    alone_forward: Chunks = ()
    alone_backward: Chunks = ()
    never_paired: Chunks = ()
    returning: int = 0
    last: int = 0
    waiting: tuple[tuple[Chunks, Chunks], ...] = ()
    paired: tuple[tuple[int, Chunks, int], ...] = ()


@lru_cache(maxsize=8192)
def ramps(name: str, pipeline_parallel: int, virtual_stages: int, microbatches: int) -> tuple[Ramp, ...]:
    """The ramps of all ranks of a named schedule."""

    def capped(counts: Chunks) -> Chunks:
        fits = max(counts, default=0) <= microbatches
        return counts if fits else tuple(min(count, microbatches) for count in counts)

    found = (_RAMPS[name](pipeline_parallel, virtual_stages, microbatches, rank) for rank in range(pipeline_parallel))
    return tuple(
        Ramp(
            tuple(map(capped, ramp.kept)),
            min(ramp.most, microbatches),
            capped(ramp.alone_forward),
            capped(ramp.alone_backward),
            ramp.never_paired,
            ramp.returning,
            ramp.last,
            ramp.waiting,
            ramp.paired,
        )
        for ramp in found
    )


def _all_forwards_first(p: int, v: int, m: int, rank: int) -> Ramp:
    return Ramp(((m,) * v,))


def _one_by_one(p: int, v: int, m: int, rank: int) -> Ramp:
    """1F1B: a rank is as many micro-batches ahead as there are ranks behind it."""
    return Ramp(((p - rank,),), most=p - rank)


def _zb_h1(p: int, v: int, m: int, rank: int) -> Ramp:
    """1F1B whose ranks keep a weight gradient back for every rank before them."""
    held = (p - rank,)
    return Ramp((held,), most=p - rank, waiting=((held, (rank,)),) if m >= p else ())


def _zb_h2(p: int, v: int, m: int, rank: int) -> Ramp:
    held = (2 * (p - rank) - 1,)
    return Ramp((held,), most=2 * (p - rank) - 1, waiting=((held, (2 * rank,)),) if m >= 2 * p - 1 else ())


def _pairs(p: int, v: int, m: int, rank: int) -> Ramp:
    """A forward for every slot of the round trip, then pairs."""
    alone, most, messages = (2 * (p - rank) - 1,), 2 * (p - rank), 5 if 0 < rank < p - 1 else 0
    return Ramp((alone,), most, alone, alone, paired=((0, (most,), messages),) if m >= 2 * p else ())


def _zb_h1_pairs(p: int, v: int, m: int, rank: int) -> Ramp:
    """Once a rank has no forward left, a weight gradient waits for the next idle slot."""
    waiting = (((2 * (p - rank) - 3,), (1,)),) if rank < p - 1 and m >= 2 * p else ()
    return _pairs(p, v, m, rank)._replace(waiting=waiting)


def _zb_h2_pairs(p: int, v: int, m: int, rank: int) -> Ramp:
    """Weight gradients wait from the first pair on, and run once a rank has no forward left."""
    waiting = min(p + rank, 2 * (p - 1 - rank))
    return _pairs(p, v, m, rank)._replace(waiting=(((1,), (waiting,)),) if m >= 2 * p else ())


def _interleaved(p: int, v: int, m: int, rank: int) -> Ramp:
    """Rounds of at least p micro-batches go through chunk after chunk, up and down."""
    size = min(p, m)
    warm_up = _in_rounds((v - 1) * size + 2 * (p - 1 - rank) + 1, v, size)
    return Ramp((warm_up,), 0, warm_up, warm_up)


def _in_rounds(passes: int, chunks: int, size: int) -> Chunks:
    """How the first `passes` fall to the chunks."""
    whole, rest = divmod(passes, chunks * size)
    return tuple(whole * size + min(max(rest - chunk * size, 0), size) for chunk in range(chunks))


def _v(p: int, v: int, m: int, rank: int) -> Ramp:
    """ZB-V and DualPipe-V: down and up again."""
    down, up = (2 * p - 1 - rank, p), (p, 2 * p - 1 - rank)
    return Ramp(((2 * p - 1 - rank, rank + 1),), 2 * p - rank, down, up)


def _zb_v(p: int, v: int, m: int, rank: int) -> Ramp:
    """At its end a rank runs a pair of I for every rank before it, then their weight gradients."""
    return _v(p, v, m, rank)._replace(waiting=(((p - rank, 0), (rank, rank)),) if m >= 2 * p - 1 else ())


def _zb_v_pairs(p: int, v: int, m: int, rank: int) -> Ramp:
    waiting = (rank // 2 + 1, (rank + 1) // 2 + 1)
    return _v(p, v, m, rank)._replace(waiting=(((p - rank, 0), waiting),) if rank else ())


def _dualpipe_v(p: int, v: int, m: int, rank: int) -> Ramp:
    """Of the last backwards that come in turns the second half leaves its weight gradients for the end."""
    return _v(p, v, m, rank)._replace(waiting=(((p - rank, 0), (rank // 2, (rank + 1) // 2)),))


def _dualpipe(p: int, v: int, m: int, rank: int) -> Ramp:
    """Ranks at the same distance from their end of the pipeline do the same; weight gradients wait as in DualPipe-V."""
    near, half = min(rank, p - 1 - rank), p // 2
    ahead = max(p - 1 - near, half + 1)
    waiting = (((half - near, 0), (near // 2, (near + 1) // 2)),)
    return Ramp(((p - 1 - near, 1 + near),), p - near, (ahead, half), (half, ahead), waiting=waiting)


# Where a V repeats every six slots, as many return as are begun in the slots of one on its way back; where its gaps are
# closed, the last come back faster.


def _v_half(p: int, v: int, m: int, rank: int) -> Ramp:
    odd = p % 2
    down, up = (p - rank // 2, 1 + rank // 2) if odd else (p + 1 - (rank + 1) // 2, 1 + (rank + 1) // 2)
    half = ((p // 4, p // 4), (p // 4, p // 4))  # on the last rank, whose gaps are closed
    waiting = () if odd or rank < p - 1 or m < 2 * p else (half,)
    last = 0 if odd and m >= p else p
    return Ramp(((down, up),), most=down, returning=_half_returning(p, rank), last=last, waiting=waiting)


def _v_half_pairs(p: int, v: int, m: int, rank: int) -> Ramp:
    """On every second rank the passes down are in pairs, on the others those up."""
    never = (0, 1) if rank % 2 == 0 else (1, 0)
    held, most = (p - rank // 2, (rank + 2) // 2), p + 1 - (rank + 1) // 2
    messages = 4 - rank % 2 if 0 < rank < p - 1 else 0
    paired = ((rank % 2, (most, 1 + (rank + 1) // 2), messages),) if p % 2 == 0 and m >= 2 * p else ()
    return Ramp((held,), most, (0, 0), (0, 0), never, _half_returning(p, rank), paired=paired)


def _half_returning(p: int, rank: int) -> int:
    return (3 * (p - rank) - 1) // 6 + 1


def _v_min(p: int, v: int, m: int, rank: int) -> Ramp:
    """The slots of the pattern, which repeats every six; closing its gaps only lets more begin."""
    shift = 2 if p % 3 == 0 else 0
    turning = ((2 * p + shift - 1) // 6 + 1, (2 * rank + shift) // 6 + 1)
    ending = ((4 * p + shift - 2 * rank - 1) // 6 + 1, (2 * rank + shift + 1) // 6)
    returning, last = (2 * (p - rank) - 1) // 6 + 1, 0 if p % 3 and p not in (2, 5) and m >= p else p
    return Ramp((turning, ending), most=2 * ((p + 1) // 3 + 1), returning=returning, last=last)


_RAMPS: dict[str, Callable[[int, int, int, int], Ramp]] = {
    "gpipe": _all_forwards_first,
    "1f1b": _one_by_one,
    "1f1b-overlap": _pairs,
    "breadth-first": _all_forwards_first,
    "interleaved-1f1b": _interleaved,
    "interleaved-1f1b-overlap": _interleaved,
    "zb-h1": _zb_h1,
    "zb-h2": _zb_h2,
    "zb-h1-overlap": _zb_h1_pairs,
    "zb-h2-overlap": _zb_h2_pairs,
    "zb-v": _zb_v,
    "zb-v-overlap": _zb_v_pairs,
    "v-half": _v_half,
    "v-half-overlap": _v_half_pairs,
    "v-min": _v_min,
    "dualpipe": _dualpipe,
    "dualpipe-v": _dualpipe_v,
}
