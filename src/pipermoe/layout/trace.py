"""Load traces: how many rows each expert of each layer got in every step of a run, and which experts tokens chose.

Three formats, described in docs/balance.md:
  .npz  `counts` (steps, layers, experts) or (steps, layers, source ranks, experts); `routes` (tokens, layers, choices),
        the experts of tokens, or (samples, tokens, layers, choices). One of the two is enough. `load` and `ids` are
        read as other names of them.
  .csv  a line `step,layer,expert,rows` for every count that is not 0, under a header with these names
  .jsonl  a line `{"step": 1, "counts": [[...], ...]}` for every step, the rows of each expert layer by layer: what
        `pipermoe train` writes
"""

# W steps, L MoE layers, P source ranks, E logical experts, T tokens, K choices of a token

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import UserError, describe_value

NAMES = {"counts": ("counts", "load"), "routes": ("routes", "ids")}
COLUMNS = ("step", "layer", "expert", "rows")
LOADS_FILE = "loads.jsonl"  # of a run
STEPS_OF_ROUTES = 10  # a trace of routes alone is cut into so many steps


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Rows of each expert in every step; `routes_TLK` are tokens of the end of the run, None if not recorded."""

    name: str
    load_WLE: NDArray[np.int64]
    routes_TLK: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(steps, layers, experts)."""
        steps, layers, experts = self.load_WLE.shape
        return steps, layers, experts

    @property
    def planning_routes(self) -> NDArray[np.int64] | None:
        """The first half of the tokens: what a policy may plan for."""
        return None if self.routes_TLK is None else self.routes_TLK[: len(self.routes_TLK) // 2]

    @property
    def unseen_routes(self) -> NDArray[np.int64] | None:
        """The second half: what it is judged by."""
        return None if self.routes_TLK is None else self.routes_TLK[len(self.routes_TLK) // 2 :]


def shipped_traces() -> list[str]:
    """The names of the traces that come with the package."""
    return sorted(entry.name.removesuffix(".npz") for entry in _shipped().iterdir() if entry.name.endswith(".npz"))


def read_trace(reference: str) -> Trace:
    """The trace of a file, of a run's folder, or a shipped one by name. Raises `UserError`."""
    if reference in shipped_traces():
        with resources.as_file(_shipped() / f"{reference}.npz") as path:
            return _read_npz(path)
    path = Path(reference)
    if path.is_dir():
        path /= LOADS_FILE
    if not path.is_file():
        known = f"a run's folder with {LOADS_FILE}, or one of {', '.join(shipped_traces())}"
        raise UserError(f"{path}: no such trace; a {KINDS} file, {known}")
    if path.suffix not in READERS:
        raise UserError(f"{path}: a trace is a {KINDS} file")
    return READERS[path.suffix](path)


def _shipped():
    return resources.files("pipermoe") / "catalogue" / "traces"


def _read_npz(path: Path) -> Trace:
    try:
        with np.load(path, allow_pickle=False) as file:
            counts, routes = (_array(path, file, names) for names in NAMES.values())
            held = ", ".join(file.files)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a trace: {error}") from None
    if counts is None and routes is None:
        raise UserError(f"{path}: has no array counts or routes, only {held or 'nothing'}")
    if routes is not None:
        routes = _checked_routes(path, routes)
    if counts is not None:
        load = _checked_counts(path, counts)
    elif routes is not None:
        load = _load_of_routes(routes)
    if routes is not None and (routes.shape[1] != load.shape[1] or routes.max() >= load.shape[2]):
        has = f"{routes.shape[1]} layers and experts up to {routes.max()}"
        raise UserError(f"{path}: routes have {has}, counts {load.shape[1]} layers and {load.shape[2]} experts")
    return Trace(path.stem, load, routes)


def _array(path: Path, file, names: tuple[str, ...]) -> NDArray | None:
    for name in names:
        if name in file.files:
            if not np.issubdtype(file[name].dtype, np.integer):
                raise UserError(describe_value(str(path), name, str(file[name].dtype), "must be whole numbers"))
            return file[name].astype(np.int64)
    return None


def _checked_counts(path: Path, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(W, L, E), summed over sources."""
    if counts.ndim not in (3, 4) or not counts.size:
        rule = "must be (steps, layers, experts) or (steps, layers, sources, experts), none of them 0"
        raise UserError(describe_value(str(path), "shape of counts", counts.shape, rule))
    if counts.min() < 0:
        place = tuple(int(index[0]) for index in np.nonzero(counts < 0))
        where = f"counts[{', '.join(map(str, place))}]"
        raise UserError(describe_value(str(path), where, int(counts[place]), "must not be negative"))
    return counts if counts.ndim == 3 else counts.sum(2)


def _checked_routes(path: Path, routes: NDArray[np.int64]) -> NDArray[np.int64]:
    """(T, L, K); of several samples the last."""
    if routes.ndim not in (3, 4) or not routes.size:
        rule = "must be (tokens, layers, choices) or (samples, tokens, layers, choices), none of them 0"
        raise UserError(describe_value(str(path), "shape of routes", routes.shape, rule))
    if routes.min() < 0:
        raise UserError(describe_value(str(path), "routes", int(routes.min()), "must not be negative"))
    return routes if routes.ndim == 3 else routes[-1]


def _load_of_routes(routes_TLK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of each expert, (W, L, E), in `STEPS_OF_ROUTES` pieces of the tokens."""
    experts = int(routes_TLK.max()) + 1
    pieces = np.array_split(routes_TLK, min(STEPS_OF_ROUTES, len(routes_TLK)))
    return np.stack(
        [
            np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in piece.transpose(1, 0, 2)])
            for piece in pieces
        ]
    )


def _read_csv(path: Path) -> Trace:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path}: no column {', '.join(missing)}; the header is {','.join(COLUMNS)}")
            rows = [_csv_row(path, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise UserError(f"{path}: holds no counts")
    step, layer, expert, count = np.array(rows).T
    _, step = np.unique(step, return_inverse=True)  # steps of a run may be far apart
    load_WLE = np.zeros((step.max() + 1, layer.max() + 1, expert.max() + 1), dtype=np.int64)
    np.add.at(load_WLE, (step, layer, expert), count)
    return Trace(path.stem, load_WLE)


def _csv_row(path: Path, line: int, row: dict[str, str]) -> tuple[int, ...]:
    for name in COLUMNS:
        text = row[name] or ""
        if not text.strip().isdigit():
            raise UserError(describe_value(f"{path}, line {line}", name, text, "must be a whole number of 0 or more"))
    return tuple(int(row[name]) for name in COLUMNS)


def _read_jsonl(path: Path) -> Trace:
    steps = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                steps.append(_jsonl_counts(path, number, line))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not steps:
        raise UserError(f"{path}: holds no counts")
    shapes = [counts.shape for counts in steps]
    if len(set(shapes)) > 1:
        other = next(number for number, shape in enumerate(shapes, start=1) if shape != shapes[0])
        rule = f"must be (layers, experts) as in line 1: {shapes[0]}"
        raise UserError(describe_value(f"{path}, line {other}", "shape of counts", shapes[other - 1], rule))
    return Trace(_run_name(path), _checked_counts(path, np.stack(steps)))


def _jsonl_counts(path: Path, number: int, line: str) -> NDArray[np.int64]:
    where, rule = f"{path}, line {number}", "must be rows of whole numbers, equally many in each layer"
    try:
        counts = json.loads(line)["counts"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{where}: must be {{"step": ..., "counts": [[...], ...]}}') from None
    try:
        found = np.array(counts)
    except ValueError:
        raise UserError(describe_value(where, "counts", "...", rule)) from None
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
        raise UserError(describe_value(where, "counts", f"{found.ndim} dimensions of {found.dtype}", rule))
    return found.astype(np.int64)


def _run_name(path: Path) -> str:
    return path.resolve().parent.name if path.name == LOADS_FILE else path.stem


READERS: dict[str, Callable[[Path], Trace]] = {".npz": _read_npz, ".csv": _read_csv, ".jsonl": _read_jsonl}
KINDS = " or ".join(", ".join(READERS).rsplit(", ", 1))
