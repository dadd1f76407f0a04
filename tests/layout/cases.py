"""Layouts and loads that the tests share."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.policy import Nodes


@st.composite
def problems(draw) -> tuple[ExpertLayout, np.ndarray, Nodes]:
    """A static layout with room for copies, a random load with zeros and ties, and the nodes."""
    nodes = Nodes(draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([1, 2])))
    experts, layers = draw(st.integers(2, 13)), draw(st.integers(1, 3))
    slots = -(-experts // nodes.ranks) + draw(st.integers(0, 2))
    counts = draw(st.lists(st.integers(0, 40), min_size=layers * experts, max_size=layers * experts))
    return ExpertLayout.static(layers, nodes.ranks, experts, slots), np.array(counts).reshape(layers, experts), nodes
