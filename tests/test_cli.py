"""The command line as a user meets it: help, files that the next command reads, and one line for every mistake."""

import json
import re
from pathlib import Path

import pytest
from tests.plans import tiny_plan
from tests.resources.cases import MODEL, machine

from pipermoe.cli import main
from pipermoe.cli.app import COMMANDS
from pipermoe.cli.demo import loop
from pipermoe.specs.documents import load, save
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy import Strategy

PLAN = ["plan", "model.toml", "--platform", "machine.toml", "--job", "job.toml"]
PREDICT = ["predict", "model.toml", "--platform", "machine.toml", "--job", "job.toml", "--strategy"]
JOB = "seq_len = 32\nglobal_batch_size = 16\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a platform, a model and a job, from which the commands are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    save("machine.toml", machine(ranks=4))
    save("model.toml", MODEL)
    Path("job.toml").write_text(JOB)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return int(exit_.value.code or 0)


def plan(*arguments: str) -> int:
    return run(*PLAN, *arguments)


@pytest.mark.parametrize("command", [command.__name__.replace("_", "-") for command in COMMANDS])
def test_every_command_has_help_and_json(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "Usage: pipermoe" in text
    assert "--json" in text


def test_a_plan_is_written_where_train_reads_it(folder, capsys):
    assert plan("-o", "plan.toml") == 0
    assert "CHOSEN" in capsys.readouterr().out
    written = load("plan.toml", Plan)
    assert written.strategy.world_size == 4
    assert written.inputs


def test_json_on_stdout_is_json_alone(folder, capsys):
    assert plan("--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert next(iter(result)) == "schema_version"
    assert Plan.model_validate(result["plan"]) == load("plan.toml", Plan)


def test_a_given_strategy_is_explained_and_written_as_a_plan(folder, capsys):
    assert run(*PREDICT, "pp2 dp2 ep2 mbs1 z1/0", "-o", "given.toml") == 0
    assert "GIVEN" in capsys.readouterr().out
    assert run(*PREDICT, "given.toml", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert Plan.model_validate(result["plan"]) == load("given.toml", Plan)
    assert result["explanation"]["alternatives"]


def test_options_win_over_the_job_file(folder):
    assert plan("--seq-len", "64", "--memory", "512MiB") == 0
    written = load("plan.toml", Plan)
    assert (written.train.seq_len, written.train.global_batch_size) == (64, 16)
    assert written.memory_budget_bytes == 512 * 2**20


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "model.toml"], "--platform"),
        (["plan", "model.toml", "--platform", "none.toml"], "none.toml: no such file"),
        (["plan", "no-model", "--platform", "machine.toml", "--job", "job.toml"], "no-model"),
        (["plan", "model.toml", "--platform", "machine.toml"], "--seq-len and --global-batch must be given"),
        ([*PLAN[:-1], "machine.toml"], "machine.toml: "),
        (["plan", "model.toml", "--platform", "job.toml", "--job", "job.toml"], "job.toml"),
        ([*PLAN, "--memory", "much"], "= 'much'"),
        ([*PLAN, "--memory=-1GiB"], "positive"),
        ([*PLAN, "--ranks", "0"], "0"),
        ([*PLAN, "--top", "0"], "top = 0"),
        ([*PLAN, "--seq-len", "0"], "seq_len = 0"),
        ([*PLAN, "--ranks", "4", "--nodes", "1"], "give one of them"),
        ([*PLAN, "--imbalance", "0.5"], "imbalance = 0.5: is the busiest rank's rows over the mean: from 1 to"),
        ([*PREDICT, "pp2 dp2 ep2", "--imbalance", "nan"], "imbalance = nan: "),
        ([*PREDICT, "pp2 dp2 ep2", "--headroom", "100"], "headroom = '100%': must be at least 0 and less than 100 %"),
        ([*PREDICT, "pp2 dp2 ep2 mbs3"], "must divide global_batch_size = 16"),
        ([*PREDICT, "pp2 dp2 ep2 zb-v"], "strategy.virtual_stages = 1: zb-v needs exactly 2"),
        ([*PLAN, "--target", "soon"], "100B tokens in 3 days"),
        ([*PLAN, "--target", "1B tokens in 1 day", "--gpus", "4"], "leave --ranks and --nodes out"),
        ([*PLAN, "--price", "2"], "--tokens"),
        ([*PLAN, "--tokens", "many"], "--tokens = 'many'"),
        ([*PLAN, "--objective", "device-hours"], "give --tokens"),
        ([*PLAN, "--plot", "front.gif"], "plot = 'front.gif': must end in .svg or .png"),
        (
            ["sweep", "model.toml", "--platform", "machine.toml", "--gpus", "1,x", "--job", "job.toml"],
            "--ranks = '1,x'",
        ),
        (["compare-platforms", "model.toml", "--platforms", "x", "--gpus", "1", "--job", "job.toml"], "'x'"),
        ([*PREDICT, "none.toml"], "none.toml: no such file"),
        (["dryrun", "--model", "model.toml", "--rank", "0"], "--plan, or --model and --strategy"),
        (["train", "--plan", "job.toml"], "job.toml: "),
        (["train", "--plan", "none.toml"], "none.toml: no such file"),
        (["compare", "--plan", "job.toml", "--run", "."], "measurement.json: no such file"),
        (["describe", "no-model"], "no-model"),
        (["schedule", "2f2b"], "2f2b"),
        (["schedule", "1f1b", "--pp", "zero"], "--pp"),
        (
            ["balance", "tiny-none", "--ranks", "8", "--nodes", "3"],
            "--nodes = 3: must divide --ranks = 8; nearest: 2, 4",
        ),
        (["balance", "tiny-none", "--slots", "0"], "32 experts on 64 ranks need at least 1 slots a rank"),
        (["balance", "tiny-none", "--policy", "best"], "--policy = 'best': must be one of static, "),
        (["balance", "tiny-none", "--plan", "plan.toml"], "--plan and --platform go together"),
        (["balance", "model.toml"], "a trace is a .npz, .csv or .jsonl file"),
        (["export", "slurm", "--plan", "plan.toml", "--time", "soon"], "--time = 'soon': must be a limit of Slurm"),
        (["measure", "--nproc", "0"], "nproc = 0"),
        (["measure", "--colour"], "--colour"),
        (["teleport"], "teleport"),
    ],
)
def test_a_mistake_is_told_on_stderr_and_exits_with_2(folder, capsys, arguments, expected):
    before = sorted(folder.iterdir())
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(folder.iterdir()) == before


def test_ranks_that_cannot_be_arranged_name_the_numbers_that_can(folder, capsys):
    assert plan("--ranks", "7") == 2
    assert re.search(r"7.*\d", capsys.readouterr().err)
    assert not Path("plan.toml").exists()


def test_when_nothing_fits_the_exit_code_is_3_and_the_lack_is_named(folder, capsys):
    assert plan("--memory", "1MiB") == 3
    assert re.search(r"[KM]iB", capsys.readouterr().err)
    assert not Path("plan.toml").exists()


def test_an_impossible_strategy_in_a_plan_is_refused_before_any_rank_starts(folder, capsys):
    good = tiny_plan(Strategy(data_parallel=4, expert_parallel=4))
    experts = good.model.moe.num_experts
    broken = good.model_copy(update={"strategy": Strategy(data_parallel=3, expert_parallel=3)})
    save("plan.toml", broken)
    assert run("train", "--plan", "plan.toml") == 2
    message = capsys.readouterr().err
    assert f"strategy.expert_parallel = 3: must divide num_experts = {experts}" in message
    assert not Path("run").exists()


def test_a_path_that_cannot_be_written_is_known_before_the_search(folder, capsys):
    assert plan("-o", "job.toml/plan.toml") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_demo_is_the_loop_and_each_command_reads_what_the_last_one_wrote(tmp_path):
    commands = loop(tmp_path)
    assert [arguments[0] for arguments in commands] == ["measure", "plan", "train", "compare"]
    written = set()
    for arguments in commands:
        reads = {arguments[i + 1] for i, word in enumerate(arguments) if word in ("--platform", "--plan", "--run")}
        assert reads <= written
        written |= {arguments[i + 1] for i, word in enumerate(arguments) if word == "-o"}
