"""Zero bubble with one stage per rank: the backward is split and weight gradients fill what was idle."""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.schedule.action import Action, Kind, Schedule

F, I, W = Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD  # noqa: E741 - the papers' names


def zb_h1(pipeline_parallel: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """1F1B's memory and a third of its bubble (Qi et al. 2024, arXiv 2401.10241, figure 2).

    Rank r warms up with p - r forwards and keeps r weight gradients back, so every rank holds p activations.
    """
    return _handcrafted("zb-h1", pipeline_parallel, microbatches, hop=1)


def zb_h2(pipeline_parallel: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """No bubble within a rank when F, I and W take equally long, for 2 p - 1 activations (ibid., figure 3)."""
    return _handcrafted("zb-h2", pipeline_parallel, microbatches, hop=2)


def _handcrafted(name: str, pipeline_parallel: int, microbatches: int, hop: int) -> Schedule:
    """Each rank further from the last adds `hop` forwards to the warm-up and keeps `hop` fewer weight gradients."""

    def order(rank: int) -> Iterator[Action]:
        warm_up = min(hop * (pipeline_parallel - 1 - rank) + 1, microbatches)
        kept_back = hop * rank
        yield from (Action(F, rank, m) for m in range(warm_up))
        for m in range(microbatches):
            yield Action(I, rank, m)
            if m >= kept_back:
                yield Action(W, rank, m - kept_back)
            if m + warm_up < microbatches:
                yield Action(F, rank, m + warm_up)
        yield from (Action(W, rank, m) for m in range(max(microbatches - kept_back, 0), microbatches))

    return Schedule.of(name, microbatches, range(pipeline_parallel), map(order, range(pipeline_parallel)))
