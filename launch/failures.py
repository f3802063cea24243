"""Who failed first: a record a failed rank, and the one line that a job ends with.

    python -m launch.failures RUN LIFE CODE

is the last word of a batch script: it prints the first failure of a life (one start of a job) and exits with the code
the job should have. CODE is the highest of the nodes' launchers, which alone cannot tell a stop with a checkpoint (75)
from a failure on another node.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LIFE = "PARALLELOTOPE_LIFE"  # set by whoever starts the launchers of all nodes; the same for all of them
EXIT_RUN_AGAIN = 75
BEFORE_IT_LISTENED = (128 + signal.SIGUSR1, 128 + signal.SIGTERM)  # a launcher that a stop signal found starting up
# What ranks say whose peer is gone: a consequence, never the first failure while another is known.
CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "cannot meet the others",
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a rank ended. `code` as in `subprocess`: negative for a signal. `time_s`: seconds since the epoch."""

    life: str
    rank: int
    host: str
    code: int
    how: str  # "exited with code 1"
    time_s: float
    last_lines: tuple[str, ...]

    @property
    def is_consequence(self) -> bool:
        """Whether it failed because another one was gone."""
        return any(phrase in line for line in self.last_lines for phrase in CONSEQUENCES)

    def line(self) -> str:
        """The failure in one line, with the last thing the rank said."""
        said = next((line.strip() for line in reversed(self.last_lines) if line.strip()), "")
        return f"rank {self.rank} on {self.host} {self.how}{': ' if said else ''}{said}"


def current_life() -> str:
    """The name of this start of the job."""
    return os.environ.get(LIFE) or "local"


def record_failure(run: Path, failure: Failure) -> None:
    """Write a rank's record, whole or not at all; a folder that cannot be written is no reason to fail again."""
    path = record_path(run, failure.life, failure.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        path.with_name(f".{path.name}.partial").unlink(missing_ok=True)  # a full disk takes its name, and no more
        print(f"{path}: cannot be written: {error.strerror}", file=sys.stderr)


def first_failure(run: Path, life: str) -> Failure | None:
    """The earliest failure of a life that is not a consequence of another; None: no rank failed."""
    found = []
    for path in (run / "failures").glob(f"{life}-rank-*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        found.append(Failure(**{**values, "last_lines": tuple(values["last_lines"])}))
    return min(found, key=lambda failure: (failure.is_consequence, failure.time_s), default=None)


def clear_failures(run: Path, life: str, ranks: Sequence[int], num_ranks: int) -> None:
    """Forget these ranks of an earlier life of the same name; all of it, where these are all of the job's `num_ranks`.

    The earlier life may have had more ranks, and its launcher may have been killed in the middle of a record.
    """
    old = [record_path(run, life, rank) for rank in ranks]
    if set(ranks) == set(range(num_ranks)):
        folder = run / "failures"
        old += [*folder.glob(f"{life}-rank-*.json"), *folder.glob(f".{life}-rank-*.json.partial")]
    for path in old:
        path.unlink(missing_ok=True)


def record_path(run: Path, life: str, rank: int) -> Path:
    """Where a rank's record is."""
    return run / "failures" / f"{life}-rank-{rank:05d}.json"


def outcome(run: Path, life: str, code: int) -> tuple[int, str]:
    """The code a job should end with, and the line to end on."""
    failure = first_failure(run, life)
    if failure is not None:
        own = failure.code if failure.code > 0 else 128 - failure.code
        when = time.strftime("%H:%M:%S", time.localtime(failure.time_s))
        return own, f"failed: at {when} {failure.line()}"
    if code == EXIT_RUN_AGAIN or code in BEFORE_IT_LISTENED:
        return EXIT_RUN_AGAIN, "stopped; the same command continues the run"
    return code, "finished" if code == 0 else f"failed: the launchers ended with code {code}, no rank left a record"


def main(argv: Sequence[str]) -> int:
    """RUN LIFE CODE"""
    code, line = outcome(Path(argv[0]), argv[1], int(argv[2]))
    print(f"parallelotope: {line}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
