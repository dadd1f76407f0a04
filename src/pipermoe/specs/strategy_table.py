"""StrategyTable: many strategies as a structure of arrays, so that one formula judges one strategy or a million."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.strategy import MIRRORED, RECOMPUTE_MODULES, RecomputeModule, Strategy

# The names of schedule.builders, which this package stands below.
SCHEDULE_NAMES: tuple[str, ...] = (
    *("gpipe", "1f1b", "1f1b-overlap", "breadth-first", "interleaved-1f1b", "interleaved-1f1b-overlap"),
    *("zb-h1", "zb-h1-overlap", "zb-h2", "zb-h2-overlap", "zb-v", "zb-v-overlap"),
    *("v-half", "v-half-overlap", "v-min", "dualpipe", "dualpipe-v"),
)
DISPATCHER_NAMES: tuple[str, ...] = ("all_to_all", "deduplicated")
EXCHANGE_NAMES: tuple[str, ...] = ("library", "planned")
RECOMPUTE_NAMES: tuple[str, ...] = ("none", "selective", "full")
RANK_ORDERS: tuple[str, ...] = ("dp-pp", "pp-dp")
UNKNOWN = -1  # the code of a name that is not in the tuples above
_STAGE_HOMES = np.array([1 + (name in MIRRORED) for name in (*SCHEDULE_NAMES, "unknown")])

Column = NDArray[np.int64]


class _Column:
    """A column as it is read: int64, so that products of sizes have room."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, table: StrategyTable, owner: type) -> Column:
        return table.columns[self.name].astype(np.int64)


@dataclass(frozen=True, slots=True)
class StrategyTable:
    """One row per strategy, one column per field of `Strategy`.

    Names are indices into `NAMES`; bit i of `recompute_modules` is `RECOMPUTE_MODULES[i]`; `layer_split` is an index
    into `splits`, whose first entry is the even split `()`. `columns` are kept in as few bytes as hold their values: a
    million rows are grouped as fast as memory is read.
    """

    columns: Mapping[str, NDArray[np.integer]]
    splits: tuple[tuple[int, ...], ...] = ((),)

    pipeline_parallel = _Column()
    virtual_stages = _Column()
    data_parallel = _Column()
    context_parallel = _Column()
    tensor_parallel = _Column()
    expert_parallel = _Column()
    expert_data_parallel = _Column()
    expert_tensor_parallel = _Column()
    micro_batch_size = _Column()
    rank_order = _Column()
    schedule = _Column()
    dispatcher = _Column()
    ranks_per_copy = _Column()
    exchange = _Column()
    recompute = _Column()
    recompute_modules = _Column()
    zero_dense = _Column()
    zero_expert = _Column()
    layer_split = _Column()

    @classmethod
    def of(cls, strategies: Sequence[Strategy]) -> StrategyTable:
        """The table whose rows are `strategies`, in order."""
        splits = tuple(dict.fromkeys([(), *(strategy.layer_split for strategy in strategies)]))
        columns = {
            name: _narrow(np.array([_encode(strategy, name, splits) for strategy in strategies], dtype=np.int64))
            for name in COLUMNS
        }
        return cls(columns, splits)

    @classmethod
    def product(cls, **axes: Iterable[int]) -> StrategyTable:
        """Every combination of the given values; a column that is not named is 1, an index column 0."""
        values = {name: np.asarray(list(axes[name]), dtype=np.int64) for name in axes}
        grid = np.meshgrid(*values.values(), indexing="ij")
        named = {name: _narrow(column.ravel()) for name, column in zip(values, grid, strict=True)}
        for name in COLUMNS:
            named.setdefault(name, np.full(grid[0].size, int(name not in ZERO_BY_DEFAULT), dtype=np.int8))
        return cls(named)

    def __len__(self) -> int:
        return len(self.columns["pipeline_parallel"])

    def take(self, rows: NDArray) -> StrategyTable:
        """The rows that `rows` (indices or a mask) selects."""
        return replace(self, columns={name: column[rows] for name, column in self.columns.items()})

    def with_columns(self, **columns: NDArray[np.integer]) -> StrategyTable:
        """The same rows with some columns replaced."""
        return replace(self, columns={**self.columns, **{name: _narrow(each) for name, each in columns.items()}})

    def row(self, index: int) -> Strategy:
        """Row `index` as a `Strategy`."""
        values = {name: int(column[index]) for name, column in self.columns.items()}
        return Strategy.model_validate(
            values
            | {name: names[values[name]] for name, names in NAMES.items()}
            | {
                "recompute_modules": tuple(
                    module for bit, module in enumerate(RECOMPUTE_MODULES) if values["recompute_modules"] >> bit & 1
                ),
                "layer_split": self.splits[values["layer_split"]],
            }
        )

    @property
    def ranks_per_stage(self) -> Column:
        return self.data_parallel * self.context_parallel * self.tensor_parallel

    @property
    def expert_ranks_per_stage(self) -> Column:
        return self.expert_data_parallel * self.expert_parallel * self.expert_tensor_parallel

    @property
    def world_size(self) -> Column:
        return self.pipeline_parallel * self.ranks_per_stage

    @property
    def stage_stride(self) -> Column:
        """`Strategy.stage_stride`."""
        inner = np.lcm(self.context_parallel * self.tensor_parallel, self.expert_parallel * self.expert_tensor_parallel)
        return np.where(self.rank_order == RANK_ORDERS.index("pp-dp"), inner, self.ranks_per_stage)

    @property
    def runs_per_stage(self) -> Column:
        """How many runs of consecutive ranks a stage is."""
        return self.ranks_per_stage // self.stage_stride

    @property
    def num_stages(self) -> Column:
        return self.pipeline_parallel * self.virtual_stages

    @property
    def stage_homes(self) -> Column:
        return _STAGE_HOMES[self.schedule]

    @property
    def dense_replicas(self) -> Column:
        return self.data_parallel * self.context_parallel * self.stage_homes

    @property
    def expert_replicas(self) -> Column:
        return self.expert_data_parallel * self.stage_homes

    def rebuilds(self, module: RecomputeModule) -> NDArray[np.bool_]:
        """Which rows name `module` for selective recomputation."""
        return (self.recompute_modules >> RECOMPUTE_MODULES.index(module)) & 1 > 0

    def microbatches(self, global_batch_size: int) -> Column:
        """Micro-batches that one data-parallel rank runs in a step (M); rounded down where they do not divide."""
        return global_batch_size // (self.data_parallel * self.micro_batch_size)

    def stage_microbatches(self, global_batch_size: int) -> Column:
        return self.microbatches(global_batch_size) // self.stage_homes


COLUMNS: tuple[str, ...] = tuple(name for name, value in vars(StrategyTable).items() if isinstance(value, _Column))
NAMES = {
    "rank_order": RANK_ORDERS,
    "schedule": SCHEDULE_NAMES,
    "dispatcher": DISPATCHER_NAMES,
    "exchange": EXCHANGE_NAMES,
    "recompute": RECOMPUTE_NAMES,
}
ZERO_BY_DEFAULT = {*NAMES, "recompute_modules", "zero_dense", "zero_expert", "layer_split"}


def _narrow(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """The same in the fewest bytes."""
    if values.itemsize == 1:
        return values
    least, most = (np.min_scalar_type(int(end)) for end in (values.min(initial=0), values.max(initial=0)))
    return values.astype(np.promote_types(least, most))


def _encode(strategy: Strategy, name: str, splits: tuple[tuple[int, ...], ...]) -> int:
    value = getattr(strategy, name)
    if name == "layer_split":
        return splits.index(value)
    if name == "recompute_modules":
        return sum(1 << RECOMPUTE_MODULES.index(module) for module in value)
    names = NAMES.get(name)
    if names is None:
        return value
    return names.index(value) if value in names else UNKNOWN
