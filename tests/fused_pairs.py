"""Objectives by the fused kernel under Triton's interpreter and by the PyTorch tiles; run as ranks (`tests.ranks`)."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pretrain.collectives import World
from pretrain.objectives import Embeddings, build_objective
from pretrain.pairwise import evaluate_terms

MODALITIES = ("text", "video", "audio", "depth")
Case = dict[str, Any]
CASES: dict[str, Case] = {
    "volumes of 3": {"name": "gram", "modalities": 3},
    "volumes of 2": {"name": "gram", "modalities": 2, "label_smoothing": 0.0},
    "volumes of 4, sharp": {"name": "gram", "modalities": 4, "temperature": 0.02},
    "cosines": {"name": "infonce", "modalities": 2},
    "cosines, smoothed": {"name": "infonce", "modalities": 3, "label_smoothing": 0.2},
    "one direction": {"name": "pmrl", "modalities": 3},
    "volumes, bfloat16": {"name": "gram", "modalities": 3, "negatives_precision": "bfloat16"},
    "cosines, bfloat16": {"name": "infonce", "modalities": 2, "negatives_precision": "bfloat16"},
}
COUNT, DIM = 44, 24


def embeddings(case: Case, world: World, dtype: torch.dtype) -> tuple[dict[str, Tensor], Embeddings]:
    """This rank's part of a batch: modalities missing at random, NaN behind their masks, items that repeat."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(COUNT, DIM, generator=generator, dtype=torch.float64)
    part = slice(world.rank * COUNT // world.size, (world.rank + 1) * COUNT // world.size)
    vectors, present = {}, {}
    for name in MODALITIES[: case["modalities"]]:
        rows = torch.randn(COUNT, DIM, generator=generator, dtype=torch.float64) + common
        there = torch.rand(COUNT, generator=generator) > 0.15
        rows = torch.nn.functional.normalize(rows, dim=1).masked_fill(~there[:, None], torch.nan)
        vectors[name], present[name] = rows.to(dtype)[part].clone().requires_grad_(), there[part]
    ids = torch.randint(0, 2 * COUNT, (COUNT,), generator=generator)[part]
    return vectors, Embeddings(vectors=vectors, present=present, ids=ids)


def evaluate(case: Case, world: World, dtype: torch.dtype) -> dict[str, list[float]]:
    """The loss; gradients of this rank's vectors and, summed over ranks, of the learned scalars."""
    options = {key: value for key, value in case.items() if key not in ("name", "modalities")}
    objective = build_objective(case["name"], **options).to(dtype)
    vectors, batch = embeddings(case, world, dtype)
    value = evaluate_terms(objective.terms(batch, objective.scalars()), world)
    learned = list(objective.parameters())
    grads = torch.autograd.grad(value.local_loss, [*vectors.values(), *learned], materialize_grads=True)
    of_scalars = [world.sum(grad) for grad in grads[len(vectors) :]]
    return {
        "loss": [value.metrics["loss"].item()],
        "vectors": torch.cat([grad.flatten() for grad in grads[: len(vectors)]]).tolist(),
        "scalars": [grad.item() for grad in of_scalars],
    }


def both_ways(world: World, argument: Any) -> dict[str, Any]:
    """{case: {"fused": ..., "tiles": ..., "double": ..., "num_fused": how many tiles the kernel took}}"""
    os.environ["TRITON_INTERPRET"] = "1"
    from pretrain.kernels import fused_tiles

    small = fused_tiles.Blocks(BLOCK_R=16, BLOCK_C=16, BLOCK_D=16, GROUP=2)
    tiles = 0

    class CountedTiles(fused_tiles.FusedTiles):
        def _launch(self, *arguments: Any) -> None:
            nonlocal tiles
            tiles += 1
            super()._launch(*arguments)

    found: dict[str, Any] = {}
    original = fused_tiles.FusedTiles
    for label, case in CASES.items():
        tiles = 0
        fused_tiles.FusedTiles = partial(CountedTiles, tile=25, score_blocks=small, product_blocks=small)  # type: ignore
        os.environ["TRITON_INTERPRET"] = "1"
        fused = evaluate(case, world, torch.float32)
        os.environ["TRITON_INTERPRET"] = "0"
        fused_tiles.FusedTiles = original  # type: ignore[misc]
        by_tiles, double = evaluate(case, world, torch.float32), evaluate(case, world, torch.float64)
        found[label] = {"fused": fused, "tiles": by_tiles, "double": double, "num_fused": tiles}
    return found
