"""The way of a layer's tokens to their experts and back, as entries of a ledger: buffers, indices, what is kept.

Plain (`runtime/pipeline/dispatch.py`): every choice is a row that travels, its result a row that comes back. Or
deduplicated (`runtime/pipeline/deduplicated.py`): a token's copy travels once to each rank, experts expand it to the
rows they compute, and one weighted sum comes back per copy. By node it crosses before: one more list of places.

Gradients go the same way: `depart`, `arrive`, `leave` and `come_back` serve both directions.
"""

from __future__ import annotations

from typing import Any

from pipermoe.resources.activations.ledger import Ledger
from pipermoe.resources.activations.sizes import INDEX_BYTES, Recompute, Sizes

BUFFER = "communication"


class Plain:
    """Within a single rank nothing travels: rows are only put in the order of experts."""

    def __init__(self, sizes: Sizes, recompute: Recompute):
        self.full, self.limited = 1 * recompute.full, int(sizes.capacity_factor > 0)
        self.travels = 1 * (sizes.ep > 1)
        self.sorts = self.travels * (sizes.local_experts > 1)  # rows from several ranks, by expert and back
        width = sizes.model.hidden_size * sizes.element
        self.hidden, self.rows, self.leaving = sizes.hidden, sizes.rows * width, sizes.leaving * width
        self.arrived, self.weights = sizes.arriving_by(sizes.model.hidden_size), sizes.rows * sizes.element
        ways = sizes.leaving * (2 - self.limited) + 2 * self.sorts * sizes.arriving
        self.places = ways * INDEX_BYTES
        self.early = 0 * self.arrived

    def depart(self, work: Ledger) -> None:
        """Copies of the rows that leave, and room for those that arrive."""
        work.take(self.leaving * self.travels, self.arrived * self.travels, of=BUFFER)
        work.take(self.arrived * (1 - self.travels))

    def arrive(self, work: Ledger) -> None:
        """The experts' rows are in hand; in the buffer they came in, if their order is right."""
        work.drop(self.leaving * self.travels, of=BUFFER)
        work.take(self.arrived * self.sorts)
        work.drop(self.arrived * self.sorts, of=BUFFER)

    def leave(self, work: Ledger) -> None:
        """What experts have made sets out to the tokens."""
        reordered = (1 - self.travels) * (1 - self.limited)
        work.take(self.arrived * self.sorts, self.leaving * self.travels, of=BUFFER)
        work.take(self.rows * reordered)
        work.drop(self.arrived * (self.sorts + reordered))

    def come_back(self, work: Ledger) -> None:
        """A row of every choice in hand."""
        work.drop(self.arrived * self.sorts, of=BUFFER)
        work.drop(self.arrived * (self.travels - self.sorts))
        work.take(self.rows * (self.travels | self.limited))
        work.drop(self.leaving * self.travels, of=BUFFER)
        work.drop(self.leaving * (1 - self.travels) * self.limited)

    def unpack(self, work: Ledger) -> None:
        """The rows that have arrived are those that experts compute."""

    def pack(self, work: Ledger) -> None:
        """Their results are what goes back."""

    def merge(self, work: Ledger) -> None:
        """From the rows in hand, which stay, to their weighted sum."""
        work.take(self.rows, self.hidden)
        work.drop(self.rows)

    def split(self, work: Ledger) -> None:
        """From the gradient of the sum to those of weights and rows, which depart; the rows go."""
        work.brief((self.rows + self.hidden) * self.full)
        work.take(self.rows, self.rows, self.weights)
        work.drop(self.rows)
        work.drop(self.rows, self.weights, of="activations")
        self.depart(work)
        work.drop(self.rows)

    def rebuild(self, work: Ledger, inside: Any) -> None:
        """Full recomputation of the experts' piece."""
        work.take(inside * self.full)
        work.brief(self.arrived * self.full)

    def unpack_backward(self, work: Ledger) -> None:
        """The gradients that have arrived are those of the experts' results."""

    def pack_backward(self, work: Ledger) -> None:
        """The gradients of rows go back; the rows go, and the gradients of their results."""
        in_order = self.travels - self.sorts
        for phase in ("activations", "temporary"):
            work.release(self.arrived * (1 - in_order), of=phase)
            work.release(self.arrived * in_order, of=BUFFER)

    def gather(self, work: Ledger) -> None:
        """From the gradients of rows in hand to those of tokens."""
        work.take(self.hidden)
        work.drop(self.rows)


class Deduplicated:
    """Of copies sent and copies received; experts compute R rows."""

    def __init__(self, sizes: Sizes, recompute: Recompute):
        self.full = 1 * recompute.full
        width = sizes.model.hidden_size * sizes.element
        self.hidden, self.sent, self.received = sizes.hidden, sizes.copies * width, sizes.arriving_copies * width
        self.arrived, self.weights = sizes.arriving_by(sizes.model.hidden_size), sizes.rows * sizes.element
        self.arriving_weights = sizes.arriving * sizes.element
        sorted_rows = 2 * (sizes.local_experts > 1) * sizes.arriving
        ways = sizes.leaving + sizes.crossing + sizes.copies + 2 * sizes.arriving + sorted_rows
        self.places = ways * INDEX_BYTES
        self.early = self.arrived  # the gradients of results, which only the first product of a backward reads

    def depart(self, work: Ledger) -> None:
        work.take(self.sent, self.received, of=BUFFER)

    def arrive(self, work: Ledger) -> None:
        work.drop(self.sent, of=BUFFER)

    def leave(self, work: Ledger) -> None:
        work.take(self.sent, of=BUFFER)

    def come_back(self, work: Ledger) -> None:
        """The sums of every token in hand."""
        work.drop(self.received)
        work.take(self.hidden)
        work.drop(self.sent, of=BUFFER)

    def unpack(self, work: Ledger) -> None:
        """A row of every choice, of the copies, which stay with the weights."""
        work.take(self.arriving_weights, self.arrived)

    def pack(self, work: Ledger) -> None:
        """From results to weighted sums; the results stay, as they are and weighted."""
        work.drop(self.arrived * self.full)
        self._weigh(work)
        work.drop(2 * self.arrived * self.full)

    def merge(self, work: Ledger) -> None:
        """What has come back is summed up already; the weights have travelled."""
        work.drop(self.weights)

    def split(self, work: Ledger) -> None:
        work.take(self.weights)
        self.depart(work)

    def rebuild(self, work: Ledger, inside: Any) -> None:
        work.take((self.arrived + inside) * self.full, self.arrived * self.full)
        work.brief((2 * self.received + self.arrived) * self.full)
        work.take(self.arrived * self.full)

    def unpack_backward(self, work: Ledger) -> None:
        """From the gradients of sums to those of results; both kinds of results go."""
        work.take(self.arrived)
        work.free(self.arrived, self.full)
        work.take(self.arrived)
        work.brief(self.arrived)
        work.drop(self.arrived)
        work.free(self.arrived, self.full)

    def pack_backward(self, work: Ledger) -> None:
        """From the gradients of rows to those of copies; rows and copies go."""
        work.release_kept(self.arrived, self.full)
        work.take(self.received)
        work.brief(self.received)
        work.drop(self.arrived)
        work.drop(self.arriving_weights, of="activations")
        work.drop(2 * self.received, of=BUFFER)

    def gather(self, work: Ledger) -> None:
        """What has come back is summed up already."""

    def _weigh(self, work: Ledger) -> None:
        """The rows by their weights, and their sums by copy, which start from zeros."""
        work.take(self.received, self.arrived, self.received)
        work.drop(self.received)
