"""Static and peak bytes: what is divided by what, and how many micro-batches are in flight."""

from dataclasses import replace

from pipermoe.resources.megatron.head import loss, stage_modules
from pipermoe.resources.megatron.job import Machine
from pipermoe.resources.megatron.peak import peak_memory, schedule_of
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
    assert peak_memory(job, MACHINE, 3).transient == loss(job).forward_extra == 4096 * 32000 / 2 * 2


def test_more_rows_cost_what_their_tensors_cost():
    job = job_of("mixtral-8x7b", MIXTRAL)
    balanced, more = (peak_memory(replace(job, routing_imbalance=x), MACHINE, 3).activations for x in (1.0, 1.125))
    row = 2 * (4096 + 3 * 14336) + 8 + 4  # input, gate and up, product; token and probability of the row
    assert more - balanced == 29 * 4096 / 8 * row
