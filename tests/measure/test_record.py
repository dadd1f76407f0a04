"""A measurement that was cut off goes on behind its last section; ranks that others have started measure as well."""

import dataclasses
import multiprocessing
import os

import pytest
from tests.ports import free_ports

from pipermoe.measure import measure_platform
from pipermoe.measure.record import Record, Settings, keep_section, open_record, to_plain
from pipermoe.measure.samples import Point
from pipermoe.measure.sizes import QUICK, Widths
from pipermoe.specs.documents import load
from pipermoe.specs.errors import MachineError, UserError

FASTEST = dataclasses.replace(
    QUICK, tokens=(64,), rows_per_expert=(8, 64), seq_lens=(64,), pass_tokens=(64,), element_counts=(2**10, 2**16),
    parameter_counts=(2**14,), message_bytes=(2**12, 2**16, 2**18), compute_seconds=1e-3, message_seconds=2e-3,
    crowd_seconds=0.02,
)  # fmt: skip
SETTINGS = Settings(
    ranks=2, ranks_per_host=2, device="cpu", device_bytes=0, reserved_bytes=0, precision="fp32", widths=Widths(),
    effort=QUICK, software={"torch": "2.13"},
)  # fmt: skip


@pytest.fixture
def fastest(monkeypatch):
    monkeypatch.setattr("pipermoe.measure.sizes.QUICK", FASTEST)


def test_sections_add_up_rank_by_rank(tmp_path):
    file = tmp_path / "record.json"
    record = open_record(file, SETTINGS)
    ranks = [{"gemm": [Point(1, 2, 3.0)], "noise": [Point(1, 1, rank)]} for rank in (1.0, 2.0)]
    record = keep_section(file, record, "products", [to_plain(points) for points in ranks])
    record = keep_section(file, record, "attention", [to_plain({"noise": points["noise"]}) for points in ranks])
    again = open_record(file, SETTINGS)
    assert again == record
    assert [points["noise"] for points in again.points_of_ranks()] == [(Point(1, 1, r),) * 2 for r in (1.0, 2.0)]


def test_a_record_of_other_settings_or_a_broken_one_is_not_continued(tmp_path, capsys):
    file = tmp_path / "record.json"
    keep_section(file, Record(settings=SETTINGS), "products", [{}, {}])
    assert open_record(file, SETTINGS.model_copy(update={"reserved_bytes": 5})).sections
    assert not open_record(file, SETTINGS.model_copy(update={"precision": "bf16"})).sections
    file.write_text(file.read_text()[:99])
    assert not open_record(file, SETTINGS).sections
    assert "measuring anew" in capsys.readouterr().err


@pytest.mark.distributed
def test_a_second_run_continues_what_the_first_has_measured(fastest, tmp_path, monkeypatch, capfd):
    file = tmp_path / "machine.partial.json"

    def no_network(*_: object) -> dict:
        raise RuntimeError("cable cut")

    with monkeypatch.context() as patched:
        patched.setattr("pipermoe.measure.collectives.Network.measure", no_network)
        with pytest.raises(MachineError, match="while measuring collectives of 2 ranks: RuntimeError: cable cut"):
            measure_platform(nproc=2, quick=True, record=file)
    before = load(file, Record)
    assert list(before.sections)[-1] == "all ranks at once"
    capfd.readouterr()
    platform = measure_platform(nproc=2, quick=True, record=file)
    after = load(file, Record)
    assert {name: after.sections[name] for name in before.sections} == before.sections
    assert platform is not None
    assert platform.levels[0].ranks == 2
    assert "measuring matrix products" not in capfd.readouterr().err


def as_torchrun(rank: int, port: int, answers) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    platform = measure_platform(quick=True)
    answers.put((rank, None if platform is None else platform.levels[-1].ranks))


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_torchrun_has_started_measure_together(fastest):
    [port] = free_ports(1)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=as_torchrun, args=(rank, port, answers)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    assert dict(answers.get(timeout=60) for _ in ranks) == {0: 2, 1: None}
    for rank in ranks:
        rank.join(timeout=20)


def test_nproc_beside_torchrun_is_refused(monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="--nproc = 4: torchrun has started the ranks already"):
        measure_platform(nproc=4)
