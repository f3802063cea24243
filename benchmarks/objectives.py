"""Volumes and PMRL against their evaluation in the manner of the published code, and against the matrix products alone.

    python -m benchmarks.objectives                              # about half an hour on one core
    python -m benchmarks.objectives --sizes 256 1024 --modalities 3
    python -m benchmarks.objectives --device cuda --sizes 4096 16384

A step is the loss and its gradient with respect to given unit vectors (D = 512, float32). Each cell is a fresh process
in which the methods take turns; a ratio is that of two neighbours, and its median and range over the rounds are shown.
Memory is that of the first step of a further process each. A method that would need more than --cap-gib is not run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

MIB, GIB = 1 << 20, 1 << 30
READING = "## Reading them"
# What the published manner takes, rounded up from the smaller sizes: volumes a pair by k, a decomposition a sample.
PAIR_BYTES, SAMPLE_BYTES = {3: 480, 4: 640}, 2_600_000


def main() -> None:
    """Measure all cells; print the tables, and with --write put them into a page."""
    options = parse_options()
    results: list[dict[str, Any]] = []
    for size in options.sizes:
        for objective in options.objectives:
            for modalities in options.modalities:
                results.append(measure(objective, modalities, size, options))
                print(json.dumps(results[-1]), flush=True)
                if options.write:
                    write_page(options.write, report(results, options))
    print(report(results, options))


def write_page(page: Path, tables: str) -> None:
    """Put the tables in place of those that the page has; what was written by hand below them stays."""
    _, mark, reading = page.read_text().partition(READING) if page.exists() else ("", "", "")
    page.write_text(tables + (f"\n{mark}{reading}" if mark else ""))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    objectives = ["gram", "pmrl", "decomposition"]
    parser.add_argument("--objectives", nargs="+", default=objectives, choices=objectives)
    parser.add_argument("--modalities", nargs="+", type=int, default=[3, 4], choices=[3, 4], metavar="K")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096], metavar="B")
    parser.add_argument("--rounds", type=int, default=7, help="fewer where a round is long")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cap-gib", type=float, default=12.0, help="most memory that the published manner may take")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables as Markdown")
    return parser.parse_args()


def measure(objective: str, modalities: int, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times of all methods in one process, memory of each in its own."""
    needed = PAIR_BYTES[modalities] * size * size if objective == "gram" else SAMPLE_BYTES * size
    fits = needed <= options.cap_gib * GIB
    methods = ["ours", *(["published"] if fits else []), *(["floor"] if objective == "gram" else [])]
    long = size >= 4096 or (objective != "gram" and size >= 2048)
    cell = {
        "objective": objective, "modalities": modalities, "size": size, "device": options.device,
        "threads": options.threads, "methods": methods, "rounds": min(options.rounds, 3) if long else options.rounds,
    }  # fmt: skip
    found = run_trial(cell | {"what": "times"}, options)
    if fits:
        check(cell, found["found"])
    memory = {
        name: run_trial(cell | {"what": "memory", "method": name}, options)["bytes"]
        for name in methods
        if name != "floor"
    }
    return cell | {"seconds": found["seconds"], "memory": memory}


def run_trial(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process finds for a cell."""
    command = [sys.executable, "-m", "benchmarks.objective_trial", json.dumps(cell)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(cell: dict[str, Any], found: dict[str, list[float]]) -> None:
    """Both must have computed the same: the loss, and of volumes the norm of the gradient too."""
    parts = (0, 1) if cell["objective"] == "gram" else (0,)
    for part in parts:
        one, other = found["ours"][part], found["published"][part]
        if abs(one - other) > 1e-3 * abs(other):
            raise RuntimeError(f"{cell}: ours {one}, published {other}")


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown: a table an objective."""
    lines = ["# Objectives against the published manner", "", f"{describe_machine()}.", ""]
    on_cpu = options.device == "cpu"
    clock = "processor seconds" if on_cpu else "wall clock to the end of the step"
    kind = "resident" if on_cpu else "allocated"
    lines += [
        f"`python -m benchmarks.objectives`, device {options.device}, {options.threads} thread(s): loss and gradient",
        f"of given unit vectors, D = 512, float32. Times: {clock}, methods in turns in one process; ratios:",
        f"median (range) over rounds. Memory: growth of the peak of {kind} memory in the first step of a fresh",
        "process, gradients included. Published: in the manner of the published code",
        f"(`benchmarks/published_objectives.py`), not run where it needs more than {options.cap_gib:g} GiB.",
        "Floor: the k - 1 matrix products of forward and the two of backward that each",
        "needs. decomposition: singular values and leading vectors without the contrast of pmrl.",
    ]
    for objective in options.objectives:
        here = [cell for cell in results if cell["objective"] == objective]
        lines += ["", f"## {objective}", ""]
        columns = ["k", "B", "ours s", "published / ours", "ours / floor", "ours MiB", "published MiB", "memory ratio"]
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += [table_row(cell) for cell in sorted(here, key=lambda cell: (cell["modalities"], cell["size"]))]
    return "\n".join(lines) + "\n"


def table_row(cell: dict[str, Any]) -> str:
    """A line of the table."""
    seconds, memory = cell["seconds"], cell["memory"]
    row = [str(cell["modalities"]), str(cell["size"]), f"{statistics.median(seconds['ours']):.3f}"]
    row.append(ratio(seconds["published"], seconds["ours"]) if "published" in seconds else "not run")
    row.append(ratio(seconds["ours"], seconds["floor"]) if "floor" in seconds else "")
    row.append(f"{memory['ours'] / MIB:.0f}")
    if "published" in memory:
        row += [f"{memory['published'] / MIB:.0f}", f"1/{memory['published'] / memory['ours']:.1f}"]
    else:
        row += ["not run", ""]
    return "| " + " | ".join(row) + " |"


def ratio(one: list[float], other: list[float]) -> str:
    """Median and range over the rounds."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
