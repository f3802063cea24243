"""Run a plan's processes on this machine until all have left, or until the first one fails.

Every rank leads a process group of its own, so a Ctrl-C in the terminal reaches the launcher alone, which forwards it
once. What a rank leaves behind in its group when it is gone (workers of a data loader) is killed with it.
"""

from __future__ import annotations

import glob
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO

from data_pipeline.settings import UserError
from launch.failures import Failure, clear_failures, current_life, record_failure
from launch.plan import EXIT_RUN_AGAIN, Machine, Plan, RankPlan
from pretrain.leash import leashed

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_S = 10.0  # between SIGTERM and SIGKILL
DRAIN_S = 2.0  # for the last output of a rank that is gone
TAIL_LINES = 10
TAIL_BYTES = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Exited:
    """A rank is gone; `code` is as in `subprocess`: negative for a signal."""

    rank: int
    code: int


@dataclass(frozen=True, kw_only=True)
class Signalled:
    """The launcher itself got a signal."""

    number: int


Events = SimpleQueue[Exited | Signalled]  # SimpleQueue.put may be called in a signal handler


def this_machine() -> Machine:
    """Facts of this machine, found without torch; the port is free now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(host=socket.gethostname(), num_cores=cores, has_gpu=_has_gpu(), master_port=free_port())


def _has_gpu() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and bool(glob.glob("/dev/nvidia[0-9]*") or shutil.which("nvidia-smi"))


def free_port() -> int:
    """A port that can be bound on 127.0.0.1 now.

    Below 32768: the kernel hands out higher ones to any connection, so one of those could be gone a moment later.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("no free port among 200 tried between 20000 and 32000 on 127.0.0.1; expected one for the ranks")


def run(plan: Plan, run_dir: Path | None = None, grace_s: float = GRACE_S) -> int:
    """Start the ranks of `plan` and wait for them. Rank 0 speaks on stdout, every rank into its log.

    run_dir: where the first rank that fails here leaves a record (see launch.failures); None: nowhere.

    Signals SIGTERM, SIGINT and SIGUSR1 to this process go on to every rank, each once. On Linux the ranks are killed
    when this process dies, even by SIGKILL. Call it from the main thread.

    Returns:
        0 when every rank left with 0; 75 when a rank asked to be run again and none failed (also one that a forwarded
        signal ended before it could listen to it: nothing is lost yet); else the code of the first rank that failed, or
        128 + its signal. After a failure the others get SIGTERM, and SIGKILL `grace_s` later.

    Raises:
        UserError: a process cannot be started, or a log cannot be opened.
    """
    events: Events = SimpleQueue()
    ranks: list[_Rank] = []
    if run_dir is not None:
        clear_failures(run_dir, current_life(), [rank_plan.rank for rank_plan in plan.ranks], plan.num_ranks)
    with _signals_to(events):
        try:
            for rank_plan in plan.ranks:
                ranks.append(_Rank(rank_plan))
            for rank in ranks:
                rank.watch(events, sys.stdout.buffer if rank.plan.rank == 0 else None)
            return _supervise(ranks, events, grace_s, plan.num_ranks, run_dir)
        finally:
            for rank in ranks:
                rank.close()


def _supervise(ranks: list[_Rank], events: Events, grace_s: float, num_ranks: int, run_dir: Path | None) -> int:
    running = {rank.plan.rank: rank for rank in ranks}
    codes: dict[int, int] = {}
    forwarded: set[int] = set()
    failure: Exited | None = None
    kill_at: float | None = None
    while running:
        try:
            event = events.get(timeout=None if kill_at is None else max(0.0, kill_at - time.monotonic()))
        except Empty:
            kill_at = None
            for rank in running.values():
                rank.kill()
            continue
        if isinstance(event, Signalled):
            forwarded.add(event.number)
            for rank in running.values():
                rank.process.send_signal(event.number)
            continue
        gone = running.pop(event.rank)
        gone.kill()  # what it left behind
        early = -event.code in forwarded  # ended by our signal before it listened: the others wait for it in vain
        codes[event.rank] = EXIT_RUN_AGAIN if early else event.code
        if (early or codes[event.rank] not in (0, EXIT_RUN_AGAIN)) and kill_at is None and failure is None:
            kill_at = time.monotonic() + grace_s
            if early:
                forwarded.add(signal.SIGTERM)
            else:
                failure = event
                _tell(gone, event.code, num_ranks, ranks[0], run_dir)
            for rank in running.values():
                rank.process.terminate()
        gone.drain()
    if failure is not None:
        return failure.code if failure.code > 0 else 128 - failure.code
    return EXIT_RUN_AGAIN if EXIT_RUN_AGAIN in codes.values() else 0


def _tell(rank: _Rank, code: int, num_ranks: int, speaker: _Rank, run_dir: Path | None) -> None:
    """Name the first failure of this machine; `speaker`: the rank whose output is on the terminal already."""
    how = f"exited with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    others = "; the others are ended" if num_ranks > 1 else ""
    hint = ""
    if code == -signal.SIGKILL:
        hint = " (the system does that when memory runs out: lower train.chunk or data.num_workers)"
    rank.drain()
    lines = rank.last_lines()
    if run_dir is not None:
        host, now_s = socket.gethostname(), time.time()
        failure = Failure(
            life=current_life(), rank=rank.plan.rank, host=host, code=code, how=f"{how}{hint}", time_s=now_s,
            last_lines=tuple(lines),
        )  # fmt: skip
        record_failure(run_dir, failure)
    place = f"rank {rank.plan.rank} of {num_ranks} {how}{hint}{others}"
    new = [] if rank is speaker else [line for line in lines if line not in speaker.last_lines()]
    if new:
        print(f"{place}; its last lines ({rank.plan.log_path}):", file=sys.stderr)
        for line in new:
            print(f"  rank {rank.plan.rank} | {line}", file=sys.stderr)
    else:
        print(f"{place}; its last lines are above", file=sys.stderr)
    sys.stderr.flush()


class _Rank:
    """A started process, its log, and the end of what it said."""

    def __init__(self, plan: RankPlan) -> None:
        self.plan = plan
        self._tail = b""
        self._copying: threading.Thread | None = None
        if shutil.which(plan.argv[0]) is None:
            raise UserError(f"rank {plan.rank}: cannot start {plan.argv[0]}: no such program")
        try:
            plan.log_path.parent.mkdir(parents=True, exist_ok=True)
            with open(plan.log_path, "ab") as log:
                log.write(f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} rank {plan.rank} starts\n".encode())
            self.process = subprocess.Popen(
                leashed(plan.argv), env=os.environ | plan.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"rank {plan.rank}: cannot start {plan.argv[0]}: {error}") from error

    def watch(self, events: Events, terminal: BinaryIO | None) -> None:
        """Begin to copy what it says, and to report when it leaves."""
        self._copying = threading.Thread(target=self._copy, args=(terminal,), daemon=True)
        self._copying.start()
        threading.Thread(target=self._wait, args=(events,), daemon=True).start()

    def kill(self) -> None:
        """SIGKILL to its whole group, if any of it is left."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def drain(self) -> None:
        """Let the last output of a process that has left arrive."""
        assert self._copying is not None
        self._copying.join(DRAIN_S)  # a grandchild that left the group may hold the pipe open for ever

    def close(self) -> None:
        """Leave nothing running or open, whatever happened."""
        if self.process.poll() is None:
            self.kill()
            self.process.wait()
        if self._copying is None:
            self._copy(None)

    def last_lines(self) -> list[str]:
        """The end of its output."""
        return self._tail.decode(errors="replace").splitlines()[-TAIL_LINES:]

    def _wait(self, events: Events) -> None:
        events.put(Exited(rank=self.plan.rank, code=self.process.wait()))

    def _copy(self, terminal: BinaryIO | None) -> None:
        """Its output into the log, the tail and the terminal. Never stops reading: a full pipe would block the rank."""
        pipe = self.process.stdout
        assert isinstance(pipe, BufferedReader)
        with pipe, open(self.plan.log_path, "ab", buffering=0) as log:
            sinks: list[BinaryIO] = [log] if terminal is None else [log, terminal]
            while chunk := pipe.read1(1 << 16):
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]
                for sink in list(sinks):
                    try:
                        sink.write(chunk)
                        sink.flush()
                    except OSError as error:
                        sinks.remove(sink)
                        print(f"rank {self.plan.rank}: output to {sink.name} ends here: {error}", file=sys.stderr)


@contextmanager
def _signals_to(events: Events) -> Iterator[None]:
    """Put forwarded signals into `events` instead of acting on them."""
    before = {
        number: signal.signal(number, lambda caught, frame: events.put(Signalled(number=caught)))
        for number in FORWARDED_SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
