"""What one rank does from its first moment to its last: meet the others, train, part."""

from __future__ import annotations

from dataclasses import replace

import torch

# Autograd imports these two at its first call: here once, before ranks are forked, instead of seconds in every rank.
import torch._dynamo
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes
from torch.distributed.rendezvous import rendezvous

from pipermoe.data.batches import TextData
from pipermoe.processes.world import World
from pipermoe.specs.errors import MachineError, UserError
from pipermoe.specs.plan import Measurement, Plan
from pipermoe.training.roll_call import RollCall
from pipermoe.training.run import Run
from pipermoe.training.trainer import train


def run_rank(
    plan: Plan, data: TextData, run: Run, world: World, roll_call: RollCall | None = None
) -> Measurement | None:
    """Join `world` and train. The ranks tell each other how they are by `roll_call`, if nobody watches over them.

    Raises `UserError` as `train` does, and `MachineError` naming the rank otherwise.
    """
    run.tell("meeting the other ranks")
    device = device_for(local_rank=world.local_rank)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)  # one rank is one thread: ranks are what a machine's cores are shared by
        store, _, _ = next(rendezvous(world.init_method, world.rank, world.size, timeout=run.timeout))
        if roll_call is not None:
            roll_call.open(store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=run.timeout,
        )
        measurement = train(plan, data, replace(run, device=str(device)))
        if roll_call is not None:
            roll_call.close()
        dist.barrier()  # who leaves early closes its connections under the others
        dist.destroy_process_group()
    except UserError:
        raise
    except Exception as error:
        raise MachineError(f"rank {world.rank}: {type(error).__name__}: {first_line(error)}") from error
    return measurement


def device_for(ranks: int | None = None, *, local_rank: int = 0) -> torch.device:
    """The device of a local rank: its GPU where this machine has GPUs, else the CPU.

    With `ranks` raises `UserError` where this machine has GPUs but fewer than that.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if max(ranks or 0, local_rank + 1) > count:
        wanted = ranks or local_rank + 1
        raise UserError(
            f"the plan needs {wanted} ranks on this machine, which has {count} GPUs; hide them for a CPU run"
        )
    return torch.device("cuda", local_rank)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
