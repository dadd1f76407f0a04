"""Moving from one layout to the next: who sends what."""

import numpy as np
from hypothesis import given, settings
from tests.layout.cases import problems

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.policies import POLICIES
from pipermoe.layout.policy import Nodes
from pipermoe.layout.transfer import Move, Transfer, expert_bytes


@settings(deadline=None, max_examples=30)
@given(problems())
def test_after_the_moves_every_rank_has_what_it_needs_from_ranks_that_had_it(problem):
    layout, load, nodes = problem
    planned = POLICIES["balanced"].plan(layout, load, nodes)
    held = layout.copies_LNE > 0
    for move in Transfer.between(layout, planned, nodes).moves:
        assert layout.copies_LNE[move.layer, move.source, move.expert]
        assert not held[move.layer, move.destination, move.expert]
        held[move.layer, move.destination, move.expert] = True
    assert held[planned.copies_LNE > 0].all()


def test_a_copy_comes_from_the_own_node_and_senders_take_turns():
    before = ExpertLayout(np.array([[[0, 1], [0, 1], [2, 0], [3, 3]]]), 4)
    after = ExpertLayout(np.array([[[0, 1], [2, 1], [2, 0], [0, 3]]]), 4)
    assert Transfer.between(before, after, Nodes(4, 2)).moves == (Move(0, 0, 2, 3), Move(0, 2, 2, 1))
    transfer = Transfer.between(before, after, Nodes(4, 2))
    assert transfer.bytes_NN(10)[2].tolist() == [0, 10, 0, 10]
    assert transfer.seconds(10, bandwidth_bytes_per_s=5.0) == 4.0


def test_a_migrated_expert_is_48_d_times_d_ffn_bytes():
    assert expert_bytes(3 * 4096 * 14336) == 48 * 4096 * 14336  # Piper, table IV: Mixtral 8x7B
