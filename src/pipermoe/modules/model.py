"""The modules of one pipeline stage, in plain PyTorch. Nothing here communicates; runtime/pipeline puts them in order.

T tokens, D hidden size, K choices a token, V vocabulary size
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from pipermoe.modules.attention import build_attention
from pipermoe.modules.experts import Experts, FeedForward
from pipermoe.modules.linear import Linear
from pipermoe.modules.loss import cross_entropy
from pipermoe.modules.norm import build_norm
from pipermoe.modules.rebuild import rebuilding
from pipermoe.modules.rotary import Rotation
from pipermoe.modules.router import Router
from pipermoe.modules.weight_gradients import WeightGradients, accumulate_rows
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.precision import Precision
from pipermoe.specs.strategy import RecomputeModule

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Embedding(nn.Module):
    """Token vectors. Their gradient is added by hand, so no graph hangs on them."""

    def __init__(self, vocabulary: int, hidden: int, gradients: WeightGradients, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden, dtype=dtype))
        self.gradients = gradients

    @torch.no_grad()
    def forward(self, tokens_T: Tensor) -> Tensor:
        return self.weight[tokens_T]

    @torch.no_grad()
    def backward(self, tokens_T: Tensor, gradient_TD: Tensor) -> None:
        self.gradients.add(lambda: accumulate_rows(self.weight, tokens_T, gradient_TD))


class Layer(nn.Module):
    """What every layer begins with: attention, and the norm of what follows it."""

    def __init__(
        self,
        model: ModelSpec,
        layer: int,
        seq_len: int,
        gradients: WeightGradients,
        dtype: torch.dtype,
        drops: Collection[RecomputeModule],
    ):
        super().__init__()
        self.drops_norm = "norm" in drops
        self.attention_norm = build_norm(model, gradients, dtype)
        self.attention = build_attention(model, layer, seq_len, gradients, dtype, drop="attention" in drops)
        self.ffn_norm = build_norm(model, gradients, dtype)

    def attended(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        """`x + attention(norm(x))`."""
        attend = partial(self.attention, rotation=rotation)
        return x_TD + rebuilding(self.drops_norm, self.attention_norm, attend, x_TD)


class DenseLayer(Layer):
    """Attention and a dense MLP: one piece, with no collective inside."""

    def __init__(
        self,
        model: ModelSpec,
        layer: int,
        seq_len: int,
        gradients: WeightGradients,
        dtype: torch.dtype,
        drops: Collection[RecomputeModule],
    ):
        super().__init__(model, layer, seq_len, gradients, dtype, drops)
        self.mlp = FeedForward(
            model.hidden_size,
            model.dense_width,
            gradients,
            dtype,
            matrices=model.dense_matrices,
            bias=model.mlp_bias,
            drop="dense_mlp" in drops,
        )

    def forward(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        h_TD = self.attended(x_TD, rotation)
        return h_TD + rebuilding(self.drops_norm, self.ffn_norm, self.mlp, h_TD)


class MoELayer(Layer):
    """Attention and a mixture of experts, cut at its all-to-alls into differentiable pieces.

    `attend` -> (dispatch) -> `experts` -> (combine) -> weighted sum; `shared` runs while tokens travel.
    """

    def __init__(
        self,
        model: ModelSpec,
        layer: int,
        slots: int,
        seq_len: int,
        gradients: WeightGradients,
        dtype: torch.dtype,
        drops: Collection[RecomputeModule],
    ):
        super().__init__(model, layer, seq_len, gradients, dtype, drops)
        moe = model.moe
        self.router = Router(model, gradients, dtype)
        self.experts = Experts(model, slots, gradients, dtype, drops)
        self.shared = (
            FeedForward(
                model.hidden_size,
                moe.shared_width,
                gradients,
                dtype,
                matrices=moe.expert_matrices,
                bias=model.mlp_bias,
                output_gate=moe.shared_gate,
                drop="shared_experts" in drops,
            )
            if moe.shared_width
            else None
        )

    def attend(
        self, x_TD: Tensor, rotation: Rotation, planned_TK: Tensor | None, sequences: int = 1, z_loss: bool = False
    ) -> tuple[Tensor, ...]:
        """Residual stream h (T, D), experts' input (T, D), and what `Router.choose` gives for it."""
        h_TD = self.attended(x_TD, rotation)

        def choose(normed_TD: Tensor) -> tuple[Tensor, ...]:
            return normed_TD, *self.router.choose(normed_TD, planned_TK, sequences=sequences, z_loss=z_loss)

        return h_TD, *rebuilding(self.drops_norm, self.ffn_norm, choose, h_TD)


class PredictionLayer(MoELayer):
    """One depth of multi-token prediction: a MoE layer behind a projection of the state and of a later token.

    `join` -> the layer -> `head_norm`, the state that the model's own head and the next depth read; the first depth
    reads what the final norm gives. Source: DeepSeek-V3, arXiv 2412.19437, equations 21 to 23. The state is the
    normalised one and the projection's first columns are the token's, as in its published weights.
    """

    def __init__(
        self,
        model: ModelSpec,
        slots: int,
        seq_len: int,
        gradients: WeightGradients,
        dtype: torch.dtype,
        drops: Collection[RecomputeModule],
    ):
        super().__init__(model, model.moe_layers[-1], slots, seq_len, gradients, dtype, drops)
        self.token_norm = build_norm(model, gradients, dtype)
        self.state_norm = build_norm(model, gradients, dtype)
        self.projection = Linear(2 * model.hidden_size, model.hidden_size, gradients, dtype=dtype)
        self.head_norm = build_norm(model, gradients, dtype)

    def join(self, state_TD: Tensor, token_TD: Tensor) -> Tensor:
        """The layer's input (T, D) from the state and the vector of the token that comes later."""
        return self.projection(torch.cat((self.token_norm(token_TD), self.state_norm(state_TD)), dim=1))


class StageModel(nn.Module):
    """The modules of one stage: `layers` of the model; the embedding if it is first, the head if it is last.

    The last stage holds the layers of multi-token prediction too, and where these or a tied head need it an embedding.
    `drops` names the modules of a layer whose results are rebuilt in backward (`specs.strategy.RECOMPUTE_MODULES`).
    """

    def __init__(
        self,
        model: ModelSpec,
        layers: range,
        slots: int,
        seq_len: int,
        dtype: torch.dtype,
        gradients: WeightGradients,
        drops: Collection[RecomputeModule] = (),
    ):
        super().__init__()
        self.first, self.last = layers.start == 0, layers.stop == model.num_layers
        hidden, embeds = model.hidden_size, self.first or (self.last and model.embeds_twice)
        self.embedding = Embedding(model.vocab_size, hidden, gradients, dtype) if embeds else None
        self.layers = nn.ModuleDict(
            {
                str(layer): MoELayer(model, layer, slots, seq_len, gradients, dtype, drops)
                if model.is_moe(layer)
                else DenseLayer(model, layer, seq_len, gradients, dtype, drops)
                for layer in layers
            }
        )
        self.predictions = tuple(str(layer) for layer in model.prediction_layers) if self.last else ()
        for name in self.predictions:
            self.layers[name] = PredictionLayer(model, slots, seq_len, gradients, dtype, drops)
        if self.last:
            self.final_norm = build_norm(model, gradients, dtype)
            self.head = Linear(hidden, model.vocab_size, gradients, bias=model.head_bias, dtype=dtype)
            if model.tie_word_embeddings:
                assert self.embedding is not None
                self.head.weight = self.embedding.weight

    def share_embedding(self, other: StageModel) -> None:
        """Use the embedding of a stage that is on the same rank."""
        assert self.embedding is not None
        assert other.embedding is not None
        if self.last and self.head.weight is self.embedding.weight:
            self.head.weight = other.embedding.weight
        self.embedding.weight = other.embedding.weight

    def units(self) -> Iterator[str]:
        """What is sharded as one, in the order of use; multi-token prediction uses embedding and head again."""
        if self.first:
            yield "embedding"
        yield from (f"layers.{name}" for name in self.layers if name not in self.predictions)
        if self.last:
            yield "head"
        for name in self.predictions:
            yield from ("embedding", f"layers.{name}", "head")

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, tensor) of all that a model is: what gradients train, then the routers' correction biases."""
        yield from ((name, each) for name, each in self.named_parameters() if each.requires_grad)
        yield from self.correction_biases()

    def correction_biases(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, tensor) of what the balance of load moves."""
        for name, layer in self.layers.items():
            if isinstance(layer, MoELayer) and layer.router.correction_bias is not None:
                yield f"layers.{name}.router.correction_bias", layer.router.correction_bias

    def loss(self, normed_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Mean cross-entropy of the micro-batch; the last stage only."""
        return cross_entropy(self.head(normed_TD), targets_T)
