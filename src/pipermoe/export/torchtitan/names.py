"""What torchtitan calls things: schedules, sharding. Models and number formats: specs/runtimes/torchtitan.py."""

from __future__ import annotations

# Schedules of torch.distributed.pipelining whose order is ours, action by action; the others go as CSV.
SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved-1f1b": "Interleaved1F1B",
    "zb-v": "ZBVZeroBubble",
    "dualpipe-v": "DualPipeV",
}
RESHARD = {2: "never", 3: "always"}  # after the forward pass: FSDP keeps the gathered weights, or frees them
