"""The whole run, as `pipermoe train` does it: learns, equals one process, resumes bit for bit, reports what it used."""

from __future__ import annotations

import json

import pytest
from tests.plans import TINY_MODEL, tiny_plan

from pipermoe.resources.flops import model_forward_flops
from pipermoe.runtime.launch import launch
from pipermoe.specs.documents import load
from pipermoe.specs.errors import UserError
from pipermoe.specs.plan import Measurement
from pipermoe.specs.report import TERMS
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed
HYBRID = Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2, zero_dense=1, zero_expert=1)
FASTER = {"optimizer": {"learning_rate": 0.01, "warmup_steps": 2}}


@pytest.fixture
def text(tmp_path):
    """A small corpus, so that a test does not read the standard library."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the square of {n} is {n * n}.\n" for n in range(2000)))
    return {"paths": (str(path),)}


def test_a_hybrid_run_learns_what_one_process_learns_and_reports_it(tmp_path, text, capfd):
    runs = {}
    for strategy in (Strategy(), HYBRID):
        plan = tiny_plan(strategy, data=text, **FASTER)
        runs[strategy] = launch(plan, tmp_path / strategy.compact().replace("/", "-"))
    one, hybrid = runs[Strategy()], runs[HYBRID]
    assert one is not None
    assert hybrid is not None
    assert hybrid.losses == pytest.approx(one.losses, rel=1e-5)
    assert hybrid.validation_loss_before == pytest.approx(one.validation_loss_before, rel=1e-5)
    assert hybrid.validation_loss_after == pytest.approx(one.validation_loss_after, rel=1e-5)
    assert hybrid.validation_loss_after < hybrid.validation_loss_before - 0.5
    assert len(hybrid.losses) == hybrid.steps == 6
    assert hybrid.measured_steps == len(hybrid.step_seconds) == 3

    folder = tmp_path / HYBRID.compact()
    assert load(folder / "measurement.json", Measurement) == hybrid
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert tuple(line["loss"] for line in lines) == hybrid.losses
    out = capfd.readouterr().out
    assert "step:     6  loss:" in out
    assert "\33" not in out

    forward = model_forward_flops(TINY_MODEL, tokens=8 * 32, seq_len=32, causal=False)
    for run in (one, hybrid):
        assert sum(rank.flops for rank in run.report.ranks) == 3 * forward
        for rank in run.report.ranks:
            assert set(rank.seconds) == set(TERMS)
            assert sum(rank.seconds.values()) == pytest.approx(run.report.step_seconds)
            assert all(seconds >= 0 for seconds in rank.seconds.values())
            assert sum(rank.memory_bytes.values()) == rank.peak_bytes


def test_a_run_that_stopped_and_resumed_equals_one_that_did_not(tmp_path, text):
    plan = tiny_plan(HYBRID, data=text, checkpoint_every=2, **FASTER)
    whole = launch(plan, tmp_path / "whole", quiet=True)
    launch(plan, tmp_path / "parts", steps=4, quiet=True)
    rest = launch(plan, tmp_path / "parts", resume=True, quiet=True)
    assert whole is not None
    assert rest is not None
    assert rest.losses == whole.losses[4:]
    assert rest.validation_loss_after == whole.validation_loss_after
    lines = (tmp_path / "parts" / "steps.jsonl").read_text().splitlines()
    assert tuple(json.loads(line)["loss"] for line in lines) == whole.losses
    with pytest.raises(UserError, match="has trained 6 of 6 steps already"):
        launch(plan, tmp_path / "parts", resume=True)
    with pytest.raises(UserError, match="holds checkpoints of another run; add --resume"):
        launch(plan, tmp_path / "parts")


def test_divergence_stops_every_rank_and_names_the_step(tmp_path, text):
    plan = tiny_plan(HYBRID, data=text, optimizer={"learning_rate": 1e30, "warmup_steps": 0, "gradient_clip": 0})
    with pytest.raises(UserError, match=r"^step [2-6]: (loss|grad_norm) = (nan|inf)"):
        launch(plan, tmp_path / "run")
    assert not (tmp_path / "run" / "measurement.json").exists()


def test_a_peak_above_the_budget_is_a_warning_that_names_the_rank(tmp_path, text, capfd):
    plan = tiny_plan(Strategy(), data=text).model_copy(update={"memory_budget_bytes": 100_000})
    launch(plan, tmp_path / "run", steps=2)
    assert "warning: rank 0 holds" in capfd.readouterr().out
