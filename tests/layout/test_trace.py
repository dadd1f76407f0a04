"""Traces: what is read, and what is refused by name."""

import json

import numpy as np
import pytest

from pipermoe.layout.trace import read_trace, shipped_traces
from pipermoe.specs.errors import UserError

COUNTS = np.arange(24).reshape(2, 3, 4)


def npz(folder, **arrays) -> str:
    np.savez(folder / "trace.npz", **arrays)
    return str(folder / "trace.npz")


@pytest.mark.parametrize("name", shipped_traces())
def test_the_shipped_traces_are_of_one_model_that_sees_the_same_tokens(name):
    trace = read_trace(name)
    assert trace.shape == (300, 4, 32)
    assert (trace.load_WLE.sum(2) == 3072).all()
    assert trace.routes_TLK is not None
    assert trace.routes_TLK.shape == (9216, 4, 2)


def test_counts_of_source_ranks_are_summed(tmp_path):
    split = np.stack([COUNTS, 2 * COUNTS], axis=2)
    assert (read_trace(npz(tmp_path, counts=split)).load_WLE == 3 * COUNTS).all()
    assert (read_trace(npz(tmp_path, load=COUNTS)).load_WLE == COUNTS).all()


def test_routes_alone_are_counted(tmp_path):
    routes = np.array([[[0, 1], [2, 3]], [[0, 2], [3, 2]]])
    trace = read_trace(npz(tmp_path, routes=routes))
    assert trace.load_WLE.tolist() == [[[1, 1, 0, 0], [0, 0, 1, 1]], [[1, 0, 1, 0], [0, 0, 1, 1]]]


def test_a_csv_holds_the_same(tmp_path):
    path = tmp_path / "trace.csv"
    lines = [f"{step * 100},{layer},{expert},{rows}" for (step, layer, expert), rows in np.ndenumerate(COUNTS) if rows]
    path.write_text("\n".join(["step,layer,expert,rows", *lines]) + "\n")
    assert (read_trace(str(path)).load_WLE == COUNTS).all()


def test_so_do_the_lines_of_a_run_found_by_its_folder(tmp_path):
    lines = [json.dumps({"step": step, "counts": counts.tolist()}) for step, counts in enumerate(COUNTS, start=1)]
    (tmp_path / "loads.jsonl").write_text("\n".join(lines) + "\n")
    trace = read_trace(str(tmp_path))
    assert (trace.load_WLE == COUNTS).all()
    assert trace.name == tmp_path.name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[1, 2]", 'line 2: must be {"step": ..., "counts": [[...], ...]}'),
        ('{"step": 2, "counts": [[1, 2], [3]]}', "must be rows of whole numbers, equally many in each layer"),
        ('{"step": 2, "counts": [[1.5, 2]]}', "must be rows of whole numbers"),
        ('{"step": 2, "counts": [[1, 2, 3]]}', "line 2: shape of counts = (1, 3): must be (layers, experts) as in"),
        ('{"step": 2, "counts": [[1, -2]]}', "counts[1, 0, 1] = -2: must not be negative"),
    ],
)
def test_lines_that_are_no_counts_are_named(tmp_path, line, expected):
    (tmp_path / "loads.jsonl").write_text('{"step": 1, "counts": [[1, 2]]}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        read_trace(str(tmp_path / "loads.jsonl"))
    assert expected in str(error.value)


def test_a_folder_without_loads_is_no_trace(tmp_path):
    with pytest.raises(UserError, match=r"loads\.jsonl: no such trace; a \.npz, \.csv or \.jsonl file"):
        read_trace(str(tmp_path))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"counts": COUNTS[0]}, "shape of counts = (3, 4): must be (steps, layers, experts)"),
        ({"counts": -COUNTS}, "counts[0, 0, 1] = -1: must not be negative"),
        ({"counts": COUNTS / 2}, "counts = 'float64': must be whole numbers"),
        ({"loss": COUNTS}, "has no array counts or routes, only loss"),
        ({"counts": COUNTS, "routes": np.zeros((5, 2, 1), dtype=int)}, "counts 3 layers and 4 experts"),
        ({"routes": np.full((5, 3), 9)}, "shape of routes = (5, 3)"),
    ],
)
def test_a_trace_that_is_none_names_file_array_and_rule(tmp_path, arrays, expected):
    with pytest.raises(UserError) as error:
        read_trace(npz(tmp_path, **arrays))
    assert str(error.value).startswith(str(tmp_path / "trace.npz"))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("trace.npz", b"PK not a zip", "not a trace"),
        ("trace.csv", b"step,layer\n0,0\n", "no column expert, rows; the header is step,layer,expert,rows"),
        (
            "trace.csv",
            b"step,layer,expert,rows\n0,0,1,-4\n",
            "line 2: rows = '-4': must be a whole number of 0 or more",
        ),
        ("trace.csv", b"step,layer,expert,rows\n", "holds no counts"),
        ("trace.txt", b"", "a trace is a .npz, .csv or .jsonl file"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"trace\.") as error:
        read_trace(str(tmp_path / name))
    assert expected in str(error.value)
