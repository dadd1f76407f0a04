"""What a release of Megatron-Core keeps that another does not, read in the sources of both.

A snapshot of the development branch counts as the last release that branched off before it.
"""

from __future__ import annotations

from typing import Literal, get_args

Release = Literal["0.12", "0.13", "0.14", "0.15", "0.16", "0.17", "0.18", "0.19"]
NEWEST: Release = "0.19"


def has_index_add(release: Release) -> bool:
    """Deterministic mode sums returned rows by `index_add`, which keeps them; `scatter_add` before did not.

    transformer/moe/moe_utils.py `unpermute`, commit 56818f9e50 (October 2025).
    """
    return _since(release, "0.15")


def predicted_logits_stay(release: Release) -> bool:
    """The last prediction module's logits are a variable of the function that computes the model's own loss.

    models/gpt/gpt_model.py `_postprocess`, from commit d7bf5aaaa8 (August 2025, also in the release before it) to
    300d1b6550 (February 2026), which gave the prediction loss a function of its own.
    """
    return _since(release, "0.14") and not _since(release, "0.17")


def _since(release: Release, first: Release) -> bool:
    order = get_args(Release)
    return order.index(release) >= order.index(first)
