"""The modules of one pipeline stage, in plain PyTorch. Nothing here communicates; runtime/pipeline puts them in order.

T tokens, D hidden size, K choices a token, V vocabulary size
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Build:
    """What the layers of a stage are built with; `drops` names the modules whose results are rebuilt in backward."""

    model: ModelSpec
    seq_len: int
    gradients: WeightGradients
    dtype: torch.dtype
    drops: Collection[RecomputeModule]

    def norm(self) -> nn.Module:
        return build_norm(self.model, self.gradients, self.dtype)

    def feed_forward(self, name: RecomputeModule, width: int, matrices: int, output_gate: bool = False) -> FeedForward:
        return FeedForward(
            self.model.hidden_size,
            width,
            self.gradients,
            self.dtype,
            matrices=matrices,
            bias=self.model.mlp_bias,
            output_gate=output_gate,
            drop=name in self.drops,
        )


class Layer(nn.Module):
    """What every layer begins with: attention, and the norm of what follows it."""

    def __init__(self, build: Build, layer: int):
        super().__init__()
        drop = "attention" in build.drops
        self.drops_norm = "norm" in build.drops
        self.attention_norm = build.norm()
        self.attention = build_attention(build.model, layer, build.seq_len, build.gradients, build.dtype, drop=drop)
        self.ffn_norm = build.norm()

    def attended(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        """`x + attention(norm(x))`."""
        attend = partial(self.attention, rotation=rotation)
        return x_TD + rebuilding(self.drops_norm, self.attention_norm, attend, x_TD)


class DenseLayer(Layer):
    """Attention and a dense MLP: one piece, with no collective inside."""

    def __init__(self, build: Build, layer: int):
        super().__init__(build, layer)
        self.mlp = build.feed_forward("dense_mlp", build.model.dense_width, build.model.dense_matrices)

    def forward(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        h_TD = self.attended(x_TD, rotation)
        return h_TD + rebuilding(self.drops_norm, self.ffn_norm, self.mlp, h_TD)


class MoELayer(Layer):
    """Attention and a mixture of experts, cut at its all-to-alls into differentiable pieces.

    `attend` -> (dispatch) -> `experts` -> (combine) -> weighted sum; `shared` runs while tokens travel.
    """

    def __init__(self, build: Build, layer: int, slots: int):
        super().__init__(build, layer)
        moe = build.model.moe
        self.router = Router(build.model, build.gradients, build.dtype)
        self.experts = Experts(build.model, slots, build.gradients, build.dtype, build.drops)
        self.shared = (
            build.feed_forward("shared_experts", moe.shared_width, moe.expert_matrices, moe.shared_gate)
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

    def __init__(self, build: Build, slots: int):
        hidden = build.model.hidden_size
        super().__init__(build, build.model.moe_layers[-1], slots)
        self.token_norm = build.norm()
        self.state_norm = build.norm()
        self.projection = Linear(2 * hidden, hidden, build.gradients, dtype=build.dtype)
        self.head_norm = build.norm()

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
        build = Build(model, seq_len, gradients, dtype, drops)
        self.embedding = Embedding(model.vocab_size, hidden, gradients, dtype) if embeds else None
        self.layers = nn.ModuleDict(
            {
                str(layer): MoELayer(build, layer, slots) if model.is_moe(layer) else DenseLayer(build, layer)
                for layer in layers
            }
        )
        self.predictions = tuple(str(layer) for layer in model.prediction_layers) if self.last else ()
        for name in self.predictions:
            self.layers[name] = PredictionLayer(build, slots)
        if self.last:
            self.final_norm = build.norm()
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
