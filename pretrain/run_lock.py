"""One run at a time in a run folder, and one folder for all its nodes: two would overwrite each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import torch

from data_pipeline.settings import UserError
from pretrain.collectives import World

WAIT_S = 5.0  # the decoding processes of a killed run hold its lock for another second
SHARED_WAIT_S = 65.0  # an NFS client remembers for up to a minute that a file was not there

NAME = ".lock"


def hold_run(run: Path) -> int:
    """Lock a run folder for the life of this process; the kernel lets go when it ends, however it ends.

    Returns the descriptor that holds the lock.

    Raises:
        UserError: another process holds it, or the folder cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"run_dir {run}: cannot be made: {error.strerror}") from error
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = os.read(descriptor, 64).decode(errors="replace").strip() or "another process"
                raise UserError(f"run_dir {run} is in use by {holder}: end that run, or use another run_dir") from None
            time.sleep(0.1)
        except OSError as error:
            raise UserError(f"run_dir {run}: cannot be locked ({error.strerror}); expected locks of files") from error
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
            return descriptor


def check_shared(run: Path, world: World, wait_s: float = SHARED_WAIT_S) -> None:
    """Refuse a run folder that is not the same on all nodes. A collective call; rank 0 holds the run.

    wait_s: how long a rank looks for what rank 0 wrote.

    Raises:
        UserError: on every rank, names the first that does not see what rank 0 wrote.
    """
    place = run / NAME
    written = world.share(place.read_text() if world.rank == 0 else None)
    deadline = time.monotonic() + wait_s
    while not (seen := _content(place) == written) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = world.size - int(world.max(torch.tensor([0 if seen else world.size - world.rank], device=world.device)))
    if blind < world.size:
        raise UserError(
            f"run_dir {run}: rank {blind} does not see what rank 0 wrote there; expected a folder that all nodes share"
        )


def _content(place: Path) -> str | None:
    """None where it cannot be read, for whatever reason: the other ranks wait for this one's word."""
    try:
        return place.read_text()
    except (OSError, ValueError):
        return None
