"""Torch's CSV format: round trips, what torch itself wrote, and errors for what is not a schedule."""

import pytest
from hypothesis import given
from tests.schedule.grids import NAMES, SLOWLY, pipelines

from pipermoe.schedule.builders import build
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.sharding import with_gathered_weights, with_reduction
from pipermoe.schedule.torch_csv import parse_action, read_csv, to_csv, write_csv
from pipermoe.specs.errors import UserError


@SLOWLY
@given(pipelines(names=[name for name in NAMES if name != "dualpipe"], most_ranks=4, most_microbatches=9))
def test_a_schedule_survives_the_round_trip(tmp_path_factory, schedule):
    path = tmp_path_factory.mktemp("csv") / f"{schedule.name}.csv"
    for form in (schedule, with_communication(with_gathered_weights(with_reduction(schedule)))):
        write_csv(form, path)
        assert read_csv(path) == form


def test_the_text_is_what_torch_prints():
    assert to_csv(build("dualpipe-v", 1, 3, 2)) == (
        "0F0,1F0,0F1,1B0,(1F1;0B0)OVERLAP_F_B,(0F2;1B1)OVERLAP_F_B,(1F2;0B1)OVERLAP_F_B,1B2,0I2,0W2\n"
    )


def test_empty_cells_are_idle_time(tmp_path):
    path = tmp_path / "padded.csv"
    path.write_text("0F0,,,0B0\n,1F0,1B0,\n")
    assert read_csv(path).ranks == build("gpipe", 2, 1).ranks


def test_two_copies_of_a_model_have_no_csv(tmp_path):
    with pytest.raises(UserError, match=r"schedule = 'dualpipe': has no CSV form; nearest: dualpipe-v"):
        write_csv(build("dualpipe", 2, 4), tmp_path / "x.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0F0,0Q0\n",
            "line 1, cell 2 = '0Q0': must be like 0F1, 1UNSHARD or (0F2;1B0)OVERLAP_F_B; kinds: F, B, I, W, ",
        ),
        ("0F0,0F\n", "line 1, cell 2 = '0F': must be like 0F1"),
        ("0F0,0B0\n1UNSHARD3", "line 2, cell 1 = '1UNSHARD3': must be like 0F1"),
        ("", "holds no actions; expected one line per rank with cells such as 0F0"),
        ("0UNSHARD\n", "number of F actions = 0: must be stages * micro-batches"),
        ("999999999F0\n", "number of F actions = 1: must be stages * micro-batches = 1000000000 * 1"),
        ("0F0,0B0\n1B0,1F0\n", "is not a complete schedule that can run: rank 1: comes before what it needs: 1B0, 1F0"),
        ("0F0,0F1,0B0\n", "is not a complete schedule that can run: rank 0: is missing: 0B1"),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_csv(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_csv(tmp_path / "binary.csv")


@pytest.mark.parametrize("text", ["0F0", "12RECV_B7", "3UNSHARD", "(0F2;1B0)OVERLAP_F_B", "1REDUCE_GRAD"])
def test_an_action_reads_as_it_prints(text):
    assert str(parse_action(text)) == text
