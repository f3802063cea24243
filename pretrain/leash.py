"""Become a command that the kernel kills when its starter dies: python leash.py STARTER_PID COMMAND [ARGUMENT ...].

A process of its own, because what `subprocess` runs between fork and exec is unsafe in a program that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def leashed(argv: Sequence[str]) -> list[str]:
    """`argv` so that it gets SIGKILL when the calling thread's process dies; unchanged where the kernel is not Linux.

    The kernel watches the thread that starts it, so start it from the main thread.
    """
    if not sys.platform.startswith("linux"):
        return list(argv)
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *argv]


def main() -> None:
    """Ask the kernel, then exec; the request outlives exec."""
    starter, argv = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit(f"leash: prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != starter:  # it died before the request
        sys.exit(128 + signal.SIGKILL)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main()
