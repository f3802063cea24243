"""The ten best of all candidates by each score: tiles with the best kept, and the whole matrix.

    python -m benchmarks.scoring --write benchmarks/scoring.md

The whole matrix is what one writes first: Gram matrices of all pairs and their determinants or decompositions (one
matrix product for cosines), then `topk`; both in float64, k = 3 (one vector against two). Each cell is a fresh process,
whose peak of resident memory the kernel keeps (Linux), above what it held before. Both must find the same candidates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.driver_memory import memory_bytes
from benchmarks.machine import describe_machine
from pretrain.scoring import search

DIM, TOP_K, SCORES = 512, 10, ("volume", "singular_value", "centroid")
MIB = 1 << 20


def main() -> None:
    """Both ways in turn, each in a new process; medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 4096], metavar="CANDIDATES")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(run_cell(**json.loads(options.cell))))
        return
    lines = [
        "| score | candidates | whole matrix | tiles | ratio | whole matrix, peak | tiles, peak | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for score in SCORES:
        for size in options.sizes:
            lines.append(compare(score, options.queries, size, options.rounds))
            print(lines[-1], flush=True)
    if options.write:
        head = f"# Scores\n\n{describe_machine()}; one thread; {options.queries} queries, D = {DIM}, top {TOP_K}.\n\n"
        note = f"Processor time of a search, median of {options.rounds} rounds; ratio: whole matrix over tiles.\n\n"
        options.write.write_text(head + note + "\n".join(lines) + "\n", encoding="utf-8")


def compare(score: str, num_queries: int, num_candidates: int, rounds: int) -> str:
    """A row of the table."""
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "tiles": []}
    for _ in range(rounds):
        for method, cells in found.items():
            cell = {"score": score, "num_queries": num_queries, "num_candidates": num_candidates, "method": method}
            command = [sys.executable, "-m", "benchmarks.scoring", "--cell", json.dumps(cell)]
            cells.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    if len({cell["found"] for cells in found.values() for cell in cells}) != 1:
        raise RuntimeError(f"{score}: the two ways found different candidates")
    seconds = {m: statistics.median(cell["seconds"] for cell in cells) for m, cells in found.items()}
    peak = {m: statistics.median(cell["peak_bytes"] for cell in cells) for m, cells in found.items()}
    times = f"{seconds['plain']:.2f} s | {seconds['tiles']:.2f} s | {seconds['plain'] / seconds['tiles']:.1f}"
    peaks = f"{peak['plain'] / MIB:,.0f} MiB | {peak['tiles'] / MIB:,.0f} MiB | {peak['plain'] / peak['tiles']:.1f}"
    return f"| {score} | {num_candidates:,} | {times} | {peaks} |"


def run_cell(score: str, num_queries: int, num_candidates: int, method: str) -> dict[str, Any]:
    """One search: processor seconds, bytes above what the process held before, and a digest of what was found."""
    torch.set_num_threads(1)
    shared = torch.randn(max(num_queries, num_candidates), DIM, generator=torch.Generator().manual_seed(0))
    query, *others = (_rows(shared, count, seed) for seed, count in enumerate([num_queries] + 2 * [num_candidates]))
    candidates = {f"m{n}": rows for n, rows in enumerate(others)}
    whole = _plain if method == "plain" else _tiled
    whole(score, query[:8], {name: rows[:16] for name, rows in candidates.items()})  # loads what is loaded lazily
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before, start = memory_bytes("VmRSS"), time.process_time()
    indices = whole(score, query, candidates)
    seconds = time.process_time() - start
    weights = torch.arange(indices.numel()).view_as(indices) % 9973 + 1
    return {"seconds": seconds, "peak_bytes": memory_bytes("VmHWM") - before, "found": int((indices * weights).sum())}


def _rows(shared: Tensor, num: int, seed: int) -> Tensor:
    noise = torch.randn(num, DIM, generator=torch.Generator().manual_seed(seed + 1))
    return F.normalize(shared[:num] + 2 * noise, dim=1)


def _tiled(score: str, query: Tensor, candidates: dict[str, Tensor]) -> Tensor:
    return search({"q": query}, candidates, score, top_k=TOP_K).indices


def _plain(score: str, query: Tensor, candidates: dict[str, Tensor]) -> Tensor:
    one, *rows = (F.normalize(side.double(), dim=1) for side in (query, *candidates.values()))
    others = torch.stack(rows, dim=1)
    if score == "centroid":
        return (one @ F.normalize(others.sum(dim=1), dim=1).T).topk(TOP_K).indices
    gram = torch.ones(len(one), len(others), 3, 3, dtype=torch.float64)
    gram[:, :, 0, 1:] = gram[:, :, 1:, 0] = torch.einsum("qd,cmd->qcm", one, others)
    gram[:, :, 1:, 1:] = others @ others.mT
    values = -torch.linalg.det(gram).abs().sqrt() if score == "volume" else torch.linalg.eigvalsh(gram)[:, :, -1]
    return values.topk(TOP_K).indices


if __name__ == "__main__":
    main()
