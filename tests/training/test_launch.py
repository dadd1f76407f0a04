"""Who started this process, and what is refused before a rank starts."""

from __future__ import annotations

import pytest
from tests.plans import tiny_plan

from pipermoe.processes.world import World, existing_world, first_host
from pipermoe.specs.errors import UserError
from pipermoe.specs.strategy import Strategy
from pipermoe.training.launch import launch
from pipermoe.training.run import Run

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_a_process_alone_has_no_world():
    assert existing_world({}) is None


def test_torchrun_and_srun_are_recognised():
    assert existing_world(TORCHRUN) == World("torchrun", 3, 4, 1, "tcp://10.0.0.1:29500")
    assert existing_world(SRUN) == World("srun", 5, 8, 1, "tcp://gpu03:23456")
    assert existing_world(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "7"}) == World("srun", 5, 8, 1, "tcp://a:7")


def test_a_batch_script_is_no_task_of_srun():
    assert existing_world({key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu[03-07,9],login1", "gpu03"), ("n[5,8]", "n5"), ("a1,b2", "a1"), ("r[1-2]-ib", "r1-ib")],
)
def test_the_first_host_of_a_compressed_list(nodes, first):
    assert first_host(nodes) == first


def test_half_a_torchrun_environment_is_an_error_that_names_what_is_missing():
    with pytest.raises(UserError, match="MASTER_PORT not; start with torchrun"):
        existing_world({key: value for key, value in TORCHRUN.items() if key != "MASTER_PORT"})
    with pytest.raises(UserError, match="RANK = 'x': must be a whole number"):
        existing_world(TORCHRUN | {"RANK": "x"})


def test_torchrun_inside_srun_is_torchrun_and_a_rank_that_contradicts_srun_is_refused():
    one_agent_per_node = SRUN | TORCHRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "TORCHELASTIC_RUN_ID": "none"}
    assert existing_world(one_agent_per_node) == World("torchrun", 3, 4, 1, "tcp://10.0.0.1:29500")
    agreeing = TORCHRUN | {"RANK": "5", "WORLD_SIZE": "8"}
    assert existing_world(SRUN | agreeing) == World("torchrun", 5, 8, 1, "tcp://10.0.0.1:29500")
    with pytest.raises(UserError, match="RANK = 3 of WORLD_SIZE = 4, but SLURM_PROCID = 5 of 8 tasks: unset RANK"):
        existing_world(SRUN | TORCHRUN)


def test_a_step_of_fewer_tasks_than_the_job_counts_its_own():
    assert existing_world(SRUN | {"SLURM_STEP_NUM_TASKS": "6"}) == World("srun", 5, 6, 1, "tcp://gpu03:23456")
    with pytest.raises(UserError, match="SLURM_PROCID = 5: must be below the 4 tasks"):
        existing_world(SRUN | {"SLURM_STEP_NUM_TASKS": "4"})
    with pytest.raises(UserError, match="RANK = 4: must be below WORLD_SIZE = 4"):
        existing_world(TORCHRUN | {"RANK": "4"})


def test_another_number_of_local_ranks_than_the_plans_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--nproc = 3: the plan is for 2 ranks \(pp2 dp1 ep1 z0\)"):
        launch(tiny_plan(Strategy(pipeline_parallel=2)), Run(tmp_path / "run"), nproc=3)
    for key, value in (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="--nproc = 1: torchrun has started the ranks already"):
        launch(tiny_plan(Strategy()), Run(tmp_path / "run"), nproc=1)


def test_a_world_of_another_size_is_refused_with_both_numbers(monkeypatch, tmp_path):
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"torchrun started 4 ranks, the plan is for 2 \(pp2 dp1 ep1 z0\)"):
        launch(tiny_plan(Strategy(pipeline_parallel=2)), Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path):
    output = tmp_path / "run"
    with pytest.raises(UserError, match=r"^plan\.toml: strategy\.expert_parallel = 3: "):
        launch(tiny_plan(Strategy(data_parallel=3, expert_parallel=3)), Run(output), where="plan.toml")
    with pytest.raises(UserError, match="--trace-steps: 7 is not a step of this run; they are 1 to 6"):
        launch(tiny_plan(Strategy()), Run(output, trace_steps=frozenset({7})))
    with pytest.raises(UserError, match="steps = 0: must be at least 1"):
        launch(tiny_plan(Strategy()), Run(output, steps=0))
    assert not output.exists()
    output.write_text("a file")
    with pytest.raises(UserError, match=r"run: cannot be made a folder"):
        launch(tiny_plan(Strategy()), Run(output))
