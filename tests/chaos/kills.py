"""Ways to end a run that does not expect it."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress

from pretrain.checkpoint import checkpoints_folder
from tests.chaos.started_run import END_TIMEOUT_S, NUM_STEPS, START_TIMEOUT_S, Run, is_alive, last_step


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for_a_save(start: Run) -> None:
    """Until a checkpoint is under way, or the run ends."""
    folder = checkpoints_folder(start.run)
    while not any(folder.glob(".step-*.partial")) and start.process.poll() is None:
        time.sleep(0.0005)


def kill(start: Run, how: str, choice: random.Random) -> None:
    """Kill what `how` says, now."""
    if how.endswith("while saving"):
        wait_for_a_save(start)
        time.sleep(choice.random() * 0.01)
    who = start.processes()
    ranks = [pid for pid, name in who.items() if name.startswith("rank")]
    workers = [pid for pid, name in who.items() if name.startswith("worker")]
    if how.startswith("everything"):
        kill_all(list(who))
    elif how.startswith("one rank"):
        victim = choice.choice(ranks)
        kill_all([victim])
        code = start.process.wait(timeout=END_TIMEOUT_S)
        if code != 0:  # 0: the victim had just finished
            assert code == 128 + signal.SIGKILL, (code, start.said())
            assert f"{who[victim]} of" in start.said() or start.topology.ranks == 1, start.said()
    elif how == "the launcher":
        kill_all([start.process.pid])
    else:
        kill_all([choice.choice(workers)])
        code = start.process.wait(timeout=END_TIMEOUT_S)
        assert code != 0 or last_step(start.run) == NUM_STEPS, start.said()


def fill_the_disk(start: Run, choice: random.Random) -> None:
    """Leave no room, until the run has given up; then make room again."""
    ballast = start.run.parent / "ballast"
    try:
        with suppress(OSError), open(ballast, "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 16))
        code = start.process.wait(timeout=START_TIMEOUT_S)
        said = start.said()
        assert code == 2, (code, said)
        assert any(line.startswith("error: ") and "No space left on device" in line for line in said.splitlines()), said
    finally:
        ballast.unlink(missing_ok=True)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + END_TIMEOUT_S
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.02)


KINDS = (
    "everything", "everything while saving", "one rank", "one rank while saving", "the launcher", "a decoding process",
    "the disk is full",
)  # fmt: skip
