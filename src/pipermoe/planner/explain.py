"""Why a strategy takes what it takes: where its step goes, which wall binds, why not others, what would help."""

from __future__ import annotations

from pipermoe.planner.breakdown import breakdown
from pipermoe.planner.diagnosis import findings, walls
from pipermoe.planner.job import Job
from pipermoe.planner.neighbours import alternatives
from pipermoe.planner.result import Candidate, Explanation, Wall
from pipermoe.planner.what_if import what_ifs
from pipermoe.resources.step import compute_slots
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.units import format_number, format_seconds

SAVES = 5e-4  # the least share of a step that more memory saves and that is told

WORDS: dict[Wall, str] = {
    "compute": "computing takes",
    "communication": "exposed communication takes",
    "bubble": "waiting for other pipeline stages takes",
    "memory": "memory: a strategy that does not fit would save",
    "imbalance": "uneven routing takes",
    "host": "waiting for the host takes",
}


def explain(
    job: Job,
    chosen: Candidate,
    *,
    unlimited: tuple[Strategy, float] | None = None,
    roomier: Strategy | None = None,
    blind: Strategy | None = None,
) -> Explanation:
    """The explanation of `chosen`.

    From a search come the fastest strategy and its seconds if memory were `unlimited`, the best with a quarter more
    memory (`roomier`), and the best for a flat network (`blind`); without one what only it can say is left out.
    """
    parts = breakdown(job, chosen)
    neighbours = alternatives(job, chosen)
    lacking = [chosen.step_seconds + one.slower_seconds for one in neighbours if not one.fits]
    without_limit = min([unlimited[1] if unlimited else chosen.step_seconds, *lacking])
    seconds = walls(parts, chosen, without_limit)
    wall = max(seconds, key=seconds.__getitem__)
    return Explanation(
        parts=parts,
        walls=seconds,
        wall=wall,
        verdict=_verdict(job, chosen, wall, seconds[wall], unlimited),
        findings=findings(job, chosen, blind),
        alternatives=neighbours,
        what_ifs=what_ifs(job, chosen, roomier),
    )


def _verdict(job: Job, chosen: Candidate, wall: Wall, seconds: float, unlimited: tuple[Strategy, float] | None) -> str:
    sentence = f"{WORDS[wall]} {seconds / chosen.step_seconds:.0%} of the step"
    slots = compute_slots(job.platform, job.world_size)
    if wall == "compute" and slots < job.world_size:
        sentence += f", because {format_number(job.world_size, 'rank')} share {format_number(slots, 'core')}"
    if unlimited and unlimited[1] < chosen.step_seconds * (1 - SAVES):
        strategy, without_limit = unlimited
        sentence += (
            f"; with memory for {strategy.compact()} mbs{strategy.micro_batch_size} it would take "
            f"{format_seconds(without_limit)} ({1 - without_limit / chosen.step_seconds:.1%} less)"
        )
    return sentence
