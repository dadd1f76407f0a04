"""DualPipe and DualPipe-V: a forward and a backward beside each other, fed from both ends of the pipeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from pipermoe.schedule.action import Action, Kind, Schedule, overlap


def dualpipe(pipeline_parallel: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """Two copies of the model run through the pipeline in opposite directions (DeepSeek-V3, arXiv 2412.19437, fig. 5).

    Rank i holds stage i for the even micro-batches and stage p - 1 - i for the odd ones.
    """
    p = pipeline_parallel

    def order(rank: int) -> Iterator[Action]:
        near = min(rank, p - 1 - rank)  # distance from the nearer end
        towards = 0 if rank < p // 2 else 1  # the direction that enters the pipeline at that end
        stage = (near, p - 1 - near)
        flows = [_Flow(stage[phase], range(towards ^ phase, microbatches, 2)) for phase in (0, 1)]
        yield from _eight_steps(p // 2, near, microbatches // 2, flows)

    return Schedule.of("dualpipe", microbatches, range(p), map(order, range(p)), reversed(range(p)))


def dualpipe_v(pipeline_parallel: int, microbatches: int, virtual_stages: int = 2) -> Schedule:
    """DualPipe cut in half: one copy of the model, folded into a V (Qi et al. 2025, hackmd.io/@ufotalent/r1lVXsa9Jg).

    Rank i holds stages i and 2 p - 1 - i. As DualPipe, it is published by DeepSeek as a program of eight steps.
    """
    p = pipeline_parallel

    def order(rank: int) -> Iterator[Action]:
        flows = [_Flow(stage, range(microbatches)) for stage in (rank, 2 * p - 1 - rank)]
        yield from _eight_steps(p, rank, microbatches, flows)

    return Schedule.of("dualpipe-v", microbatches, v_stage_rank(p), map(order, range(p)))


def v_stage_rank(pipeline_parallel: int) -> list[int]:
    """Down the ranks and up again: rank i holds stages i and 2 p - 1 - i."""
    return [*range(pipeline_parallel), *reversed(range(pipeline_parallel))]


class _Flow:
    """The micro-batches of one rank in one direction: hands out the next forward and the next backward."""

    def __init__(self, stage: int, microbatches: range) -> None:
        self.stage, self.forwards, self.backwards = stage, iter(microbatches), iter(microbatches)

    def forward(self) -> Action:
        return Action(Kind.FORWARD, self.stage, next(self.forwards))

    def backward(self, kind: Kind) -> Action:
        return Action(kind, self.stage, next(self.backwards))


def _eight_steps(ranks: int, rank: int, microbatches: int, flows: list[_Flow]) -> Iterator[Action]:
    """One rank's program; `rank` counts from the end of the pipeline, `microbatches` are those of one direction.

    Flow 0 enters the pipeline at this end, flow 1 comes back. Step names as in github.com/deepseek-ai/DualPipe.
    """
    kept_back: deque[Action] = deque()  # weight gradients of split backwards, oldest first

    def backward(flow: _Flow, split: bool) -> Action:
        action = flow.backward(Kind.INPUT_GRAD if split else Kind.BACKWARD)
        if split:
            kept_back.append(Action(Kind.WEIGHT_GRAD, action.stage, action.microbatch))
        return action

    out, back = flows
    after = ranks - 1 - rank  # ranks between this one and the turning point
    for _ in range(2 * after):  # 1: F0
        yield out.forward()
    for _ in range(rank + 1):  # 2: F0 F1
        yield out.forward()
        yield back.forward()
    for _ in range(after):  # 3: I1 W1 F1
        yield backward(back, split=True)
        yield kept_back.popleft()
        yield back.forward()
    for i in range(microbatches - 2 * ranks + rank + 1):  # 4: F0&B1 F1&B0
        if i == 0 and after == 0:  # at the turning point the pair would wait for itself
            yield out.forward()
            yield backward(back, split=False)
        else:
            yield overlap(out.forward(), backward(back, split=False))
        yield overlap(back.forward(), backward(out, split=False))
    for _ in range(after):  # 5: B1 F1&B0
        yield backward(back, split=False)
        yield overlap(back.forward(), backward(out, split=False))
    for i in range(rank + 1):  # 6: B1 B0, the second half of them split
        half = (rank + 1) // 2
        yield backward(back, split=i >= half + (rank + 1) % 2)
        yield backward(out, split=i >= half)
    for _ in range(after):  # 7: W I0
        yield kept_back.popleft()
        yield backward(out, split=True)
    yield from kept_back  # 8: W
