"""Samples to try objectives on: random, masked, with duplicates, degenerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.objectives import Objective
from tests.objectives.references import Case

NAMES = ("text", "video", "audio", "depth", "thermal")
MOST = {"triangle": 3}  # modalities
# What else an objective can be asked for; one that is not here has nothing of the kind.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gram": [{"orientation": 1.0}, {"temperature_form": "divided"}],
    "pmrl": [{"orientation": 1.0}, {"sign": "free"}],
    "symile": [{"candidates": "all"}, {}],
    "centrobind": [{"normalize": True}, {}],
    "unialign": [{"divergence": True}, {"uniformity": "entropy"}],
    "brownian_bridge": [{"position": 0.5}],
    "infonce": [{"within": 1.0, "pairs": [["text", "video+audio"], ["video", "audio"]]}, {"reduce": "mean"}],
}


def unit_rows(count: int, dim: int, modalities: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(count, dim, generator=generator, dtype=torch.float64) for name in NAMES[:modalities]}
    return {name: torch.nn.functional.normalize(row, dim=1).to(dtype) for name, row in rows.items()}


def random_case(
    count: int,
    dim: int = 8,
    modalities: int = 3,
    *,
    masked: bool = False,
    duplicates: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    vectors: dict[str, Tensor] | None = None,
) -> Case:
    """Leaves with gradients. masked: modalities are missing at random, the first sample has all. duplicates: samples
    come in twos with one id."""
    groups = [unit_rows(count, dim, modalities, seed + number, dtype) for number in range(4)]
    if vectors is not None:
        groups[0] = vectors
    for group in groups:
        for tensor in group.values():
            tensor.requires_grad_()
    generator = torch.Generator().manual_seed(seed + 100)
    present = {
        name: (torch.rand(count, generator=generator) > 0.3) | (torch.arange(count) == 0)
        if masked
        else torch.ones(count, dtype=torch.bool)
        for name in groups[0]
    }
    ids = torch.arange(count) // 2 if duplicates else torch.arange(count)
    return Case(
        vectors=groups[0], augmented=groups[1], independent=groups[2], independent_augmented=groups[3], present=present,
        ids=ids,
    )  # fmt: skip


def keep(case: Case, rows: list[int]) -> Case:
    """The case with these samples alone, from the same leaves."""

    def cut(group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in group.items()}

    return Case(
        vectors=cut(case.vectors), augmented=cut(case.augmented), independent=cut(case.independent),
        independent_augmented=cut(case.independent_augmented), present=cut(case.present), ids=case.ids[rows],
    )  # fmt: skip


def gradients(loss: Tensor, case: Case, *, retain_graph: bool = False) -> list[Tensor]:
    """With respect to everything; zeros where there is none."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in case.leaves()]
    return list(torch.autograd.grad(loss, case.leaves(), materialize_grads=True, retain_graph=retain_graph))


def scalar_gradients(loss: Tensor, objective: Objective) -> list[Tensor]:
    """With respect to the learned scalars."""
    learned = list(objective.parameters())
    return list(torch.autograd.grad(loss, learned, materialize_grads=True)) if learned else []


def degenerate_vectors(
    modalities: int, dtype: torch.dtype, count: int = 6, dim: int = 5
) -> dict[str, dict[str, Tensor]]:
    """By name of the case: modality -> rows."""
    names = NAMES[:modalities]
    rows = unit_rows(count, dim, modalities, 7, dtype)
    first = rows[names[0]]
    axes = torch.eye(dim, dtype=dtype)
    near = {name: first + 1e-7 * row for name, row in rows.items()}
    one_row = {name: row[:1].clone() for name, row in rows.items()}
    places = torch.arange(count)
    return {
        "identical": {name: first.clone() for name in names},
        "nearly identical": {name: torch.nn.functional.normalize(row, dim=1) for name, row in near.items()},
        "two identical beside others": rows | {names[0]: first.clone(), names[1]: first.clone()},
        "opposite": {name: first * (-1) ** number for number, name in enumerate(names)},
        "orthogonal": {name: axes[number].repeat(count, 1) for number, name in enumerate(names)},
        "zero rows": {name: row * (places != n)[:, None] for n, (name, row) in enumerate(rows.items())},
        "one modality all zero": {name: row * (name != names[1]) for name, row in rows.items()},
        "duplicates": {name: row[:1].repeat(count, 1) for name, row in rows.items()},
        "everything one vector": {name: first[:1].repeat(count, 1) for name in names},
        "dimensions as modalities": unit_rows(count, modalities, modalities, 9, dtype),
        "one sample": one_row,
    }  # fmt: skip
