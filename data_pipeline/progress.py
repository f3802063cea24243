"""How far a long job is: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_EVERY_S = 5.0


class JobProgress:
    """Counts units done, their rate, the time left and, where the job can reject, the rejects by reason."""

    def __init__(self, name: str, unit: str, num_total: int, *, can_reject: bool = False) -> None:
        self._name, self._unit, self._num_total = name, unit, num_total
        self._can_reject = can_reject
        self._num_done, self._rejects = 0, Counter[str]()
        self._started_s = self._printed_s = time.monotonic()
        self._console = Console()
        self._bar: Progress | None = None

    def __enter__(self) -> JobProgress:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._bar.add_task(f"{self._name} ({self._unit})", total=self._num_total, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._num_done:
            self.say(f"{self._num_done}/{self._num_total} {self._unit}  {self._note()}")

    def advance(self, num_done: int, rejects: Mapping[str, int] | None = None) -> None:
        """`num_done` more units are done, and gave these rejects by reason."""
        self._num_done += num_done
        self._rejects.update(rejects or {})
        now_s = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._num_done, note=self._note())
        elif now_s - self._printed_s > PLAIN_EVERY_S and self._num_done < self._num_total:
            self._printed_s = now_s
            self.say(f"{self._num_done}/{self._num_total} {self._unit}  {self._note()}")

    def _note(self) -> str:
        rate = self._num_done / max(time.monotonic() - self._started_s, 1e-9)
        left_s = (self._num_total - self._num_done) / rate if rate else 0.0
        rejects = f"  rejects: {describe_rejects(self._rejects)}" if self._can_reject else ""
        return f"{rate:.1f}/s  ETA {int(left_s) // 60}:{int(left_s) % 60:02d}{rejects}"

    def say(self, line: str) -> None:
        """Print a line (above the bar)."""
        self._console.print(f"{self._name}: {line}", markup=False, highlight=False, soft_wrap=True)


def describe_rejects(rejects: Mapping[str, int]) -> str:
    """ "truncated 3, not_media 1", the most frequent first; "none"."""
    ordered = sorted(rejects.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ordered) or "none"


def counted(number: int, noun: str) -> str:
    """ "1 task", "2 tasks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
