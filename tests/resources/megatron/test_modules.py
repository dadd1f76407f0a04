"""The mirrored modules against the counts of parameters, and what recomputation takes from them."""

from dataclasses import replace

import pytest

from pipermoe.resources.megatron.head import layer_modules, stage_modules
from pipermoe.resources.megatron.reader import read_job
from pipermoe.resources.parameters import embedding_parameters, mtp_parameters, total_parameters
from pipermoe.specs.catalogue import load_model, model_names
from pipermoe.specs.megatron import Arguments, unsupported_parts, write_arguments
from pipermoe.specs.model import LatentAttention
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

TRAIN = TrainConfig(seq_len=4096, global_batch_size=64, precision="bf16")
EXPRESSIBLE = [name for name in model_names() if not list(unsupported_parts(load_model(name)))]


def job_of(name="deepseek-v3", strategy="pp1 dp8 ep8 mbs1 1f1b z1", **arguments):
    plan = Strategy.parse(strategy)
    given = write_arguments(load_model(name), TRAIN, plan).given
    return read_job(Arguments({**given, **arguments}), plan.world_size)


def elements(job):
    return sum(w.elements for stage in job.stages for module in stage_modules(job, stage) for w in module.weights)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_the_modules_of_one_rank_hold_every_parameter_of_the_model(name):
    model = load_model(name)
    assert elements(job_of(name, "pp1 dp1 ep1 mbs1 1f1b")) == total_parameters(model) + mtp_parameters(model)


def test_pipeline_stages_hold_the_model_once_and_the_embedding_where_tokens_ahead_are_predicted_again():
    whole, staged = job_of(strategy="pp1 dp8 ep8 mbs1 1f1b"), job_of(strategy="pp4 vpp2 dp8 ep8 mbs1 interleaved-1f1b")
    assert elements(staged) == elements(whole) + embedding_parameters(whole.model)


def test_expert_parallelism_divides_routed_experts_only():
    one, eight = (job_of("mixtral-8x7b", f"pp1 dp8 ep{ep} edp{8 // ep} mbs1 1f1b") for ep in (1, 8))
    model = one.model
    routed = model.num_layers * model.moe.num_experts * 3 * model.hidden_size * model.moe.expert_width
    assert elements(one) - elements(eight) == routed * 7 // 8


def saved(job, *, is_moe=True, recomputed=False):
    return sum(module.saved_bytes for module in layer_modules(job, is_moe=is_moe, recomputed=recomputed))


def recomputing(job, *modules):
    return replace(job, options=replace(job.options, recompute=frozenset(modules)))


def test_recomputing_the_expert_activation_drops_the_input_of_the_second_gemm():
    job = job_of()
    rows = job.tokens * job.model.moe.top_k
    assert saved(job) - saved(recomputing(job, "moe_act")) == rows * job.model.moe.expert_width * 2


def test_recomputing_norms_drops_both_normalised_inputs():
    job = job_of()
    assert saved(job) - saved(recomputing(job, "layernorm")) == 2 * job.tokens * job.model.hidden_size * 2


def test_recomputing_the_latent_up_projection_drops_queries_keys_and_values():
    job = job_of()
    attention = job.model.attention
    assert isinstance(attention, LatentAttention)
    expanded = attention.num_heads * (2 * attention.query_key_dim + attention.v_head_dim)
    normed = attention.q_lora_rank + attention.kv_lora_rank
    assert saved(job) - saved(recomputing(job, "mla_up_proj")) == job.tokens * (expanded + normed) * 2


def test_a_layer_recomputed_in_full_keeps_its_input_only():
    job = job_of()
    assert saved(job, recomputed=True) == job.tokens * job.model.hidden_size * 2


def test_sequence_parallelism_divides_the_residual_stream_but_not_queries():
    job, sharded = (job_of("mixtral-8x7b", f"pp1 dp8 tp{tp} ep8 edp{tp} mbs1 1f1b") for tp in (1, 2))
    assert sharded.shard * 2 == job.shard == sharded.tokens


def test_rows_follow_imbalance_and_capacity_replaces_it():
    job = job_of()
    assert replace(job, routing_imbalance=1.5).rows == 1.5 * job.rows
    padded = replace(job, options=replace(job.options, capacity_factor=1.0), routing_imbalance=1.5)
    assert padded.rows == job.rows
