"""The whole run, as `pipermoe train` does it: learns, equals one process, resumes bit for bit, reports what it used."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from tests.plans import TINY_MODEL, tiny_plan

from pipermoe.resources.flops import model_forward_flops
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.schedule.builders import build
from pipermoe.specs.documents import load
from pipermoe.specs.errors import UserError
from pipermoe.specs.mesh import coordinates
from pipermoe.specs.plan import Measurement
from pipermoe.specs.report import TERMS
from pipermoe.specs.strategy import Strategy
from pipermoe.training.launch import launch
from pipermoe.training.run import Run

pytestmark = pytest.mark.distributed
HYBRID = Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2, zero_dense=1, zero_expert=1)
MIRRORED = Strategy.parse("pp2 dp2 ep2 dualpipe z2/3")
FASTER = {"optimizer": {"learning_rate": 0.01, "warmup_steps": 2}}


@pytest.fixture
def text(tmp_path):
    """A small corpus, so that a test does not read the standard library."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the square of {n} is {n * n}.\n" for n in range(2000)))
    return {"paths": (str(path),)}


@pytest.mark.parametrize("spread", [HYBRID, pytest.param(MIRRORED, marks=pytest.mark.slow)], ids=["1f1b", "dualpipe"])
def test_a_hybrid_run_learns_what_one_process_learns_and_reports_it(tmp_path, text, capfd, spread):
    runs = {}
    for strategy in (Strategy(), spread):
        plan = tiny_plan(strategy, data=text, z_loss=0.01, **FASTER)
        runs[strategy] = launch(plan, Run(tmp_path / strategy.compact().replace("/", "-")))
    one, hybrid = runs[Strategy()], runs[spread]
    assert one is not None
    assert hybrid is not None
    assert hybrid.losses == pytest.approx(one.losses, rel=1e-5)
    assert hybrid.validation_loss_before == pytest.approx(one.validation_loss_before, rel=1e-5)
    assert hybrid.validation_loss_after == pytest.approx(one.validation_loss_after, rel=1e-5)
    assert hybrid.validation_loss_after < hybrid.validation_loss_before - 0.5
    assert len(hybrid.losses) == hybrid.steps == 6
    assert hybrid.measured_steps == len(hybrid.step_seconds) == 3

    folder = tmp_path / spread.compact().replace("/", "-")
    assert load(folder / "measurement.json", Measurement) == hybrid
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert tuple(line["loss"] for line in lines) == hybrid.losses
    assert [line["validation_loss"] for line in lines] == [None] * 5 + [hybrid.validation_loss_after]
    for line in lines:
        assert len(line["expert_load"]) == len(line["dead_experts"]) == 2
        assert all(1 <= load <= 4 for load in line["expert_load"])
        assert line["z_loss"] > 0
        assert line["resident_bytes"] > 2**20
    assert sum(lines[-1]["memory_bytes"].values()) == lines[-1]["peak_bytes"]
    alone = json.loads((tmp_path / Strategy().compact() / "steps.jsonl").read_text().splitlines()[0])
    for name in ("expert_load", "dead_experts", "z_loss", "auxiliary_loss", "grad_norm"):
        assert lines[0][name] == pytest.approx(alone[name], rel=1e-5)
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


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        (HYBRID, "fp32"),
        pytest.param(HYBRID, "bf16", marks=pytest.mark.slow),
        pytest.param(MIRRORED, "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_stopped_and_resumed_equals_one_that_did_not(tmp_path, text, strategy, precision):
    plan = tiny_plan(strategy, data=text, checkpoint_every=2, precision=precision, **FASTER)
    whole = launch(plan, Run(tmp_path / "whole", quiet=True))
    launch(plan, Run(tmp_path / "parts", steps=4, quiet=True), resume=True)  # there is nothing yet: it begins
    rest = launch(plan, Run(tmp_path / "parts", quiet=True), resume=True)
    assert whole is not None
    assert rest is not None
    assert rest.losses == whole.losses[4:]
    assert rest.validation_loss_after == whole.validation_loss_after
    lines = (tmp_path / "parts" / "steps.jsonl").read_text().splitlines()
    assert tuple(json.loads(line)["loss"] for line in lines) == whole.losses
    with pytest.raises(UserError, match="has trained 6 of 6 steps already"):
        launch(plan, Run(tmp_path / "parts"), resume=True)
    with pytest.raises(UserError, match="holds checkpoints of another run; add --resume"):
        launch(plan, Run(tmp_path / "parts"))


def test_divergence_stops_every_rank_and_names_the_step(tmp_path, text):
    plan = tiny_plan(HYBRID, data=text, optimizer={"learning_rate": 1e30, "warmup_steps": 0, "gradient_clip": 0})
    with pytest.raises(UserError, match=r"^step [2-6]: (loss|grad_norm) = (nan|inf)"):
        launch(plan, Run(tmp_path / "run"))
    assert not (tmp_path / "run" / "measurement.json").exists()


def test_a_step_that_is_not_finite_is_skipped_by_all_ranks_and_changes_nothing(tmp_path, text, monkeypatch):
    step, calls = Engine.step, []

    def poisoned(self, batch):
        calls.append(batch)
        if len(calls) == 3 and self.groups.rank == 1:
            gradient = next(parameter.grad for _, parameter in self.named_parameters())
            assert gradient is not None
            gradient[0] = float("inf")  # what the step adds to; after it the sums over ranks are on their way
        return step(self, batch)

    monkeypatch.setattr(Engine, "step", poisoned)
    plan = tiny_plan(HYBRID, data=text, on_nonfinite="skip", validate_every=1, **FASTER)
    measurement = launch(plan, Run(tmp_path / "skip", quiet=True))
    assert measurement is not None
    lines = [json.loads(line) for line in (tmp_path / "skip" / "steps.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, False, True, False, False, False]
    assert lines[2]["grad_norm"] is None
    losses = [line["validation_loss"] for line in lines]
    assert losses[2] == losses[1]
    assert losses[3] < losses[2]
    stopping = plan.model_copy(update={"train": plan.train.model_copy(update={"on_nonfinite": "stop"})})
    with pytest.raises(UserError, match=r"^step 3: grad_norm = (inf|nan): training diverged"):
        launch(stopping, Run(tmp_path / "stop", quiet=True))


@pytest.mark.parametrize("arrangement", ["pp2 dp2 ep2 1f1b", "pp2 vpp2 dp2 ep2 dualpipe-v"])
def test_the_trace_of_a_step_shows_the_actions_of_the_schedule_without_overlap(tmp_path, text, arrangement):
    strategy = Strategy.parse(arrangement)
    plan = tiny_plan(strategy, data=text, steps=4)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"num_layers": 4})})
    launch(plan, Run(tmp_path, trace_steps=frozenset({4}), quiet=True))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    schedule = build(strategy.schedule, 2, 4, strategy.virtual_stages)
    for rank in range(4):
        own = {lanes[e["pid"], e["tid"]] for e in events if e["ph"] == "X" and e["pid"] == rank}
        assert {"compute", "all-to-all", "point-to-point", "reduce"} <= own
        names = {
            e["name"] for e in events if e["ph"] == "X" and e["cat"] in ("forward", "backward") and e["pid"] == rank
        }
        assert names == {str(action) for action in schedule.parts(coordinates(strategy, rank).pp)}
    for lane in lanes:
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == lane)
        assert all(end <= start + 1e-3 for (_, end), (start, _) in pairwise(spans))


def test_tensorboard_shows_every_number(tmp_path, text):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plan = tiny_plan(Strategy(), data=text, steps=2)
    launch(plan, Run(tmp_path / "run", tensorboard=tmp_path / "board", quiet=True))
    events = reader.EventAccumulator(str(tmp_path / "board")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert {"expert_load/1", "seconds_by_term/forward"} <= set(events.Tags()["scalars"])


def test_tensorboard_without_its_package_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pipermoe.training.tensorboard.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pipermoe\[tensorboard\]'"):
        launch(tiny_plan(Strategy()), Run(tmp_path / "run", tensorboard=tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_peak_above_the_budget_is_a_warning_that_names_the_rank(tmp_path, text, capfd):
    plan = tiny_plan(Strategy(), data=text).model_copy(update={"memory_budget_bytes": 100_000})
    launch(plan, Run(tmp_path / "run", steps=2))
    assert "warning: rank 0 holds" in capfd.readouterr().out


@pytest.mark.parametrize(
    "mechanism",
    ["decoupled", pytest.param("bound", marks=pytest.mark.slow), pytest.param("sparse", marks=pytest.mark.slow)],
)
def test_a_run_whose_experts_move_learns_what_one_learns_whose_experts_stay(tmp_path, text, mechanism):
    parallel = Strategy(data_parallel=2, expert_parallel=2)
    balance = {"policy": "balanced", "mechanism": mechanism, "spare_slots": 1, "every_steps": 1, "threshold": 1.0}
    still = launch(tiny_plan(parallel, data=text, **FASTER), Run(tmp_path / "still", quiet=True))
    moving = launch(tiny_plan(parallel, data=text, balance=balance, **FASTER), Run(tmp_path / "moving", quiet=True))
    assert still is not None
    assert moving is not None
    assert moving.losses == pytest.approx(still.losses, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "moving" / "steps.jsonl").read_text().splitlines()]
    layouts = [line["expert_layout"] for line in lines]
    assert all(len(layout["rank_load"]) == 2 and layout["abandoned"] == 0 for layout in layouts)
    if mechanism == "decoupled":  # which moves for nothing, so that any gain pays
        assert layouts[-1]["version"] > 0
        assert sum(layout["moved"] for layout in layouts) > 0
    assert json.loads((tmp_path / "still" / "steps.jsonl").read_text().splitlines()[0])["expert_layout"] is None


@pytest.mark.slow
def test_a_run_that_spills_after_the_router_learns_the_same_and_says_how_many_copies_it_made(tmp_path, text):
    parallel = Strategy(data_parallel=2, expert_parallel=2)
    still = launch(tiny_plan(parallel, data=text, **FASTER), Run(tmp_path / "still", quiet=True))
    for name, balance in {
        "alone": {},
        "with moves": {"policy": "balanced", "every_steps": 1, "threshold": 1.0},
    }.items():
        plan = tiny_plan(parallel, data=text, balance={"spill_above": 1.0, **balance}, **FASTER)
        spilling = launch(plan, Run(tmp_path / name, quiet=True))
        assert still is not None
        assert spilling is not None
        assert spilling.losses == pytest.approx(still.losses, rel=1e-5)
        lines = [json.loads(line) for line in (tmp_path / name / "steps.jsonl").read_text().splitlines()]
        layouts = [line["expert_layout"] for line in lines]
        assert sum(layout["spilled"] for layout in layouts) > 0
        assert all(load < 1.01 for layout in layouts for load in layout["rank_load"]), "exact balance was asked for"
        assert (layouts[-1]["version"] > 0) == (name == "with moves")


def test_what_does_not_move_is_refused_with_its_key(tmp_path, text):
    parallel = Strategy(data_parallel=2, expert_parallel=2)
    moving = {"policy": "balanced", "mechanism": "bound"}
    refusals = {
        r"balance\.policy = 'swap': must be one of static, ": (parallel, {"policy": "swap"}),
        r"balance\.policy = 'balanced': experts have nowhere to move": (Strategy(), moving),
        r"balance\.spill_above = 1\.1: experts have nowhere to move": (Strategy(), {"spill_above": 1.1}),
        r"strategy\.dispatcher = 'deduplicated': experts that move need": (
            parallel.model_copy(update={"dispatcher": "deduplicated"}),
            {"spill_above": 1.1},
        ),
        r"strategy\.schedule = 'dualpipe': holds every stage on two ranks": (
            Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2, schedule="dualpipe"),
            {"spill_above": 1.1},
        ),
        r"strategy\.zero_expert = 1: .* \"bound\" have at most 0": (
            Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2, zero_expert=1),
            moving,
        ),
    }
    for message, (strategy, balance) in refusals.items():
        with pytest.raises(UserError, match=message):
            launch(tiny_plan(strategy, data=text, balance=balance), Run(tmp_path / "run"))


@pytest.mark.slow
def test_a_run_whose_experts_have_moved_resumes_where_they_lay(tmp_path, text):
    balance = {"policy": "balanced", "spare_slots": 1, "every_steps": 1, "threshold": 1.0}
    strategy = Strategy(data_parallel=2, expert_parallel=2)
    plan = tiny_plan(strategy, data=text, balance=balance, checkpoint_every=2, **FASTER)
    whole = launch(plan, Run(tmp_path / "whole", quiet=True))
    launch(plan, Run(tmp_path / "parts", steps=4, quiet=True))
    rest = launch(plan, Run(tmp_path / "parts", quiet=True), resume=True)
    assert whole is not None
    assert rest is not None
    assert rest.losses == pytest.approx(whole.losses[4:], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "steps.jsonl").read_text().splitlines()]
    before = lines[3]["expert_layout"]
    record = json.loads((tmp_path / "parts" / "checkpoints" / "step-000004" / "checkpoint.json").read_text())
    assert 0 < before["version"] <= record["layout"]["version"] <= lines[4]["expert_layout"]["version"]
    assert len(record["layout"]["slots"]) == 2
