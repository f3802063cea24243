"""Which rank this process is, whoever started it: nobody, torchrun, deepspeed, srun or our launcher."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from data_pipeline.settings import UserError
from pretrain.collectives import World
from pretrain.engine import prepare_environment
from pretrain.preflight import first_host, slurm_port, slurm_variable

MARGIN_S = 60.0  # the watchdog of a rank that hangs speaks before those that wait for it give up


def join_ranks(threads: int, stage_timeout_s: float) -> World:
    """Initialise torch.distributed (NCCL with a GPU, gloo without) and pick this rank's device.

    threads: CPU threads of this rank; 0 shares the machine's cores among its ranks. stage_timeout_s: how long a stage
    of a step may take; collectives are given up a little later.

    Raises:
        UserError: the environment names a rank but not where rank 0 listens, or the ranks cannot meet.
    """
    _complete_environment()
    prepare_environment()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_ranks))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        device = torch.device("cpu")
    timeout = timedelta(seconds=stage_timeout_s + MARGIN_S)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {rank} of {size} cannot meet the others at {where}: {str(error).splitlines()[0]}"
        ) from error
    return World(rank=rank, size=size, device=device)


def leave_ranks(world: World, code: int) -> NoReturn:
    """End this process with `code` once all ranks are here, without tearing the interpreter down.

    Threads of gloo and DeepSpeed have been seen to abort a finished process in that ("terminate called without an
    active exception"), which would turn a good run into a failed one. Files must be closed before.
    """
    world.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _complete_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the starter did not."""
    if "RANK" not in os.environ and slurm_variable("SLURM_PROCID") is not None:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(slurm_port(os.environ["SLURM_JOB_ID"])))
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    os.environ.setdefault("LOCAL_RANK", "0")
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"environment: RANK is set but {', '.join(missing)} not; start through torchrun or a launcher")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
