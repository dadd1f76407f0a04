"""What only some stages hold: embedding, final norm, output layer with loss, multi-token prediction.

Sources: Megatron-Core models/gpt/gpt_model.py, models/common/embeddings, transformer/multi_token_prediction.py,
tensor_parallel/cross_entropy.py, fusions/fused_cross_entropy.py.
"""

from __future__ import annotations

from pipermoe.resources.megatron.attention import attention_modules, norm_saved, norm_weights
from pipermoe.resources.megatron.job import MegatronJob
from pipermoe.resources.megatron.layout import StageLayout
from pipermoe.resources.megatron.mlp import mlp_modules
from pipermoe.resources.megatron.tensors import BF16, BOOL, FP32, Module, Saved, Weight

EMBEDDING, LOSS = "embedding", "loss"


def stage_modules(job: MegatronJob, stage: StageLayout) -> tuple[Module, ...]:
    """Every module of one pipeline stage, in the order of its forward."""
    modules: list[Module] = []
    if stage.embedding:
        modules.append(embedding(job))
    for position, layer in enumerate(stage.layers):
        recomputed = position < job.options.recomputed_layers
        modules += layer_modules(job, is_moe=job.model.is_moe(layer), recomputed=recomputed)
    for _ in range(stage.mtp_layers):
        modules += prediction_modules(job, own_embedding=not stage.embedding)
    if stage.loss:
        modules.append(final_norm(job))
        modules += [loss(job)] * stage.mtp_layers
        modules.append(loss(job, after_prediction=stage.mtp_layers > 0))
        modules.append(output_layer(job, shared=stage.embedding and job.model.tie_word_embeddings))
    return tuple(modules)


def layer_modules(job: MegatronJob, *, is_moe: bool, recomputed: bool = False) -> tuple[Module, ...]:
    """One transformer layer; `recomputed`, it keeps its input only and rebuilds the rest in its backward."""
    modules = (*attention_modules(job), *mlp_modules(job, is_moe=is_moe))
    if not recomputed:
        return modules
    rebuilt = sum(module.saved_bytes for module in modules)
    bare = tuple(Module(module.name, module.weights) for module in modules)
    kept = Saved.of("layer input", job.shard, job.model.hidden_size)
    extra = rebuilt + max(module.backward_extra for module in modules)
    return (*bare, Module("checkpoint", saved=(kept,), backward_extra=extra))


def embedding(job: MegatronJob) -> Module:
    """Word embedding divided over the vocabulary, and learned positions if there are any."""
    hidden = job.model.hidden_size
    weights = [_vocabulary_matrix(job, "embedding.word_embeddings.weight", fused=False)]
    if job.options.learned_positions:
        positions = (job.options.learned_positions, hidden)
        weights.append(Weight("embedding.position_embeddings.weight", positions, fused_gradient=False))
    mask = Saved.of("dropout mask", job.shard, hidden, element=BOOL)
    kept = (mask,) if job.options.hidden_dropout else ()
    return Module(EMBEDDING, tuple(weights), kept, backward_extra=weights[0].elements * BF16)  # its dense gradient


def final_norm(job: MegatronJob) -> Module:
    kept = tuple(norm_saved(job, job.shard, job.model.hidden_size, output=True))
    return Module("decoder.final_layernorm", norm_weights(job, "final_layernorm"), kept)


def output_layer(job: MegatronJob, *, shared: bool) -> Module:
    """The projection to the vocabulary; `shared` with an embedding of the same stage."""
    return Module("output_layer", () if shared else (_vocabulary_matrix(job, "output_layer.weight", fused=True),))


def loss(job: MegatronJob, *, after_prediction: bool = False) -> Module:
    """Cross entropy over T x V / tp: softmax in fp32, or with TransformerEngine's kernel the bf16 logits themselves.

    `after_prediction`: the logits of a prediction module may still be there (`release.predicted_logits_stay`).
    """
    options = job.options
    in_place = options.cross_entropy == "te"
    # The bf16 logits; compiled ("native") the fp32 copy too, because the in-place exponential writes a new tensor.
    extra = {"te": 0, "unfused": BF16, "native": BF16 + FP32}[options.cross_entropy]
    if after_prediction and options.predicted_logits_stay and not in_place:
        extra += BF16
    kept = (Saved("softmax of the logits", _logits(job) * (BF16 if in_place else FP32)),)
    return Module(LOSS, saved=kept, forward_extra=_logits(job) * extra)


def prediction_modules(job: MegatronJob, *, own_embedding: bool) -> tuple[Module, ...]:
    """A multi-token prediction module; on a stage without the embedding it holds a copy of it."""
    hidden, shard, tensor = job.model.hidden_size, job.shard, job.strategy.tensor_parallel
    copy = (embedding(job),) if own_embedding else ()
    joined = Module(
        "mtp.eh_proj",
        (
            *norm_weights(job, "mtp.enorm"),
            *norm_weights(job, "mtp.hnorm"),
            *norm_weights(job, "mtp.final_layernorm"),
            Weight("mtp.eh_proj.weight", (hidden // tensor, 2 * hidden)),
        ),
        (
            Saved.of("inputs of both norms", 2, shard, hidden),
            Saved.of("joined input", shard, 2 * hidden),
            Saved.of("gathered result, of which the layer's input is a slice", job.tokens - shard, hidden),
            Saved.of("final norm, input and output", 2, shard, hidden),
        ),
    )
    return (*copy, joined, *layer_modules(job, is_moe=True))


def _vocabulary_matrix(job: MegatronJob, name: str, *, fused: bool) -> Weight:
    rows = job.model.vocab_size // job.strategy.tensor_parallel
    return Weight(name, (rows, job.model.hidden_size), fused_gradient=fused)


def _logits(job: MegatronJob) -> float:
    return job.tokens * job.model.vocab_size / job.strategy.tensor_parallel
