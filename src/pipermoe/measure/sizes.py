"""What is measured: the widths of the products, and how many sizes and how much time each measurement may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipermoe.specs.model import ModelSpec
from pipermoe.specs.units import KIB, MIB

MOST_EXPERT_BYTES = 256 * MIB  # of one rank's experts while measuring
WIDEST = 4096  # rates change little beyond this width, and every rank must hold the operands
BYTES_PER_ELEMENT = 4


@dataclass(frozen=True, slots=True)
class Widths:
    """The widths that a model gives to its operations. The default is a small MoE that a laptop trains."""

    hidden: int = 192
    query: int = 192
    key_value: int = 64
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    experts: int = 8  # that one rank measures
    top_k: int = 2
    expert_width: int = 256
    vocab: int = 256

    @classmethod
    def of(cls, model: ModelSpec) -> Widths:
        """The widths of `model`, narrowed to what a rank can hold and time while measuring."""
        attention, moe = model.attention, model.moe
        expert_width, head_dim = min(moe.expert_width, WIDEST), min(attention.query_key_dim, WIDEST)
        shared_by = attention.num_heads // attention.num_kv_heads if attention.kind == "gqa" else 1
        num_kv_heads = max(1, min(attention.num_heads, WIDEST // head_dim) // shared_by)
        bytes_per_expert = BYTES_PER_ELEMENT * 3 * model.hidden_size * expert_width
        return cls(
            hidden=model.hidden_size,
            query=min(attention.num_heads * attention.query_key_dim, WIDEST),
            key_value=min(max(1, attention.cache_width // 2), WIDEST),
            num_heads=num_kv_heads * shared_by,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_experts=moe.num_experts,
            experts=max(1, min(moe.num_experts, 8, MOST_EXPERT_BYTES // bytes_per_expert)),
            top_k=moe.top_k,
            expert_width=expert_width,
            vocab=model.vocab_size,
        )

    @property
    def widest_row(self) -> int:
        """The most elements that a memory-bound pass (other than the loss) handles for one token."""
        return max(self.hidden * self.top_k, 2 * self.expert_width, self.num_heads * self.head_dim, self.num_experts)


@dataclass(frozen=True, slots=True)
class Effort:
    """How many sizes are measured, and the seconds that the repeats of one size may take.

    A size whose single call would exceed `longest_call_seconds` is left out: curves are constant beyond their ends.
    """

    tokens: tuple[int, ...]
    rows_per_expert: tuple[int, ...]
    seq_lens: tuple[int, ...]
    pass_tokens: tuple[int, ...]
    element_counts: tuple[int, ...]
    parameter_counts: tuple[int, ...]
    message_bytes: tuple[int, ...]
    compute_seconds: float
    message_seconds: float
    crowd_seconds: float
    longest_call_seconds: float


FULL = Effort(
    tokens=(32, 128, 512, 2048, 8192),
    rows_per_expert=(4, 16, 64, 256, 1024, 2048),
    seq_lens=(64, 128, 256, 512, 1024, 2048),
    pass_tokens=(128, 512, 2048, 8192),
    element_counts=tuple(2**n for n in (10, 13, 15, 17, 19, 21, 23)),
    parameter_counts=(2**16, 2**19, 2**22),
    message_bytes=(KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB),
    compute_seconds=0.06,
    message_seconds=0.2,
    crowd_seconds=1.0,
    longest_call_seconds=0.5,
)

QUICK = Effort(
    tokens=(128, 1024, 4096),
    rows_per_expert=(16, 128, 1024),
    seq_lens=(128, 512),
    pass_tokens=(256, 2048),
    element_counts=(2**10, 2**15, 2**19, 2**22),
    parameter_counts=(2**18, 2**21),
    message_bytes=(4 * KIB, 128 * KIB, MIB, 4 * MIB),
    compute_seconds=0.025,
    message_seconds=0.08,
    crowd_seconds=0.4,
    longest_call_seconds=0.15,
)


def on_gpu(effort: Effort) -> Effort:
    """The sizes that show what an accelerator reaches: beyond those of a processor core, in as many steps."""
    return replace(
        effort,
        tokens=tuple(16 * tokens for tokens in effort.tokens),
        rows_per_expert=tuple(8 * rows for rows in effort.rows_per_expert),
        seq_lens=tuple(8 * seq_len for seq_len in effort.seq_lens),
        pass_tokens=tuple(8 * tokens for tokens in effort.pass_tokens),
        element_counts=tuple(32 * count for count in effort.element_counts),
        parameter_counts=tuple(32 * count for count in effort.parameter_counts),
        message_bytes=(*effort.message_bytes, 16 * effort.message_bytes[-1]),
        compute_seconds=2 * effort.compute_seconds,
    )
