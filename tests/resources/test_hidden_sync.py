"""What stays of reducing gradients and gathering weights when both travel beside computation."""

import numpy as np

from pipermoe.resources.step import StepCosts, hide_sync


def costs(reduce: float, gather: float) -> StepCosts:
    """Two pipeline ranks of two stages each; a forward takes 1 s, a backward 2 s a stage."""
    stages, ranks = np.ones((1, 4)), np.ones((1, 2))
    return StepCosts(
        forward=stages, input_grad=stages, weight_grad=stages, forward_exchange=stages, backward_exchange=stages,
        forward_carried=stages, backward_carried=stages, send=stages[:, :3], arrival=stages[:, :3],
        reduce=reduce * ranks, norm=ranks, flags=ranks[:, :1], update=ranks, gather=gather * ranks,
    )  # fmt: skip


def test_only_what_exceeds_one_backward_and_one_forward_remains():
    hidden = hide_sync(costs(reduce=5.0, gather=1.5), [(0, 2), (1, 3)])
    assert hidden.reduce.tolist() == [[1.0, 1.0]]  # a rank's two stages compute 2 x 2 s backward
    assert hidden.gather.tolist() == [[0.0, 0.0]]
