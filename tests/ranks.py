"""Run a function on several gloo ranks: real processes, one start for all checks of a test file."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(
    target: str, size: int, folder: Path, argument: Any = None, timeout_s: float = 300, show: bool = False
) -> list[Any]:
    """Call `target` ("tests.module:function") as function(world, argument) on `size` ranks.

    Returns what each rank returned (through JSON). Fails with a rank's traceback. show: what rank 0 prints is seen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "argument.json").write_text(json.dumps(argument))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "PYTHONPATH": str(ROOT)}
    environment |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    processes = []
    for rank in range(size):
        log = open(folder / f"rank-{rank}.log", "w")  # noqa: SIM115 - belongs to the process
        command = [sys.executable, "-m", "tests.ranks", target, str(folder)]
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        shown = None if show and rank == 0 else log
        processes.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=shown, stderr=log))
        log.close()
    try:
        codes = [process.wait(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join(
        f"--- rank {r} exited with {c}\n" + (folder / f"rank-{r}.log").read_text() for r, c in enumerate(codes)
    )
    assert not any(codes), logs
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(size)]


def _main() -> None:
    target, folder = sys.argv[1], Path(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from pretrain.engine import prepare_environment

    prepare_environment()
    import torch
    import torch.distributed as dist

    from pretrain.collectives import World
    from pretrain.ranks import leave_ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    world = World(rank=rank, size=size)
    module, function = target.split(":")
    try:
        argument = json.loads((folder / "argument.json").read_text())
        result = getattr(importlib.import_module(module), function)(world, argument)
        (folder / f"result-{rank}.json").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the other ranks must not wait for this one's collectives
    leave_ranks(world, 0)


if __name__ == "__main__":
    _main()
