"""The ways to kill a run, and what its launcher must do about each."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.checkpoint import checkpoints_folder
from tests.chaos.start import NUM_STEPS, Process, Start, last_step, require

MOST_STEPS = 7  # that a start makes before it is killed
LARGEST_FILE_BYTES = 100_000  # more than a log, less than a rank's share of a checkpoint


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is killed, and at which moment."""

    what: Literal["everything", "one rank", "the launcher", "a decoding process", "file growth", "the disk"]
    when: Literal["at work", "starting", "saving", "stopping"] = "at work"

    def __str__(self) -> str:
        names = {"file growth": "no file may grow", "the disk": "the disk is full"}
        return names.get(self.what, self.what) + ("" if self.when == "at work" else f" while {self.when}")


DISK_FULL = Kind(what="the disk")
KINDS = (
    Kind(what="everything"),
    Kind(what="everything", when="starting"),
    Kind(what="everything", when="saving"),
    Kind(what="everything", when="stopping"),
    Kind(what="one rank"),
    Kind(what="one rank", when="saving"),
    Kind(what="the launcher"),
    Kind(what="a decoding process"),
    Kind(what="file growth"),
    DISK_FULL,
)


def wait_for_the_moment(start: Start, kind: Kind, choice: random.Random, usual_start_s: float) -> float | None:
    """Until a random moment of that kind. Returns the seconds to the first step, if there was one."""
    if kind.when == "starting":
        time.sleep(choice.random() * usual_start_s)
        return None
    resumed_s = start.wait_for_new_steps(choice.randint(1, MOST_STEPS))
    time.sleep(choice.random() * 0.2)
    if kind.when == "saving":
        old = unfinished(start.run)
        while not unfinished(start.run) - old and start.process.poll() is None:
            time.sleep(0.0005)
        time.sleep(choice.random() * 0.02)
    elif kind.when == "stopping":
        with suppress(ProcessLookupError):
            start.process.terminate()
        time.sleep(choice.random() * 0.5)
    return resumed_s


def unfinished(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or deleted: name and inode, which a second attempt does not share."""
    found = set()
    for path in checkpoints_folder(run).glob(".step-*.partial"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def kill(start: Start, kind: Kind, choice: random.Random) -> bool:
    """Do it now. Returns whether the run was hit: it may have come to its end by itself just before.

    Raises:
        Fault: the launcher did not do what it must.
    """
    found = start.processes()
    if kind.what == "everything":
        sigkill(sorted(found, key=lambda process: process.role != "launcher"))
        return bool(found)
    if kind.what == "the launcher":
        sigkill([process for process in found if process.role == "launcher"])
        return start.process.wait() == -signal.SIGKILL
    if kind.what == "the disk":
        return fill_the_disk(start)
    if kind.what == "file growth":
        return forbid_growth(start, found)
    wanted = "rank" if kind.what == "one rank" else "worker"
    victims = [process for process in found if process.role == wanted]
    if not victims:
        return False
    victim = choice.choice(victims)
    sigkill([victim])
    if wanted == "worker":
        return failed(start, 1, f"(pid {victim.pid})")
    place = f"rank {victim.rank} of {start.topology.ranks}"
    return failed(start, 128 + signal.SIGKILL, f"{place} was ended by SIGKILL")


def sigkill(victims: list[Process]) -> None:
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)


def failed(start: Start, code: int, words: str) -> bool:
    """Whether the start failed, as it must: with this code, saying these words. False: it had just come to its end."""
    found, said = start.end(), start.said()
    if found == 0 and last_step(start.run) == NUM_STEPS:
        return False
    require(found == code, f"ended with code {found} instead of {code}:\n{said}")
    require(words in said, f"'{words}' was not said:\n{said}")
    return True


def fill_the_disk(start: Start) -> bool:
    """Leave no room until the run has given up; then make room again."""
    ballast = start.run.parent / "ballast"
    try:
        with suppress(OSError), open(ballast, "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 16))
        return gives_up(start, "No space left on device")
    finally:
        ballast.unlink(missing_ok=True)


def forbid_growth(start: Start, found: list[Process]) -> bool:
    """No rank may write a file as large as its share of a checkpoint."""
    for process in found:
        if process.role == "rank":
            with suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES))
    return gives_up(start, "File too large")


def gives_up(start: Start, reason: str) -> bool:
    """A mistake of the surroundings: exit code 2, and one line that says the reason."""
    hit = failed(start, 2, reason)
    lines = [line.rpartition(" | ")[2] for line in start.said().splitlines()]
    require(
        not hit or any(line.startswith("error: ") and reason in line for line in lines),
        f"no line says '{reason}':\n{start.said()}",
    )
    return hit
