"""The `megatron` memory profile: which tensors Megatron-Core keeps, in which precision, and for how long.

    job        MegatronJob: a ModelSpec, a Strategy, and the choices that only Megatron has; Machine
    reader     Megatron's arguments -> MegatronJob
    layout     which layers, embedding, head and prediction modules each pipeline stage holds
    attention, mlp, head: every module with its weights and the tensors it saves for backward
    static     bytes between two steps: states, cached gradients, workspaces
    peak       the most bytes during a step, over the order of the schedule
    footprint  both for every pipeline rank, as a record

The tables of tensors with their sources and the comparison with measured runs: docs/megatron.md.
"""
