"""TrainConfig: the job. Batch, sequence, precision, optimizer, data; nothing about how it is spread over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipermoe.specs.base import Frozen
from pipermoe.specs.precision import RECIPES, Precision, Recipe, StateBytes

OnNonfinite = Literal["stop", "skip"]
Packing = Literal["stream", "documents"]
# How experts change their ranks (docs/balance.md): with their optimizer state; with that spread over all ranks; or as
# copies that live only while a layer computes.
Mechanism = Literal["bound", "decoupled", "sparse"]
AuxiliaryLossLevel = Literal["micro_batch", "sequence", "global_batch"]


class Optimizer(Frozen):
    """AdamW with linear warm-up and cosine decay to `minimum_learning_rate`."""

    learning_rate: PositiveFloat = 3e-4
    minimum_learning_rate: NonNegativeFloat = 3e-5
    warmup_steps: NonNegativeInt = 10
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    gradient_clip: NonNegativeFloat = 1.0


class Data(Frozen):
    """Where the text comes from. No `paths`: the sources and docstrings of Python's standard library.

    Paths are text files and folders, or folders that `pipermoe tokenize` has prepared; these bring their tokenizer.
    `packing` says where sequences begin: one after the other ("stream"), or so that none begins inside a document
    that began in the one before ("documents").
    """

    paths: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    packing: Packing = "stream"
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)


class Balance(Frozen):
    """How experts move to where the load is. `policy` is one of `pipermoe.layout.policies`; "static": they do not move
    between steps.

    Every rank has `spare_slots` slots beyond its even share of the experts. A better layout is looked for every
    `every_steps` steps, where a rank of some layer had more than `threshold` times the mean load, for at most
    `timeout_seconds`. What is found is taken if it earns its moves back before the load has drifted away.

    With `spill_above` every micro-batch is evened out after the router of a layer has chosen: where a rank has more
    rows than so many times the mean, others compute them with copies for this one use, at most `spill_copies` a rank.
    """

    policy: str = "static"
    mechanism: Mechanism = "decoupled"
    spare_slots: NonNegativeInt = 0
    every_steps: PositiveInt = 10
    threshold: float = Field(default=1.1, ge=1)
    timeout_seconds: PositiveFloat = 60.0
    spill_above: float | None = Field(default=None, ge=1)
    spill_copies: PositiveInt = 2

    @property
    def moves(self) -> bool:
        """Whether experts move between steps."""
        return self.policy != "static"

    @property
    def lays_out(self) -> bool:
        """Whether rows go where a layout says."""
        return self.moves or self.spill_above is not None


class TrainConfig(Frozen):
    """One training job: `global_batch_size` sequences of `seq_len` tokens a step.

    With a `capacity_factor` an expert takes at most so many times its even share of each rank's micro-batch, and the
    choices with the lowest weights beyond that are dropped; 0, the default, drops none.
    `mtp_loss_weight` weighs the mean loss of multi-token prediction layers (DeepSeek-V3: 0.3, later 0.1).
    `auxiliary_loss` weighs the load-balancing loss, whose load is that of each sequence, of a rank's micro-batch or of
    the global batch (`auxiliary_loss_level`); `z_loss` weighs the router z-loss. A router's correction bias, if it has
    one, moves by `balance_rate` after every step (DeepSeek-V3: 0.001). `state_bytes` replaces the bytes per parameter
    that the precision's recipe has, for another optimizer or other storage.
    Held-back text is evaluated before the first and after the last step, and after every `validate_every`. A step whose
    loss or gradient is not finite ends the run, or with `on_nonfinite = "skip"` changes nothing.
    """

    seq_len: PositiveInt
    global_batch_size: PositiveInt
    steps: PositiveInt = 100
    precision: Precision = "fp32"
    state_bytes: StateBytes | None = None
    capacity_factor: NonNegativeFloat = 0.0
    auxiliary_loss: NonNegativeFloat = 0.01
    auxiliary_loss_level: AuxiliaryLossLevel = "micro_batch"
    z_loss: NonNegativeFloat = 0.0
    mtp_loss_weight: NonNegativeFloat = 0.3
    balance_rate: NonNegativeFloat = 0.001
    seed: NonNegativeInt = 0
    balance: Balance = Balance()
    optimizer: Optimizer = Optimizer()
    data: Data = Data()
    validation_batches: PositiveInt = 4
    validate_every: NonNegativeInt = 0
    checkpoint_every: NonNegativeInt = 0
    on_nonfinite: OnNonfinite = "stop"

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.global_batch_size

    @property
    def recipe(self) -> Recipe:
        """Bytes of activations and of each parameter's state."""
        recipe = RECIPES[self.precision]
        return recipe if self.state_bytes is None else Recipe(activation=recipe.activation, state=self.state_bytes)
