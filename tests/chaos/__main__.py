"""Kills real runs at random moments, starts them again, and compares what comes out with a run that was left alone.

    python -m tests.chaos [--kills 30] [--seed 0] [--folder DIR] [--write docs/chaos.md]

Two series: on the same topology the run must be bitwise the one left alone; on topologies that change at every start it
must draw the same samples and follow the same curve. Exit code 1 if anything is not so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.page import page
from tests.chaos.series import SERIES, Chaos
from tests.test_resume import mounted

DISK = "64m"


@contextmanager
def a_folder(parent: Path | None) -> Iterator[tuple[Path, bool]]:
    """A folder for the runs, and whether its disk may be filled: a small file system of its own, if that is allowed."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        disk = Path(name) / "disk"
        if not mounted(disk, DISK):
            yield disk, False
            return
        try:
            yield disk, True
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def main(argv: list[str] | None = None) -> int:
    """Run all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to make the runs' folder; default: where the system has it")
    parser.add_argument("--write", type=Path, help="write the page about it here")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    started = time.monotonic()
    with a_folder(arguments.folder) as (folder, can_fill):
        if not can_fill:
            console.print("the disk is not filled: mounting a small file system needs root")
        chaos = Chaos(folder, arguments.seed, can_fill, lambda line: print(line, file=sys.stderr, flush=True))
        for number, series in enumerate(SERIES):
            chaos.series(series, (arguments.kills + 1 - number) // len(SERIES))
    table = Table("series", "killed", "on", "step", "all gone after", "start to next step")
    for one in chaos.kills:
        table.add_row(
            one.series, one.how, str(one.topology), str(one.step), f"{one.ended_s:.1f} s", f"{one.resumed_s:.1f} s"
        )
    console.print(table)
    console.print(f"{len(chaos.kills)} kills, seed {arguments.seed}: every run is the one left alone; {chaos.numbers}")
    if arguments.write is not None:
        arguments.write.write_text(page(chaos, arguments.seed, time.monotonic() - started), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
