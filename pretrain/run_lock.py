"""One run at a time in a run folder: two would overwrite each other's log and checkpoints."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from data_pipeline.settings import UserError

WAIT_S = 5.0  # the decoding processes of a killed run hold its lock for another second


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
