"""The two ends of the model as scripts: the tokens of the embedding; the logits and loss of the head; what multi-token
prediction puts between a head and the next layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipermoe.resources.activations.attention import normalise, normalise_backward
from pipermoe.resources.activations.ledger import Amount, BlockMemory, Ledger
from pipermoe.resources.activations.sizes import INDEX_BYTES, STATISTIC_BYTES, Recompute, Sizes, product_bytes


def _block(
    forward: Ledger, kept: Amount, backward: Callable[[Ledger], None], *, enters: Any = 0.0, product: Any = 0.0
) -> BlockMemory:
    """`enters` is the gradient with which the backward begins."""
    forward.end_step()
    works = [Ledger("temporary", kept.more(enters, "temporary"), defers=defers) for defers in (False, True)]
    for work in works:
        backward(work)
        work.end_step()
    widest = type(kept)().more(product, "temporary")
    return BlockMemory(kept, *(tuple(work.steps) for work in (forward, *works)), product=widest)


def embedding_memory(sizes: Sizes) -> BlockMemory:
    """The indices of the tokens; a deferred gradient of the table is that of its output. Rows are added in fp32."""
    tokens = sizes.tokens * INDEX_BYTES
    exact = sizes.exact_hidden * (sizes.element < STATISTIC_BYTES)
    work = Ledger("activations", sizes.nothing)
    work.take(tokens, sizes.hidden)

    def backward(work: Ledger) -> None:
        if not work.defers:
            work.brief(exact)
        work.release(sizes.hidden)
        work.release(tokens, of="activations")

    return _block(work, sizes.nothing.more(tokens, "activations"), backward, enters=sizes.hidden, product=exact)


def head_memory(sizes: Sizes) -> BlockMemory:
    """x and its norm, the logits (overwritten by their gradient), log-sum-exp and targets.

    The loss is computed in fp32: logits of another format are kept in fp32 beside their own. In slices only one slice
    of logits exists at a time, and its gradients at once.
    """
    profile, tokens, hidden = sizes.profile, sizes.tokens, sizes.hidden
    element = profile.logits_bytes or STATISTIC_BYTES
    vocabulary = -(-sizes.model.vocab_size // sizes.tp)
    logits = tokens * vocabulary * element / profile.loss_chunks
    rounded = tokens * vocabulary * sizes.element / profile.loss_chunks  # as a product reads or writes them
    differs = sizes.element != element
    statistics = tokens * (STATISTIC_BYTES + INDEX_BYTES)
    product = product_bytes(sizes, vocabulary * sizes.model.hidden_size)
    work = Ledger("activations", sizes.nothing)
    work.take(hidden)
    normalise(work, sizes)
    work.take(rounded * differs)
    work.take(logits, statistics)
    work.drop(rounded * differs)

    def backward(work: Ledger) -> None:
        work.take(rounded * differs)
        work.drop(logits * differs, statistics, of="activations")
        if not work.defers:
            work.brief(product)
        work.take(hidden)
        work.release(rounded * differs)
        work.release(logits * (1 - differs), hidden, of="activations")
        normalise_backward(work, sizes)
        work.drop(hidden)
        work.drop(hidden, sizes.stream * STATISTIC_BYTES, of="activations")

    return _block(work, work.now, backward, product=product)


def join_memory(sizes: Sizes, recompute: Recompute) -> BlockMemory:
    """The embedded tokens and their indices, two norms' statistics, and both results side by side for the projection.

    The state before is the head's input, which that keeps.
    """
    tokens, hidden, full = sizes.tokens * INDEX_BYTES, sizes.hidden, recompute.full
    inside = 2 * hidden + 2 * sizes.stream * STATISTIC_BYTES
    work = Ledger("activations", sizes.nothing)
    work.take(tokens + hidden)
    work.take(inside)
    work.brief(2 * hidden)
    work.drop(inside * full)
    kept = work.now
    work.take(hidden)

    def backward(work: Ledger) -> None:
        work.take(inside * full)
        work.take(2 * hidden)
        work.release_kept(2 * hidden, full)
        work.release(hidden)  # the gradient of the output
        normalise_backward(work, sizes)
        work.release(hidden)  # to the embedded tokens
        work.free(inside - 2 * hidden, full)
        work.drop(hidden, of="activations")
        work.release(tokens, of="activations")

    return _block(work, kept, backward, enters=hidden, product=product_bytes(sizes, 2 * sizes.model.hidden_size**2))
