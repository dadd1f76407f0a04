"""A case of the list as the resource model predicts it and as the dry run counts it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.resources.case_list import Case
from tests.resources.cases import machine

from pipermoe.dryrun.dry_run import dry_run
from pipermoe.resources.step import predict
from pipermoe.specs.report import RankReport

COUNTED = ("weights", "gradients")
# The platform gives times only, which nothing here reads.
DEVICE = machine().device
RATES = ("peak_flops_per_s", "gemm", "grouped_gemm", "attention", "attention_backward", "passes")
EVERY_PRECISION = {name: dict.fromkeys(("fp32", "bf16"), getattr(DEVICE, name)["fp32"]) for name in RATES}
PLATFORM = machine().model_copy(update={"device": DEVICE.model_copy(update=EVERY_PRECISION)})


@dataclass(frozen=True, slots=True)
class Compared:
    """Reports of one rank of every stage."""

    predicted: tuple[RankReport, ...]
    counted: tuple[RankReport, ...]

    @property
    def equal(self) -> bool:
        """FLOPs, weights, gradients and the calls and bytes of every collective, to the unit."""
        return all(_counts(guess) == _counts(truth) for guess, truth in zip(self.predicted, self.counted, strict=True))

    @property
    def peaks(self) -> tuple[int, int]:
        """Predicted and counted peak bytes, each of its worst rank."""
        guess, truth = (max(report.peak_bytes for report in each) for each in (self.predicted, self.counted))
        return guess, truth

    @property
    def peak_error(self) -> float:
        guess, truth = self.peaks
        return guess / truth - 1


def compare(case: Case) -> Compared:
    """Predict and execute one rank of every pipeline rank, with different places in their stages."""
    inner = case.strategy.ranks_per_stage
    ranks = [pp * inner + pp % inner for pp in range(case.strategy.pipeline_parallel)]
    every = predict(case.model, PLATFORM, case.train, case.strategy).ranks
    return Compared(
        tuple(every[rank] for rank in ranks),
        tuple(dry_run(case.model, case.train, case.strategy, rank=rank).report for rank in ranks),
    )


def _counts(report: RankReport) -> dict:
    """Of a prediction or a dry run; planned routing exchanges no counts."""
    traffic = {key: value.model_dump() for key, value in report.traffic.items() if key != "all_to_all_counts.ep"}
    held = {category: report.memory_bytes[category] for category in COUNTED}
    return {"flops": report.flops, "held": held, "traffic": traffic}
