"""The paper's own tables and X-MoE's: the best strategy at the same number of GCDs, beside what they published.

Piper, arXiv 2605.05049, figures 13 and 14; X-MoE, arXiv 2508.13337. Their mappings are not published whole, so nothing
is judged here. Assumed where a row is silent: 1,024 sequences a step (X-MoE's) and 4,096 tokens each. Planned in bf16,
which runs and weighs as their fp16, and into all of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipermoe.planner.find import searched
from pipermoe.planner.nothing_fits import nothing_fits
from pipermoe.specs.base import Frozen
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.train import TrainConfig
from pipermoe.validate.recipe import aliases, model_flops
from pipermoe.validate.rows import PublishedRow

MACHINE = "frontier"
SEQUENCES, TOKENS = 1024, 4096


class PaperRow(Frozen):
    """FLOP/s of the model on one GCD: published, and predicted for the best strategy (or why there is none)."""

    id: str
    source: str
    framework: str
    model: str
    gcds: int
    published: float
    predicted: float | None
    strategy: str


def paper_rows(rows: Sequence[PublishedRow]) -> Iterator[PaperRow]:
    """The rows of whole models on Frontier's GCDs whose number is known, planned anew; one plan serves equal ones."""
    plans: dict[tuple[str, int, int, int], tuple[float | None, str]] = {}
    for row in rows:
        name = aliases()["paper"].get(row.model)
        if row.gpu != "MI250X-GCD" or name is None or row.n_gpus is None:
            continue
        job = name, row.n_gpus, row.seq or TOKENS, row.gbs or SEQUENCES
        if job not in plans:
            plans[job] = _planned(*job)
        predicted, strategy = plans[job]
        framework = row.remark.removeprefix("framework ") if row.remark.startswith("framework") else ""
        yield PaperRow(
            id=row.id,
            source=row.source,
            framework=framework or row.source.split(" (")[0],
            model=name,
            gcds=row.n_gpus,
            published=float(row.value) * 1e12,
            predicted=predicted,
            strategy=strategy,
        )


def _planned(name: str, gcds: int, seq_len: int, sequences: int) -> tuple[float | None, str]:
    model, train = load_model(name), TrainConfig(seq_len=seq_len, global_batch_size=sequences, precision="bf16")
    field = searched(model, load_platform(MACHINE), train, gcds, headroom=0)
    ranking = field.best()
    if not ranking.best:
        return None, str(nothing_fits(field)).splitlines()[0]
    [best] = ranking.best
    return model_flops(model, train) / (best.seconds * gcds), strategy_text(field.space.strategy(best.place))
