"""From arguments to a job, and what is refused as not described."""

import pytest

from pipermoe.resources.megatron.reader import read_job, undescribed
from pipermoe.specs.errors import UserError
from pipermoe.specs.megatron import Arguments

GIVEN = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --num-experts 8 --vocab-size 100 --seq-length 32 "
    "--max-position-embeddings 32 --global-batch-size 64 --micro-batch-size 1 --bf16 --transformer-impl "
    "transformer_engine --disable-bias-linear "
)


def read(extra="", world_size=8, **options):
    return read_job(Arguments.parse((GIVEN + extra).split()), world_size, **options)


def test_the_vocabulary_is_padded_over_tensor_parallel_ranks():
    assert read("--tensor-model-parallel-size 2 --sequence-parallel").model.vocab_size == 256


def test_a_layout_places_layers_prediction_and_loss():
    job = read("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|t|(tt|)*2|tmL --mtp-num-layers 1")
    assert [len(stage.layers) for stage in job.stages] == [2, 1, 2, 2, 0, 1]
    assert [stage.mtp_layers for stage in job.stages] == [0, 0, 0, 0, 0, 1]
    assert [(stage.embedding, stage.loss) for stage in job.stages] == [
        (True, False),
        *[(False, False)] * 4,
        (False, True),
    ]


def test_prediction_modules_are_on_the_last_stage_where_the_layout_does_not_say():
    job = read("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*4|t*4L --mtp-num-layers 1")
    assert [stage.mtp_layers for stage in job.stages] == [0, 1]


def test_a_layout_of_another_number_of_layers_is_refused():
    with pytest.raises(UserError, match="has 6 layers; --num-layers = 8"):
        read("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*4|t*2L")


@pytest.mark.parametrize(("capability", "core"), [(8, "flash"), (9, "cudnn"), (10, "cudnn")])
def test_the_attention_core_is_what_transformer_engine_picks(capability, core):
    assert read(compute_capability=capability).options.attention_core == core
    assert read("--attention-backend unfused", compute_capability=capability).options.attention_core == "unfused"


def test_on_blackwell_deterministic_attention_with_dropout_is_flash_attention():
    deterministic = "--deterministic-mode --attention-dropout "
    assert read(deterministic + "0.1", compute_capability=10).options.attention_core == "flash"
    assert read(deterministic + "0.0", compute_capability=10).options.attention_core == "cudnn"
    assert read(deterministic + "0.1", compute_capability=9).options.attention_core == "cudnn"


def test_deterministic_mode_keeps_returned_rows_since_release_0_15_unless_the_kernel_is_fused():
    sums = [read("--deterministic-mode", release=release).options.index_add for release in ("0.14", "0.15", "0.19")]
    assert sums == [False, True, True]
    assert not read("--deterministic-mode --moe-permute-fusion").options.index_add
    assert not read().options.index_add


def test_releases_0_14_to_0_16_hold_the_predicted_logits_during_the_loss():
    releases = ("0.13", "0.14", "0.15", "0.16", "0.17")
    stay = [read(release=release).options.predicted_logits_stay for release in releases]
    assert stay == [False, True, True, True, False]


def test_block_recomputation_covers_the_first_layers_of_each_stage():
    job = read("--recompute-granularity full --recompute-method block --recompute-num-layers 3")
    assert job.options.recomputed_layers == 3


def test_a_precision_aware_optimizer_keeps_its_moments_in_the_formats_named():
    extra = "--use-distributed-optimizer --use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype fp8"
    assert read(extra).options.moment_bytes == 2 + 1


@pytest.mark.parametrize(
    "extra",
    [
        "--fp8-format hybrid",
        "--optimizer muon",
        "--use-megatron-fsdp",
        "--cuda-graph-impl transformer_engine",
        "--overlap-moe-expert-parallel-comm",
        "--fine-grained-activation-offloading",
        "--moe-expert-capacity-factor 1.0",
    ],
)
def test_what_the_profile_does_not_describe_is_named(extra):
    assert len(list(undescribed(Arguments.parse((GIVEN + extra).split())))) == 1
    assert list(undescribed(Arguments.parse(GIVEN.split()))) == []
