"""Static and peak bytes: what is divided by what, and how many micro-batches are in flight."""

from dataclasses import replace

from pipermoe.resources.megatron.head import loss, stage_modules
from pipermoe.resources.megatron.job import Machine
from pipermoe.resources.megatron.peak import boundary_tensors, peak_memory, schedule_of
from pipermoe.resources.megatron.static import static_memory
from pipermoe.schedule.memory import in_flight

from .test_modules import elements, job_of

MACHINE = Machine.of(9)
MIXTRAL = "pp4 vpp8 dp8 tp2 ep8 edp2 mbs1 interleaved-1f1b z1"


def test_weights_are_bf16_and_main_gradients_fp32():
    job = job_of(strategy="pp1 dp8 ep8 mbs1 1f1b z1")
    static = static_memory(job, MACHINE, 0)
    assert static.weights == 2 * elements(job)
    assert static.main_gradients == 4 * elements(job)


def test_the_distributed_optimizer_divides_dense_states_over_dp_and_experts_over_edp():
    job = job_of("mixtral-8x7b", "pp1 dp8 ep4 edp2 mbs1 1f1b z1")
    weights = [w for module in stage_modules(job, job.stages[0]) for w in module.weights]
    routed = sum(w.elements for w in weights if w.routed)
    dense = sum(w.elements for w in weights if not w.routed)
    assert static_memory(job, MACHINE, 0).optimizer == 12 * (dense / 8 + routed / 2)
    replicated = replace(job, options=replace(job.options, distributed_optimizer=False))
    assert static_memory(replicated, MACHINE, 0).optimizer == 12 * (dense + routed)


def test_a_gradient_placeholder_is_kept_once_per_shape():
    job = job_of("mixtral-8x7b", "pp1 dp8 ep8 mbs1 1f1b z1")
    d, width, vocabulary = 4096, 14336, 32000
    shapes = [(2 * width, d), (d, width), (6144, d), (d, d), (vocabulary, d)]
    assert static_memory(job, MACHINE, 0).gradient_placeholders == sum(2 * rows * columns for rows, columns in shapes)


def test_workspaces_follow_the_generation_of_the_gpu():
    job = job_of("mixtral-8x7b", "pp1 dp8 ep8 mbs1 1f1b z1")
    hopper, ampere = (static_memory(job, Machine.of(capability), 0) for capability in (9, 8))
    assert hopper.te_workspace == 5 * (32 * 2**20 + 1024)
    assert ampere.te_workspace == 5 * 4 * 2**20
    assert (hopper.cublas_workspace, ampere.cublas_workspace) == (2 * 32 * 2**20, 2 * 8_519_680)


def test_interleaving_keeps_29_chunks_on_the_last_of_four_ranks():
    job = job_of("mixtral-8x7b", MIXTRAL)
    assert in_flight(schedule_of(job)).rank[-1] == 29
    layer = sum(module.saved_bytes for module in stage_modules(job, job.stages[3]))
    head = sum(module.saved_bytes for module in stage_modules(job, job.stages[-1])) - layer
    assert peak_memory(job, MACHINE, 3).activations == 29 * layer + head


def test_the_peak_of_the_last_rank_is_in_the_loss():
    job = job_of("mixtral-8x7b", MIXTRAL, create_attention_mask_in_dataloader=False)
    sent = 4096 / 2 * 4096 * 2  # the input's gradient of the backward before
    assert loss(job).forward_extra == 4096 * 32000 / 2 * 2
    assert peak_memory(job, MACHINE, 3).transient == loss(job).forward_extra + sent


def test_more_rows_cost_what_their_tensors_cost():
    job = job_of("mixtral-8x7b", MIXTRAL)
    balanced, more = (peak_memory(replace(job, routing_imbalance=x), MACHINE, 3).activations for x in (1.0, 1.125))
    row = 2 * (4096 + 3 * 14336) + 8 + 4  # input, gate and up, product; token and probability of the row
    assert more - balanced == 29 * 4096 / 8 * row


def test_predicted_logits_that_stay_add_their_bf16_bytes_to_the_loss_unless_they_are_saved_for_backward():
    job = job_of("deepseek-v3", "pp2 dp8 ep8 mbs1 1f1b z1", cross_entropy_loss_fusion=True)
    bf16_logits = 2 * 4096 * 129280
    for fusion, added in (("native", bf16_logits), ("te", 0)):
        gone = replace(job, options=replace(job.options, cross_entropy=fusion))
        stay = replace(gone, options=replace(gone.options, predicted_logits_stay=True))
        last, others = (loss(stay, after_prediction=after).forward_extra for after in (True, False))
        assert last - loss(gone, after_prediction=True).forward_extra == added
        assert others == loss(gone).forward_extra


def test_between_stages_a_rank_holds_what_it_sent_and_what_it_received():
    first, last = (tensors_between_stages("pp2 dp8 ep8 mbs1 1f1b z1", 3, rank) for rank in (0, 1))
    assert first == {"0F0": 0, "0F1": 0, "0B0": 1, "0F2": 1, "0B1": 1, "0B2": 1}
    assert last == {"1F0": 0, "1B0": 0, "1F1": 1, "1B1": 1, "1F2": 1, "1B2": 1}


def test_interleaved_the_input_of_the_next_forward_is_there_before_the_backward_ends():
    last = tensors_between_stages("pp2 vpp2 dp8 ep8 mbs1 interleaved-1f1b z1", 2, 1)
    assert list(last) == ["1F0", "1F1", "3F0", "3B0", "3F1", "3B1", "1B0", "1B1"]
    assert list(last.values()) == [0, 0, 0, 1, 1, 1, 2, 2]


def tensors_between_stages(strategy, microbatches, rank):
    job = job_of("mixtral-8x7b", strategy)
    job = replace(job, global_batch_size=8 * microbatches)
    parts = tuple(schedule_of(job).parts(rank))
    return dict(zip(map(str, parts), map(int, boundary_tensors(job, parts)), strict=True))


def test_the_layer_of_a_prediction_module_reads_a_slice_of_the_gathered_rows():
    job = job_of("deepseek-v3", "pp1 dp4 tp2 ep8 mbs1 1f1b z1")
    [joined] = [module for module in stage_modules(job, job.stages[0]) if module.name == "mtp.eh_proj"]
    shard = job.shard * job.model.hidden_size * 2
    assert job.shard == job.tokens // 2
    assert joined.saved_bytes == (2 + 2 + 2 + 1) * shard
