"""What the two ends of the model keep: the tokens of the embedding; the logits and loss of the head; what multi-token
prediction puts between a head and the next layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipermoe.resources.activations.sizes import INDEX_BYTES, STATISTIC_BYTES, Recompute, Sizes


@dataclass(frozen=True, slots=True)
class EndMemory:
    """`kept` from forward to backward, `deferred` from I to W, `peak` what the backward of the loss holds on top."""

    kept: Any
    deferred: Any
    peak: Any


def embedding_memory(sizes: Sizes) -> EndMemory:
    """The indices of the tokens; a deferred gradient of the table is that of its output."""
    tokens = sizes.tokens * INDEX_BYTES
    return EndMemory(tokens, tokens + sizes.hidden, 0 * tokens)


def head_memory(sizes: Sizes) -> EndMemory:
    """x and its norm, the logits (overwritten by their gradient), log-sum-exp and targets.

    The loss is computed in fp32: logits of another format are kept in fp32 beside their own. In slices only one slice
    of logits exists at a time, and its gradients at once.
    """
    profile, tokens = sizes.profile, sizes.tokens
    element = profile.logits_bytes or 4
    vocabulary = -(-sizes.model.vocab_size // sizes.tp)
    logits = tokens * vocabulary * element / profile.loss_chunks
    statistics = tokens * (2 * STATISTIC_BYTES + INDEX_BYTES)
    gradient = tokens * vocabulary * sizes.element / profile.loss_chunks
    return EndMemory(
        kept=2 * sizes.hidden + logits + statistics,
        deferred=sizes.hidden + gradient,
        # The final norm's backward holds four hidden states; the logits' gradient overwrites the logits.
        peak=4 * sizes.hidden + gradient * (sizes.element != element),
    )


def join_memory(sizes: Sizes, recompute: Recompute) -> EndMemory:
    """The embedded tokens and their indices, two norms' statistics, and both results side by side for the projection.

    The state before is the head's input, which that keeps.
    """
    tokens, hidden = sizes.tokens * INDEX_BYTES, sizes.hidden
    inside = (2 * hidden + 2 * sizes.stream * STATISTIC_BYTES) * (1 - recompute.full)
    return EndMemory(kept=tokens + hidden + inside, deferred=tokens + 4 * hidden, peak=0 * tokens)
