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
from tests.objectives.cases import keep, random_case
from tests.objectives.references import REFERENCES, Case
from tests.ranks import run_ranks

COUNT = 12
DTYPES = ("float32", "float64")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gram": [{"orientation": 0.5}],
    "infonce": [{"within": 0.25, "reduce": "mean", "label_smoothing": 0.1}],
    "sigmoid": [{}, {"reduce": "mean"}],
    "symile": [{}, {"candidates": "all", "reduce": "sum"}],
    "pmrl": [{"orientation": 0.5}, {"sign": "free"}],
    "centrobind": [{}, {"normalize": True, "reduce": "mean"}],
    "unialign": [{"divergence": True}, {"uniformity": "entropy"}],
    "feature_separation": [{}, {"reduce": "mean"}],
    "geometric_consistency": [{}, {"normalizer": "pairs", "reduce": "mean"}],
}
CASES = [(name, options) for name in REFERENCES for options in OPTIONS.get(name, [{}])]
Found = dict[str, tuple[dict[str, float], list[float], list[float]]]


def ragged_case(dtype: torch.dtype) -> Case:
    """Audio is missing from the whole second half, so from whole ranks; the last quarter lacks everything but one
    sample; two ids are equal across ranks."""
    case = random_case(COUNT, 8, 3, masked=True, seed=11, dtype=dtype)
    case.present["audio"][COUNT // 2 :] = False
    for mask in case.present.values():
        mask[-COUNT // 4 + 1 :] = False
    case.ids[7] = case.ids[1]
    return case


def losses(world: World, argument: Any) -> Found:
    """By objective and dtype: loss and metrics, gradients of this rank's rows, of the scalars; summed over ranks."""
    found: Found = {}
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
        scalars = []
        for parameter in objective.parameters():
            assert parameter.grad is not None
            scalars.append(world.sum(parameter.grad).item())
        metrics = {metric: tensor.item() for metric, tensor in value.metrics.items()}
        found[f"{number} {name} {dtype}"] = metrics, rows.flatten().tolist(), scalars
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_unequal_masks_equal_one_process(tmp_path: Path, size: int) -> None:
    alone = losses(World(), None)
    together = run_ranks("tests.objectives.test_ranks:losses", size, tmp_path)
    for case, (metrics, rows, scalars) in alone.items():
        tolerance = 1e-6 if case.endswith("float32") else 1e-12
        groups = len(rows) // (COUNT * 8)
        expected = torch.tensor(rows, dtype=torch.float64).view(groups, COUNT, 8)
        parts = [torch.tensor(rank[case][1], dtype=torch.float64).view(groups, -1, 8) for rank in together]
        difference = (torch.cat(parts, dim=1) - expected).norm() / expected.norm()
        assert difference.item() <= tolerance, case
        for rank in together:
            assert rank[case][0] == pytest.approx(metrics, rel=tolerance, abs=tolerance / 10), case
            for one, other in zip(rank[case][2], scalars, strict=True):
                # What is left of a sum over all pairs that cancels: of the size of its terms, about 1.
                assert abs(one - other) <= tolerance * max(abs(other), 1.0), case
