"""The Slurm job of a plan: clean scripts, and a real two-node Slurm on this host that trains with them."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.export.plans import plan_for
from tests.plans import tiny_plan
from tests.ports import free_ports

from pipermoe.cli.app import run
from pipermoe.export import cluster_of, export_plan
from pipermoe.export.slurm import batch_script
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.documents import load, save, write_files
from pipermoe.specs.plan import Measurement, Plan, RuntimeName
from pipermoe.specs.strategy import Strategy

TRAINED = "pp2 dp2 ep2 mbs1 1f1b"


def job_files(plan: Plan, system: RuntimeName, ranks_per_node: int, *, gpus: bool = True) -> dict[str, str]:
    script = batch_script(plan.name, cluster_of(plan, ranks_per_node), gpus=gpus, time="00:10:00")
    return export_plan(plan, system, ranks_per_node).files | {"job.sbatch": script}


def test_the_plan_travels_with_the_job(tmp_path):
    plan = tiny_plan(Strategy.parse(TRAINED))
    write_files(tmp_path, job_files(plan, "pipermoe", 2))
    assert load(tmp_path / "plan.toml", Plan) == plan
    assert os.access(tmp_path / "launch.sh", os.X_OK)
    script = (tmp_path / "job.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --gpus-per-node=2\n" in script


def test_what_is_not_given_is_left_to_the_cluster():
    script = batch_script("a name, with signs", cluster_of(tiny_plan(Strategy.parse(TRAINED)), 2), gpus=False, time="1")
    assert "#SBATCH --job-name=a-name--with-signs\n" in script
    assert not {"gpus", "partition", "account"} & {
        line[10:].split("-")[0].split("=")[0] for line in script.splitlines()
    }


@pytest.mark.parametrize("limit", ["90", "90:30", "24:00:00", "7-12", "7-12:30:00", "UNLIMITED"])
def test_the_command_takes_a_limit_in_every_form_that_slurm_has(limit, tmp_path):
    plan, job = save(tmp_path / "plan.toml", tiny_plan(Strategy.parse(TRAINED))), tmp_path / "job"
    assert run(["export", "slurm", "--plan", str(plan), "-o", str(job), "--time", limit, "--cpu"]) == 0
    assert f"#SBATCH --time={limit}\n" in (job / "job.sbatch").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("system", ["pipermoe", "megatron", "torchtitan", "deepspeed"])
def test_shellcheck_finds_nothing_in_the_scripts(system, tmp_path):
    foreign = plan_for("pp1 dp8 ep8 mbs1 1f1b z2/0", model=load_model("qwen3-30b-a3b"))
    plan = tiny_plan(Strategy.parse(TRAINED)) if system == "pipermoe" else foreign
    write_files(tmp_path, job_files(plan, system, 2))
    scripts = [tmp_path / "launch.sh", tmp_path / "job.sbatch"]
    found = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES State=UP
"""


@pytest.fixture
def two_nodes(tmp_path) -> Iterator[dict[str, str]]:
    """The environment of a Slurm of two nodes on this host: munge, controller and both node daemons, all ours."""
    folder, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    folder.mkdir(mode=0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host, ports=free_ports(3)))
    environment = os.environ | {"SLURM_CONF": str(conf)}
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D", "-f", str(conf)],
        *(["slurmd", "-D", "-f", str(conf), "-N", node] for node in ("n1", "n2")),
    ]
    started: list[subprocess.Popen] = []
    try:
        for command in commands:
            with (folder / f"{len(started)}.log").open("wb") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_until(lambda: (folder / "munge.socket").exists(), 20)
        ready = ["sinfo", "--noheader", "--format=%D %t"]
        wait_until(lambda: subprocess.check_output(ready, env=environment, text=True).strip() == "2 idle", 60)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            process.wait(timeout=30)


def wait_until(condition, seconds: float) -> None:
    """Ask every tenth of a second: daemons of others tell nobody when they are ready."""
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except subprocess.CalledProcessError:
            pass
        assert time.monotonic() < end, "not ready in time"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))),
    reason="needs slurm-wlm and munge, and to be root",
)
def test_a_two_node_slurm_trains_the_plan(tmp_path, two_nodes):
    plan = tiny_plan(Strategy.parse(TRAINED), steps=3)
    write_files(tmp_path / "job", job_files(plan, "pipermoe", 2, gpus=False))
    environment = two_nodes | {
        "MASTER_ADDR": "127.0.0.1",  # both nodes are this host, which knows no n1
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    submitted = subprocess.run(
        ["sbatch", "--wait", "job.sbatch"], cwd=tmp_path / "job", env=environment, capture_output=True, text=True
    )
    log = "".join(path.read_text() for path in (tmp_path / "job").glob("*.log"))
    assert submitted.returncode == 0, submitted.stderr + log
    measured = load(tmp_path / "job" / "run" / "measurement.json", Measurement)
    assert measured.steps == 3
    assert len(measured.report.ranks) == 4
