"""Kills real runs at random moments, starts them again, and compares what comes out with a run that was left alone.

    python -m tests.chaos [--kills 30] [--seed 0] [--folder DIR] [--write docs/chaos.md]

On one topology a run must be bitwise the one left alone; on topologies that change at every start it must draw the same
samples and follow the same curve. Exit code 1 if anything is not so; then the runs stay for a look. The seed chooses
what is killed and on which topology; the moments are the machine's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tests.chaos.page import page, table
from tests.chaos.series import Chaos
from tests.chaos.start import Fault
from tests.test_resume import mounted

DISK_SIZE = "96m"


@contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A folder for the runs, and whether it may be filled: a small file system of its own, where that is allowed."""
    disk = folder / "disk"
    if not mounted(disk, DISK_SIZE):
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
    started, fault = time.monotonic(), None
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=arguments.folder))
    with small_disk(folder) as (disk, can_fill):
        if not can_fill:
            console.print("the disk is not filled: mounting a small file system needs root")
        chaos = Chaos(disk, folder, arguments.seed, can_fill, lambda line: print(line, file=sys.stderr, flush=True))
        try:
            chaos.run(arguments.kills)
        except Fault as found:
            fault = found
            shutil.copytree(disk, folder / "runs")
    console.print(table(chaos.kills))
    if fault is not None:
        console.print(f"FAILED after {len(chaos.kills)} kills, seed {arguments.seed}: {fault}", markup=False)
        console.print(f"the runs and what they said: {folder}", markup=False)
        return 1
    shutil.rmtree(folder)
    if arguments.write is not None:
        arguments.write.write_text(page(chaos, arguments.seed, time.monotonic() - started), encoding="utf-8")
    apart = "".join(f"; {what} {value:.1e} apart" for what, value in chaos.apart.items())
    console.print(f"{len(chaos.kills)} kills, seed {arguments.seed}: every run is the one left alone{apart}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
