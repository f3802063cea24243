"""Peak memory and time of one objective step against the global batch: the tiled driver, and plain [B, B] matrices.

    python benchmarks/driver_memory.py                                  # all sizes; hours on two cores
    python benchmarks/driver_memory.py --sizes 2048 4096 --dtypes float32

A step is the loss and its gradient with respect to given embeddings (k = 3, D = 512). Each runs in a fresh process,
whose peak of resident memory the kernel keeps (Linux). The plain evaluation is what one writes first: one matrix of
logits, cross entropy of it and of its transpose, autograd. Both must give the same loss and gradient norm.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

DIM, MODALITIES = 512, ("text", "video", "audio")
TEMPERATURE, SMOOTHING = 0.07, {"gram": 0.1, "infonce": 0.0}
MIB, GIB = 1 << 20, 1 << 30


def main() -> None:
    """Measure every cell in its own process; print, and with --write keep, the table after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[2048, 4096, 8192, 16384, 32768], metavar="B")
    parser.add_argument("--objectives", nargs="+", default=["gram", "infonce"], choices=["gram", "infonce"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"], choices=["float32", "float64"])
    parser.add_argument("--plain-up-to", type=int, default=8192, metavar="B", help="largest [B, B] to evaluate plainly")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(run_cell(json.loads(options.cell))))
        return
    results: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for objective in options.objectives:
            for size in options.sizes:
                for method in ("driver", "plain") if size <= options.plain_up_to else ("driver",):
                    cell = {"objective": objective, "dtype": dtype, "size": size, "method": method}
                    results.append(cell | measure(cell, options.threads))
                    print(json.dumps(results[-1]), flush=True)
                    if options.write:
                        options.write.write_text(report(results, options.threads))
    print(report(results, options.threads))


def measure(cell: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run a cell in a fresh process."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """One step: peak_bytes of the process, growth_bytes above the process with its embeddings, cpu_s, loss, norm."""
    import torch

    step = driver_step if cell["method"] == "driver" else plain_step
    step(cell["objective"], embeddings(256, cell["dtype"]))  # libraries loaded, thread pools there
    vectors = embeddings(cell["size"], cell["dtype"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = memory_bytes("VmRSS")
    start = time.process_time()
    loss = step(cell["objective"], vectors)
    cpu_s = time.process_time() - start
    peak = memory_bytes("VmHWM")
    norm = math.sqrt(sum(v.grad.double().square().sum().item() for v in vectors.values() if v.grad is not None))
    assert torch.isfinite(torch.tensor([loss, norm])).all()
    return {"peak_bytes": peak, "growth_bytes": peak - before, "cpu_s": cpu_s, "loss": loss, "norm": norm}


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def embeddings(count: int, dtype: str) -> dict[str, Any]:
    """Unit rows [count, DIM] a modality, made in place so that making them does not count."""
    import torch

    generator = torch.Generator().manual_seed(count)
    vectors = {}
    for name in MODALITIES:
        rows = torch.randn(count, DIM, generator=generator, dtype=getattr(torch, dtype))
        vectors[name] = rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True)).requires_grad_()
    return vectors


def driver_step(objective: str, vectors: dict[str, Any]) -> float:
    """Loss and gradients as training computes them."""
    from pretrain.objectives import Embeddings, build_objective

    module = build_objective(
        objective, learn_temperature=False, temperature=TEMPERATURE, label_smoothing=SMOOTHING[objective]
    )
    loss = module(Embeddings(vectors=vectors)).loss
    loss.backward()
    return float(loss.item())


def plain_step(objective: str, vectors: dict[str, Any]) -> float:
    """Loss and gradients by whole matrices."""
    import torch
    from torch import Tensor
    from torch.nn.functional import cross_entropy

    def both_directions(logits: Tensor) -> Tensor:
        target = torch.arange(len(logits))
        smoothing = SMOOTHING[objective]
        by_row = cross_entropy(logits, target, label_smoothing=smoothing)
        return (by_row + cross_entropy(logits.T, target, label_smoothing=smoothing)) / 2

    if objective == "infonce":
        loss = torch.stack(
            [both_directions(vectors[a] @ vectors[b].T / TEMPERATURE) for a, b in combinations(vectors, 2)]
        ).sum()
    else:
        anchor, *others = vectors.values()
        basis, triangular = torch.linalg.qr(torch.stack(others, dim=2))
        volume = triangular.diagonal(dim1=1, dim2=2).prod(dim=1).abs()
        squared = anchor.square().sum(dim=1, keepdim=True)
        for index in range(len(others)):
            squared = squared - (anchor @ basis[:, :, index].T).square()
        loss = both_directions(-squared.clamp_min(1e-12).sqrt() * volume / TEMPERATURE)
    loss.backward()
    return float(loss.item())


def report(results: list[dict[str, Any]], threads: int) -> str:
    """Markdown: one table an objective and dtype, and how the growth scales."""
    lines = [
        f"# Memory of the pairwise driver, {datetime.date.today()}",
        "",
        "`python -m benchmarks.driver_memory`: one step (loss and gradients) of given embeddings,",
        f"k = {len(MODALITIES)}, D = {DIM}, {threads} thread(s) of {os.cpu_count()} CPUs ({platform.machine()}).",
        "Growth: peak resident memory above the process with its embeddings. Peak: the whole process.",
        "CPU seconds, not wall clock. Plain: one [B, B] matrix of logits, two cross entropies, autograd; not run above",
        "the size where it stops.",
    ]
    tables = dict.fromkeys((cell["objective"], cell["dtype"]) for cell in results)
    for objective, dtype in tables:
        lines += ["", f"## {objective}, {dtype}", ""]
        lines += [
            "| B | driver: growth MiB | peak GiB | CPU s | plain: growth MiB | CPU s | growth ratio | CPU ratio |"
        ]
        lines += ["|---" * 8 + "|"]
        here = [cell for cell in results if (cell["objective"], cell["dtype"]) == (objective, dtype)]
        ours = {cell["size"]: cell for cell in here if cell["method"] == "driver"}
        plain = {cell["size"]: cell for cell in here if cell["method"] == "plain"}
        lines += [table_row(size, ours[size], plain.get(size)) for size in ours]
        lines += [
            f"\n{growth_sentence(name, cells)}"
            for name, cells in (("driver", ours), ("plain", plain))
            if len(cells) > 1
        ]
    return "\n".join(lines) + "\n"


def table_row(size: int, ours: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """A line of the table; the two methods must agree."""
    cells = [str(size), f"{ours['growth_bytes'] / MIB:.0f}", f"{ours['peak_bytes'] / GIB:.2f}", f"{ours['cpu_s']:.1f}"]
    if plain is None:
        return "| " + " | ".join([*cells, "", "", "", ""]) + " |"
    for name in ("loss", "norm"):
        assert math.isclose(ours[name], plain[name], rel_tol=1e-4), (size, name, ours[name], plain[name])
    cells += [f"{plain['growth_bytes'] / MIB:.0f}", f"{plain['cpu_s']:.1f}"]
    cells += [f"{ours['growth_bytes'] / plain['growth_bytes']:.3f}", f"{ours['cpu_s'] / plain['cpu_s']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def growth_sentence(name: str, cells: dict[int, dict[str, Any]]) -> str:
    """How growth scales with B: over all sizes, where constants (tiles, threads) still count, and at the end."""
    sizes = [math.log(size) for size in cells]
    growths = [math.log(cell["growth_bytes"]) for cell in cells.values()]
    whole, end = slope(sizes, growths), slope(sizes[-2:], growths[-2:])
    return f"Growth of the {name} ~ B^{whole:.2f} over all sizes (least squares of logarithms), B^{end:.2f} at the end."


def slope(xs: list[float], ys: list[float]) -> float:
    """Least-squares slope of ys over xs."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


if __name__ == "__main__":
    main()
