"""The paper's equations against the figures that the paper prints."""

import numpy as np
import pytest

from pipermoe.resources import paper

GIB = 2**30
DEEPSEEK_V3 = paper.Shape(61, 7168, 128, 256, 8, 2048)

# Model, E, d, d_ffn, printed GB: of 48 E d d_ffn / 8.
TABLE_IV = [
    ("Mixtral 8x7B", 8, 4096, 14336, 2.63),
    ("Mixtral 8x22B", 8, 6144, 16384, 4.50),
    ("Grok-1", 8, 6144, 32768, 9.00),
    ("DeepSeek-V2", 160, 5120, 1536, 7.04),
    ("DeepSeek-V3", 256, 7168, 2048, 21.00),
]


@pytest.mark.parametrize(("model", "experts", "hidden", "width", "printed"), TABLE_IV)
def test_migration_sizes_are_those_of_table_iv_in_gib(model, experts, hidden, width, printed):
    assert paper.migration_bytes(experts, hidden, width) / GIB == pytest.approx(printed, abs=0.01)


def test_the_two_other_rows_of_table_iv_are_decimal_gigabytes():
    assert paper.migration_bytes(128, 768, 2048) / 1e9 == pytest.approx(1.21, abs=0.005)  # Switch-Base
    assert paper.migration_bytes(64, 8192, 32768) / 1e9 == pytest.approx(102.88, rel=0.002)  # GLaM 1.2T


def test_migration_times_of_table_iv_are_the_printed_sizes_at_50_per_second():
    assert paper.migration_bytes(256, 7168, 2048) / GIB / 50 * 1000 == pytest.approx(420)


def test_unsharded_memory_is_the_printed_sum():
    layers, d, heads, experts, k, width = DEEPSEEK_V3
    b, s = 2, 4096
    printed = layers * (
        64 * d**2 + 48 * experts * d * width + 12 * b * s * d + 4 * heads * b * s**2 + 2 * b * s * k * (3 * width + d)
    )
    assert paper.unsharded_bytes(DEEPSEEK_V3, b, s) == printed


def test_one_stage_with_one_microbatch_is_expert_data_parallelism():
    whole = paper.expert_data_parallel_bytes(DEEPSEEK_V3, 64, 4096, expert_parallel=64)
    staged = paper.one_f_one_b_bytes(DEEPSEEK_V3, 64, 4096, 64, pipeline_parallel=1, microbatches=1, stage=0)
    assert staged == pytest.approx(whole, rel=1e-15)


def test_the_first_stage_holds_most_and_the_difference_to_the_last_is_delta_m():
    stages = np.arange(16)
    memory = paper.one_f_one_b_bytes(DEEPSEEK_V3, 512, 4096, 64, 16, 32, stages)
    assert (np.diff(memory) < 0).all()
    difference = paper.first_to_last_difference_bytes(DEEPSEEK_V3, 512, 4096, 64, 16, 32)
    assert memory[0] - memory[-1] == pytest.approx(difference, rel=1e-12)


def test_the_all_to_all_bound_counts_two_bytes_both_ways():
    assert paper.all_to_all_seconds(1, 4096, 8, 7168, 8, 25e9) == 4 * 4096 * 8 * 7168 / (8 * 25e9)
