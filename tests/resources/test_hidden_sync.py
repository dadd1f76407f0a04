"""What stays of reducing gradients and gathering weights when both travel beside computation."""

import numpy as np

from pipermoe.resources.hidden_sync import hide_sync
from pipermoe.resources.step import StepCosts
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


def costs(reduce: float, gather: float) -> StepCosts:
    """Two pipeline ranks of two stages each; a forward takes 1 s, a backward 2 s a stage."""
    stages, ranks = np.ones((1, 4)), np.ones((1, 2))
    return StepCosts(
        forward=stages, input_grad=stages, weight_grad=stages, forward_exchange=stages, backward_exchange=stages,
        forward_carried=stages, backward_carried=stages, send=stages[:, :3], arrival=stages[:, :3],
        reduce=reduce * ranks, norm=ranks, flags=ranks[:, :1], update=ranks, gather=gather * ranks,
    )  # fmt: skip


def hidden(level: int, reduce: float, gather: float) -> tuple[list[float], list[float]]:
    """What remains of both on either rank, of 3 micro-batches."""
    strategy = Strategy.parse(f"pp2 vpp2 dp2 ep2 mbs1 interleaved-1f1b z{level}")
    train = TrainConfig(seq_len=8, global_batch_size=6)
    left = hide_sync(costs(reduce, gather), train, StrategyTable.of([strategy]), [(0, 2), (1, 3)])
    return left.reduce[0].tolist(), left.gather[0].tolist()


def test_only_what_exceeds_one_backward_and_one_forward_remains():
    assert hidden(1, reduce=5.0, gather=1.5) == ([1.0, 1.0], [0.0, 0.0])  # a rank's two stages compute 2 x 2 s backward


def test_zero_2_reduces_beside_every_backward_and_gathers_once():
    assert hidden(2, reduce=13.0, gather=2.5) == ([1.0, 1.0], [0.5, 0.5])  # 3 backwards of 4 s, a forward of 2 s


def test_zero_3_gathers_beside_every_forward_and_again_beside_backwards_which_reduce():
    assert hidden(3, reduce=5.0, gather=16.0) == ([1.0, 1.0], [2.0, 2.0])  # 8 s beside 3 x 2 s; 5 + 8 beside 3 x 4
