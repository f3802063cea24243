"""The global batch over ranks that lack different modalities: loss and gradients of one process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.collectives import World
from pretrain.objectives import build_objective
from pretrain.pairwise import evaluate_terms
from tests.objectives.cases import random_case
from tests.objectives.references import REFERENCES, Case
from tests.objectives.test_masks import keep
from tests.ranks import run_ranks

COUNT = 12
DTYPES = ("float32", "float64")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gram": [{"orientation": 0.5}],
    "infonce": [{"within": 0.25, "reduce": "mean", "label_smoothing": 0.1}],
    "symile": [{}, {"candidates": "all"}],
    "pmrl": [{"orientation": 0.5}, {"sign": "free"}],
    "unialign": [{"divergence": True}, {"uniformity": "entropy"}],
}
CASES = [(name, options) for name in REFERENCES for options in OPTIONS.get(name, [{}])]


def ragged_case(dtype: torch.dtype) -> Case:
    """Audio is missing from the whole second half, so from whole ranks; the last quarter lacks everything but one
    sample; two ids are equal across ranks."""
    case = random_case(COUNT, 8, 3, masked=True, seed=11, dtype=dtype)
    case.present["audio"][COUNT // 2 :] = False
    for mask in case.present.values():
        mask[-COUNT // 4 + 1 :] = False
    case.ids[7] = case.ids[1]
    return case


def losses(world: World, argument: Any) -> dict[str, list[list[float]]]:
    """By objective and dtype: [loss], gradients of this rank's rows, of the scalars; summed over ranks."""
    found = {}
    for (number, (name, options)), dtype in itertools.product(enumerate(CASES), DTYPES):
        whole = ragged_case(getattr(torch, dtype))
        size = COUNT // world.size
        own = keep(whole, list(range(world.rank * size, (world.rank + 1) * size)))
        for tensor in own.leaves():
            tensor.retain_grad()
        objective = build_objective(name, tile=5, **options).to(getattr(torch, dtype))
        value = evaluate_terms(objective.terms(own.embeddings(), objective.scalars()), world)
        value.local_loss.backward()
        rows = torch.stack([torch.zeros_like(t) if t.grad is None else t.grad for t in own.leaves()])
        scalars = [world.sum(p.grad).item() for p in objective.parameters() if p.grad is not None]
        loss = value.metrics["loss"].item()
        found[f"{number} {name} {dtype}"] = [[loss], rows.flatten().tolist(), scalars]
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_unequal_masks_equal_one_process(tmp_path: Path, size: int) -> None:
    alone = losses(World(), None)
    together = run_ranks("tests.objectives.test_ranks:losses", size, tmp_path)
    for case, (loss, rows, scalars) in alone.items():
        tolerance = 1e-6 if case.endswith("float32") else 1e-12
        groups = len(rows) // (COUNT * 8)
        expected = torch.tensor(rows, dtype=torch.float64).view(groups, COUNT, 8)
        parts = [torch.tensor(rank[case][1], dtype=torch.float64).view(groups, -1, 8) for rank in together]
        difference = (torch.cat(parts, dim=1) - expected).norm() / expected.norm()
        assert difference.item() <= tolerance, case
        for rank in together:
            assert rank[case][0] == pytest.approx(loss, rel=tolerance), case
            assert rank[case][2] == pytest.approx(scalars, rel=tolerance, abs=tolerance), case
