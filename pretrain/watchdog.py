"""Ends a rank whose step does not go on, and says where it stands. A hung collective holds every rank in silence."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
CHECKS = 10  # in the time that is allowed


@contextmanager
def watched(position: Callable[[], tuple[str, float]], timeout_s: float, who: Callable[[], str]) -> Iterator[None]:
    """Inside, end this process with EXIT_HUNG once its position has not changed for `timeout_s`.

    Before, the stacks of all threads and one line go to stderr. position(): the stage it is in, and for how many
    seconds nothing has changed. who(): rank and step, for the line.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(min(timeout_s / CHECKS, 5.0)):
            stage, since_s = position()
            if since_s > timeout_s and not done.is_set():
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                print(
                    f"error: {who()}: nothing has happened for {since_s:.0f} s in stage '{stage}' "
                    f"(faults.stage_timeout_s is {timeout_s:g}): this rank, or one it waits for, hangs",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_HUNG)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
