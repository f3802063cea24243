"""What `negatives_precision: bfloat16` does to a gradient, and on a GPU to the time of a step.

    python -m benchmarks.negatives_precision
    python -m benchmarks.negatives_precision --device cuda --sizes 4096 16384

Differences are norms over all vectors, relative to the gradient in float64 from the same float32 unit vectors
(D = 512, cosines of matched pairs about 0.3). Times: medians of the two in turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.objective_trial import draw_vectors
from pretrain.objectives import Embeddings, build_objective

ROUNDS = 5
OBJECTIVES = {"gram": 3, "infonce": 2}  # and how many modalities


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 4096], metavar="B")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    print(f"{describe_machine()}; device {options.device}.\n")
    print("| objective | B | float32 | bfloat16 negatives | float32 s / bfloat16 s |\n|---|---|---|---|---|")
    for name in OBJECTIVES:
        for size in options.sizes:
            print(row(name, size, options.device), flush=True)


def row(name: str, size: int, device: str) -> str:
    """A line of the table."""
    vectors = draw_vectors(size, OBJECTIVES[name], device)
    exact, _ = step(name, {key: rows.detach().double().requires_grad_() for key, rows in vectors.items()}, "float32")
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    differences = {}
    for _ in range(ROUNDS):
        for precision, times in seconds.items():
            gradient, taken_s = step(name, vectors, precision)
            differences[precision] = ((gradient.double() - exact).norm() / exact.norm()).item()
            times.append(taken_s)
    ratio = statistics.median(a / b for a, b in zip(seconds["float32"], seconds["bfloat16"], strict=True))
    return f"| {name} | {size} | {differences['float32']:.1e} | {differences['bfloat16']:.1e} | {ratio:.2f} |"


def step(name: str, vectors: dict[str, Tensor], precision: str) -> tuple[Tensor, float]:
    """Gradient of all vectors, and the seconds of the step."""
    device = next(iter(vectors.values())).device
    objective = build_objective(name, negatives_precision=precision).to(device, next(iter(vectors.values())).dtype)
    synchronize(device)
    started = time.perf_counter()
    gradient = torch.cat(torch.autograd.grad(objective(Embeddings(vectors=vectors)).loss, list(vectors.values())))
    synchronize(device)
    return gradient, time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
