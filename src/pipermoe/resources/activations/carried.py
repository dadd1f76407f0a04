"""What dispatch adds to a layer: what it keeps to find its way, what experts start from, what comes back.

Plain (`runtime/pipeline/dispatch.py`): every choice is a row that travels, its result a row that comes back. Or
deduplicated (`runtime/pipeline/deduplicated.py`): a token's copy travels once to each rank, experts expand it to the
rows they compute, and one weighted sum comes back per copy. By node it crosses before: one more list of places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipermoe.resources.activations.sizes import INDEX_BYTES, Sizes


@dataclass(frozen=True, slots=True)
class Carried:
    """`places` are indices, `inputs` what the experts' piece starts from, `expanded` its rows if they are not `inputs`
    themselves, `results` what they make of them, as it is and weighted; `returned` is what the merge keeps. All from
    forward to backward; full recomputation keeps places, inputs and what is returned.

    `once`: deduplicated. `landed` is the gradient that has arrived at the experts, `forward` what a forward holds on
    top when it merges.
    """

    once: Any
    places: Any
    inputs: Any
    expanded: Any
    results: Any
    returned: Any
    landed: Any
    forward: Any


def carried(sizes: Sizes) -> Carried:
    """Of each strategy, by its dispatcher; within a single rank all is plain."""
    travels = sizes.ep > 1
    once = travels & np.asarray(sizes.deduplicated)
    sorted_rows = 2 * (travels & (sizes.local_experts > 1)) * sizes.arriving  # from several ranks, by expert and back
    width = sizes.model.hidden_size
    rows, arrived, copies = sizes.stream_by(sizes.model.moe.top_k * width), sizes.arriving_by(width), sizes.copies
    of_copies = copies * width * sizes.element

    def either(when_once: Any, plain: Any) -> Any:
        return np.where(once, when_once, plain)

    deduplicated = sizes.leaving + sizes.crossing + copies + 2 * sizes.arriving
    return Carried(
        once=once,
        places=(either(deduplicated, 2 * sizes.leaving) + sorted_rows) * INDEX_BYTES,
        inputs=either(of_copies + sizes.arriving * sizes.element, arrived),
        expanded=either(arrived, 0),
        results=either(2 * arrived, 0),
        returned=either(0, rows + sizes.rows * sizes.element),
        landed=either(of_copies, 0),
        # The weighted rows, zeros and the sums of them, before the layer's output is there.
        forward=either(np.maximum(arrived + 2 * of_copies - sizes.hidden, of_copies), rows),
    )
