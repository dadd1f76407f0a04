"""A plan as a job of Megatron-LM's pretrain_gpt.py: an argument file and a launch script.

The arguments themselves are `specs.megatron`, what Megatron cannot run `specs.runtimes.megatron`; here are the files.
"""

from __future__ import annotations

from pipermoe.export.shell import Cluster, header, launch_script, title
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.megatron import Arguments, write_arguments
from pipermoe.specs.megatron.options import Value
from pipermoe.specs.runtimes.megatron import TARGET

# Fused kernels and a regular garbage collector: faster, and nothing else.
FASTER: dict[str, Value] = {"moe_permute_fusion": True, "cross_entropy_loss_fusion": True, "manual_gc": True}

# Of the model recipes of Megatron-LM's users (github.com/yanring/Megatron-MoE-ModelZoo).
ENVIRONMENT = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_NVLS_ENABLE": "0",
}


def files(plan: Configuration, cluster: Cluster) -> dict[str, str]:
    """The files of the job by name."""
    what = title(plan)
    given = write_arguments(plan.model, plan.train, plan.strategy).given
    arguments = "".join(" ".join(words) + "\n" for words in Arguments({**given, **FASTER}).words())
    read_arguments = (
        "arguments=()\n"
        "while read -r -a words; do arguments+=(\"${words[@]}\"); done < <(grep -v '^#' megatron.args)\n"
        "# DATA: arguments for data and tokenizer; synthetic tokens without it.\n"
        'read -r -a data <<< "${DATA:---mock-data --tokenizer-type NullTokenizer'
        f' --vocab-size {plan.model.vocab_size - 1}}}"\n'
    )
    return {
        "megatron.args": header(what, TARGET) + arguments,
        "launch.sh": launch_script(
            what,
            TARGET,
            cluster,
            '"$MEGATRON/pretrain_gpt.py" "${arguments[@]}" "${data[@]}"',
            environment=environment(plan),
            needs=[("MEGATRON", "set it to the folder of Megatron-LM that holds pretrain_gpt.py")],
            before=read_arguments,
        ),
    }


def environment(plan: Configuration) -> dict[str, str]:
    """Variables of the run. Launching one kernel at a time orders communication before computing, except under FSDP."""
    if max(plan.strategy.sharding_levels, default=0) > 1:
        return ENVIRONMENT
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | ENVIRONMENT
