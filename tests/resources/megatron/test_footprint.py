"""All pipeline ranks as one record, and the command that shows it."""

import json

import pytest

from pipermoe.cli import main
from pipermoe.resources.megatron.footprint import footprint
from pipermoe.resources.megatron.job import Machine
from pipermoe.resources.megatron.peak import peak_memory

from .test_modules import job_of
from .test_reader import GIVEN


def test_the_record_holds_every_rank_and_knows_the_largest():
    job, machine = job_of("mixtral-8x7b", "pp4 dp8 ep8 mbs1 1f1b z1"), Machine.of(9)
    found = footprint(job, machine)
    peaks = [peak_memory(job, machine, rank).total for rank in range(4)]
    assert [rank.peak for rank in found.ranks] == peaks
    assert found.largest.peak == max(peaks)


def run(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(["megatron-memory", *words])
    return stopped.value.code, capsys.readouterr()


def test_the_command_prints_every_term_and_what_is_left_out(capsys):
    code, out = run(capsys, "--world-size", "8", "--json", "--", *GIVEN.split(), "--optimizer", "muon")
    assert code == 0
    found = json.loads(out.out)
    assert found["undescribed"] == ["optimizer = muon"]
    assert found["ranks"][0]["static"]["te_workspace"] == 32 * 2**20 + 1024
    code, out = run(capsys, "--world-size", "8", "--gpu", "ampere", "--", *GIVEN.split())
    assert "te workspace" in out.out
    assert "4.00 MiB" in out.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", *GIVEN.split()], "--world-size must be given"),
        (["--world-size", "8", "--imbalance", "0.5", "--", *GIVEN.split()], "--imbalance = 0.5: must be at least 1"),
        (["--world-size", "8", "--", "--num-layers", "8"], "Megatron arguments"),
        (["--world-size", "8", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    code, out = run(capsys, *words)
    assert code == 2
    assert message in out.err
