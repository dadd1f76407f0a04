"""A Mixture-of-Experts model of transformers, trained by torch's DistributedDataParallel: what benchmarks/runtime.py
holds the runtime against. Runs where transformers is installed, and needs nothing of this project.

python transformers_ddp.py make FOLDER     writes FOLDER/model: a config.json and weights drawn at random
python transformers_ddp.py train FOLDER    trains it as FOLDER/job.json says, on FOLDER/tokens.npy, and prints JSON
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # pyright: ignore[reportMissingImports]

CONFIG = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "intermediate_size": 512,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}


def make(folder: Path) -> None:
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).save_pretrained(folder / "model")


def train(folder: Path) -> dict[str, Any]:
    """Seconds of every step, those of its slowest rank, and the losses of the global batch."""
    job = json.loads((folder / "job.json").read_text())
    tokens_SBT = np.load(folder / "tokens.npy")
    context = multiprocessing.get_context("fork")
    answers, store = context.Queue(), folder / "store"
    store.unlink(missing_ok=True)
    arguments = (folder / "model", job, tokens_SBT, store, answers)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(job["ranks"])]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    seconds, losses = zip(*found, strict=True)
    return {"seconds": np.max(seconds, axis=0).tolist(), "losses": np.mean(losses, axis=0).tolist()}


def _rank(rank: int, model: Path, job: dict[str, Any], tokens_SBT: np.ndarray, store: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=job["ranks"])
    module = Qwen3MoeForCausalLM.from_pretrained(model, experts_implementation=job["experts"])
    module.config.use_cache = False
    module.train()
    parallel = DistributedDataParallel(module, gradient_as_bucket_view=True)
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": job["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=job["betas"], eps=job["epsilon"], fused=True)
    seconds, losses = [], []
    for tokens_BT, rate in zip(tokens_SBT, job["rates"], strict=True):
        dist.barrier()
        start = time.perf_counter()
        share_BT = torch.from_numpy(np.array_split(tokens_BT, job["ranks"])[rank]).long()
        logits = parallel(share_BT[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), share_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, job["gradient_clip"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    answers.put((seconds, losses))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    command, where = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        make(where)
    else:
        print(json.dumps(train(where)))
