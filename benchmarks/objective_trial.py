"""One cell of `benchmarks.objectives`: steps of an objective at one size, timed in turns, or the memory of one step."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.driver_memory import memory_bytes
from benchmarks.published_objectives import pmrl_losses, published_decomposition, volume_loss
from pretrain.objectives import Embeddings, build_objective
from pretrain.objectives.pmrl import leading_direction

DIM, NAMES = 512, ("text", "video", "audio", "subtitle")
TEMPERATURE, SMOOTHING, VALUE_TEMPERATURE, CONTRAST_TEMPERATURE = 0.07, 0.1, 0.05, 0.1
Step = Callable[[], tuple[float, float]]  # -> loss, norm of the gradient of the vectors


def main() -> None:
    """Run the cell of the JSON in the first argument; print what was found as JSON."""
    cell = json.loads(sys.argv[1])
    torch.set_num_threads(cell["threads"])
    print(json.dumps(memory(cell) if cell["what"] == "memory" else times(cell)))


def draw_vectors(count: int, modalities: int, device: str) -> dict[str, Tensor]:
    """Unit rows [count, DIM] a modality, in the manner of a trained model: matched ones are alike."""
    generator = torch.Generator().manual_seed(count)
    common = torch.randn(count, DIM, generator=generator)
    vectors = {}
    for name in NAMES[:modalities]:
        rows = torch.randn(count, DIM, generator=generator).mul_(1.5).add_(common)
        rows = rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        vectors[name] = rows.to(device).requires_grad_()
    return vectors


def build_steps(objective: str, vectors: dict[str, Tensor]) -> dict[str, Step]:
    """By method: "ours", "published", and for volumes "floor", the matrix products alone."""

    def finished(loss: Tensor, value: Tensor) -> tuple[float, float]:
        for rows in vectors.values():
            rows.grad = None
        loss.backward()
        squares = [rows.grad.double().square().sum().item() for rows in vectors.values() if rows.grad is not None]
        return value.item(), math.sqrt(sum(squares))

    if objective == "decomposition":

        def leading(decompose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Step:
            def step() -> tuple[float, float]:
                values, first = decompose(torch.stack(list(vectors.values()), dim=1))
                return finished(values[:, 0].sum() + first.square().sum(), values.sum())

            return step

        return {"ours": leading(our_decomposition), "published": leading(published_decomposition)}
    if objective == "pmrl":
        pmrl = build_objective("pmrl", value_temperature=VALUE_TEMPERATURE, temperature=CONTRAST_TEMPERATURE)

        def ours() -> tuple[float, float]:
            output = pmrl(Embeddings(vectors=vectors))
            return finished(output.loss, output.metrics["pmrl/values"])  # the contrast of the published one has no sign

        def published() -> tuple[float, float]:
            values, contrast = pmrl_losses(list(vectors.values()), VALUE_TEMPERATURE, CONTRAST_TEMPERATURE)
            return finished(values + contrast, values)

        return {"ours": ours, "published": published}
    gram = build_objective("gram", temperature=TEMPERATURE, label_smoothing=SMOOTHING)
    gram = gram.to(next(iter(vectors.values())).device)

    def volume_ours() -> tuple[float, float]:
        loss = gram(Embeddings(vectors=vectors)).loss
        return finished(loss, loss)

    def volume_published() -> tuple[float, float]:
        temperature = next(iter(vectors.values())).new_tensor(TEMPERATURE).requires_grad_()
        loss = volume_loss(list(vectors.values()), temperature, SMOOTHING)
        return finished(loss, loss)

    return {"ours": volume_ours, "published": volume_published, "floor": matrix_products(vectors)}


def our_decomposition(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and leading vectors of [B, k, D]."""
    return leading_direction(matrices, torch.ones_like(matrices[:, :, 0], dtype=torch.bool))


def matrix_products(vectors: dict[str, Tensor]) -> Step:
    """The products no evaluation of a gradient can do without: one forward and two backward an axis."""
    anchor, *others = (rows.detach() for rows in vectors.values())
    products = anchor.new_empty(len(anchor), len(anchor))
    gradients = torch.empty_like(anchor), torch.empty_like(anchor)

    def step() -> tuple[float, float]:
        for other in others:
            torch.mm(anchor, other.T, out=products)
            torch.mm(products, other, out=gradients[0])
            torch.mm(products.T, anchor, out=gradients[1])
        return 0.0, 0.0

    return step


def times(cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each method in each round, and the loss and gradient norm of a step before them."""
    steps = build_steps(cell["objective"], draw_vectors(cell["size"], cell["modalities"], cell["device"]))
    steps = {name: step for name, step in steps.items() if name in cell["methods"]}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    found = {name: step() for name, step in steps.items()}  # memory mapped, libraries loaded
    for _ in range(cell["rounds"]):
        for name, step in steps.items():
            seconds[name].append(timed(step, cell["device"]))
    return {"seconds": seconds, "found": found}


def timed(step: Step, device: str) -> float:
    """Processor seconds of a step on a CPU, whatever else runs there; on a GPU the wall clock's, to its end."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(cell: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of the first step at this size above the process with its vectors; gradients count."""
    device = cell["device"]
    small, large = (draw_vectors(count, cell["modalities"], device) for count in (128, cell["size"]))
    build_steps(cell["objective"], small)[cell["method"]]()  # libraries loaded
    step = build_steps(cell["objective"], large)[cell["method"]]
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return {"bytes": torch.cuda.max_memory_allocated() - before}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = memory_bytes("VmRSS")
    step()
    return {"bytes": memory_bytes("VmHWM") - before}


if __name__ == "__main__":
    main()
