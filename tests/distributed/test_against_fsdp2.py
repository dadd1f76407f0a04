"""ZeRO-3 against torch's own sharding (FSDP2) where that is right: whole backwards of one stage, data parallel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import STEPS, arrangement, train
from tests.runtime.tiny import MODELS, TRAIN, batch_for, engine_for
from tests.runtime.written_out import loss_of_step
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from pipermoe.runtime.groups import ProcessGroups
from pipermoe.specs.strategy import Strategy

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
MODEL = "rich"


class WrittenOut(nn.Module):
    """The model in ordinary autograd as a module, for FSDP2 to shard."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.weights = nn.ParameterDict({name.replace(".", "/"): value for name, value in weights.items()})

    def forward(self, tokens: Tensor) -> Tensor:
        """The losses (4,) of one micro-batch, as `loss_of_step` has them."""
        weights = {name.replace("/", "."): value for name, value in self.weights.items()}
        return loss_of_step(MODELS[MODEL], TRAIN, weights, tokens[None])


def with_fsdp2(rank: int) -> dict:
    """Losses, gradient norms and last weights of the same training, sharded by torch."""
    one = engine_for(MODELS[MODEL], Strategy(), ProcessGroups.create(arrangement(dp=2)))
    module = WrittenOut({name: value.clone() for name, value in one.named_state()})
    fully_shard(module)
    config = TRAIN.optimizer
    decayed = [p for name, p in module.named_parameters() if p.ndim >= 2 and not name.endswith("bias")]
    others = [p for name, p in module.named_parameters() if p.ndim < 2 or name.endswith("bias")]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )
    losses, norms = [], []
    for step in range(STEPS):
        batch = batch_for(arrangement(dp=2), rank, step)
        parts = []
        for tokens in batch:
            losses_4 = module(tokens) / len(batch)
            entropy, _, auxiliary, _ = losses_4
            (entropy + TRAIN.auxiliary_loss * auxiliary).backward()
            parts.append(losses_4.detach())
        total = torch.stack(parts).sum(0)
        dist.all_reduce(total)
        losses.append((total / 2).tolist())
        norm = clip_grad_norm_(module.parameters(), config.gradient_clip)
        assert isinstance(norm, DTensor)
        norms.append(norm.full_tensor().item())
        adamw.step()
        adamw.zero_grad()
    state = {name.removeprefix("weights.").replace("/", "."): p for name, p in module.named_parameters()}
    weights = {name: p.full_tensor().detach() for name, p in state.items() if isinstance(p, DTensor)}
    return {"losses": losses, "norms": norms, "weights": weights}


def test_losses_and_weights_equal_those_of_fsdp2():
    ours = run_ranks(train, 2, MODEL, arrangement(dp=2, zero_dense=3, zero_expert=3))
    for own, theirs in zip(ours, run_ranks(with_fsdp2, 2), strict=True):
        torch.testing.assert_close(torch.tensor(own["losses"]), torch.tensor(theirs["losses"]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.tensor(own["norms"]), torch.tensor(theirs["norms"]), rtol=1e-5, atol=0)
        assert set(own["weights"]) == set(theirs["weights"])
        for name, value in own["weights"].items():
            torch.testing.assert_close(
                torch.from_numpy(value), torch.from_numpy(theirs["weights"][name]), rtol=0, atol=1e-6, msg=name
            )
