"""Fit the software profiles of the catalogue to their calibration rows: python tools/fit_software.py [PROFILE ...]

Rows on GB200 and B200 calibrate; other machines never do, so what is reported on them is a prediction. Four numbers a
profile: products in bf16 and fp8, memory-bound work, the host's time per layer. The squared logarithm of predicted over
measured is minimised, with a weak pull towards the catalogue's own rates so that no factor drifts without evidence.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipermoe.specs.documents import save
from pipermoe.specs.software import SoftwareProfile
from pipermoe.validate.predict import predict_step
from pipermoe.validate.recipe import recipe_of
from pipermoe.validate.rows import PublishedRow, published_rows

SOFTWARE = Path(__file__).parents[1] / "src/pipermoe/catalogue/software"
PULL = 0.02
CALIBRATION = {
    "megatron-2025": (
        "Megatron-Bridge in the NeMo containers 25.09 and 25.11",
        ("r0168", "r0169", "r0170", "r0171", "r0173", "r0175"),
    ),
    "megatron-2026-02": (
        "Megatron-Bridge in the NeMo containers 26.02 to 26.04.01",
        ("r0145", "r0147", "r0149", "r0151", "r0154", "r0156"),
    ),
    "megatron-2026-06": (
        "Megatron-Bridge in the NeMo containers 26.06 to 26.08",
        ("r0035", "r0038", "r0041", "r0196"),
    ),
    "automodel-2026": ("NeMo AutoModel (FSDP) of 2026", ("r0204",)),
    "primus-2026": ("AMD Primus of 2026 on MI355X", ("r0466",)),
}
ONE_BY_ONE = ("megatron-2025", "megatron-2026-02", "megatron-2026-06")  # experts by Transformer Engine's GroupedLinear


def main(names: Sequence[str]) -> None:
    rows = {row.id: row for row in published_rows() if row.metric != "peak allocated GiB"}
    for name in names or CALIBRATION:
        description, ids = CALIBRATION[name]
        profile = fit(name, description, [rows[row_id] for row_id in ids])
        save(SOFTWARE / f"{name}.toml", profile, header="Written by tools/fit_software.py.")
        print(profile, flush=True)


def fit(name: str, description: str, rows: list[PublishedRow]) -> SoftwareProfile:
    """The profile that predicts `rows` best."""

    def profile(x: list[float]) -> SoftwareProfile:
        bf16, fp8, memory = (round(math.exp(value), 3) for value in x[:3])
        return SoftwareProfile(
            name=name,
            description=description,
            products={"bf16": bf16, "fp8": fp8},
            memory_bound=memory,
            product_per_expert=name in ONE_BY_ONE,
            issue_seconds=round(max(0.0, x[3]) * 1e-3, 6),
            fitted_on=tuple(row.id for row in rows),
        )

    def loss(x: list[float]) -> float:
        software = profile(x)
        recipes = [recipe_of(row, software) for row in rows]
        errors = [math.log(predict_step(recipe).step_seconds / recipe.measured_seconds) for recipe in recipes]
        return sum(error**2 for error in errors) + PULL * sum(value**2 for value in x[:3])

    return profile(descend(loss, [-0.4, -0.4, 0.1, 3.0]))


def descend(loss: Callable[[list[float]], float], x: list[float]) -> list[float]:
    """Coordinate descent with halving steps; enough for four smooth unknowns."""
    best, step = loss(x), 0.2
    while step > 0.02:
        improved = False
        for index in range(len(x)):
            for change in (step, -step):
                there = [*x[:index], x[index] + change, *x[index + 1 :]]
                if (value := loss(there)) < best:
                    x, best, improved = there, value, True
        step = step if improved else step / 2
    return x


if __name__ == "__main__":
    main(sys.argv[1:])
