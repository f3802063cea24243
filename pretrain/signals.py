"""Signals that ask a run to stop become a flag; the trainer finishes its step, saves and leaves with EXIT_RUN_AGAIN."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_RUN_AGAIN = 75  # the same command continues the run; EX_TEMPFAIL of sysexits.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """`received` is the name of the first stop signal, or None. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
