"""What DeepSpeed calls things: the keys that it knows. Presets of models: specs/runtimes/deepspeed.py.

DeepSpeed ignores sections, and keys of `expert_parallel`, that it does not know; by these lists we refuse them.
Sources: deepspeed/runtime/config.py and deepspeed/module_inject/auto_ep_config.py of 0.19.8.
"""

from __future__ import annotations

OURS = "pipermoe"  # a section of ours, which DeepSpeed ignores: what JSON has no comment for
WRITTEN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "fp16", "data_types", "zero_optimization", "optimizer", "scheduler"),
    *("expert_parallel", "tensor_parallel", "activation_checkpointing"),
)
IGNORED = (
    *("aio", "amp", "autotuning", "checkpoint", "comms_logger", "communication_data_type", "compile"),
    *("compression_training", "csv_monitor", "curriculum_learning", "data_efficiency", "dataloader_drop_last"),
    *("disable_allgather", "disable_python_gc", "dump_state", "elasticity", "flops_profiler", "gradient_allreduce_op"),
    *("gradient_predivide_factor", "hybrid_engine", "legacy_fusion", "log_level", "managed_gradient_accumulation"),
    *("memory_breakdown", "nebula", "pipeline", "prescale_gradients", "seq_parallel_communication_data_type"),
    *("sequence_parallel_size", "sparse_attention", "steps_per_print", "tensorboard", "torch_autocast"),
    *("use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb"),
    *("weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)
EXPERT_PARALLEL = (
    *("enabled", "autoep_size", "expert_tensor_parallel_size", "validate_folding_routing", "async_split_plan"),
    *("preset_model", "moe_layer_pattern", "expert_pattern", "router_pattern", "use_grouped_mm"),
    *("disable_triton_grouped_mm", "route_norm", "route_scale", "score_apply", "combine_impl", "row_weighting_impl"),
    *("gate_up_impl", "comm_backend", "comm_num_sm", "comm_qp_margin", "comm_max_tokens_per_rank"),
    *("num_expert_groups", "num_limited_groups", "score_func", "top_k", "load_balance_coeff", "routed_scaling_factor"),
    *("expert_w1", "expert_w2", "expert_w3", "num_experts_attr", "top_k_attr", "has_shared_experts"),
    *("shared_experts_pattern", "shared_experts_gate_pattern", "expert_activation"),
)
