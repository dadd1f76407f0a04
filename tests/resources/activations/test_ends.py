"""The head's logits: their precision, and the slices in which a loss may take them."""

import pytest
from tests.resources.cases import MODEL

from pipermoe.resources.activations.ends import head_memory
from pipermoe.resources.activations.sizes import MemoryProfile, Sizes

TOKENS, LOGITS = 64, 64 * MODEL.vocab_size


def kept(element: int, profile: MemoryProfile) -> float:
    """Bytes from the head's forward to its backward."""
    return head_memory(Sizes(MODEL, element, TOKENS, profile=profile)).kept.total


@pytest.mark.parametrize("element", [2, 4])
def test_logits_are_kept_in_fp32_unless_the_profile_says_otherwise(element):
    assert kept(element, MemoryProfile()) - kept(element, MemoryProfile(logits_bytes=2)) == LOGITS * (4 - 2)


@pytest.mark.parametrize("chunks", [2, 4, 16])
def test_a_chunked_loss_keeps_the_logits_of_one_slice(chunks):
    assert kept(2, MemoryProfile()) - kept(2, MemoryProfile(loss_chunks=chunks)) == LOGITS * 4 * (1 - 1 / chunks)


def test_the_peak_of_a_head_shrinks_with_its_slices_as_the_logits_do():
    whole, sliced = (
        head_memory(Sizes(MODEL, 4, TOKENS, profile=MemoryProfile(loss_chunks=chunks))).forward[0].peak.total
        for chunks in (1, 4)
    )
    assert whole - sliced == LOGITS * 4 * 3 / 4
