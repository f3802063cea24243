"""Scores of one tuple at a time, in float64, from the definitions; and rows to score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Vectors = Sequence[Tensor]  # unit vectors [D] of one side, float64
SCORES = ("summed_cosine", "centroid", "volume", "singular_value")  # of any number of vectors a side
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def summed_cosine(mine: Vectors, theirs: Vectors) -> float:
    return sum(float(a @ b) for a in mine for b in theirs)


def centroid(mine: Vectors, theirs: Vectors) -> float:
    one, other = torch.stack(list(mine)).mean(dim=0), torch.stack(list(theirs)).mean(dim=0)
    return float(one @ other / (one.norm() * other.norm()))


def volume(mine: Vectors, theirs: Vectors) -> float:
    return -float(torch.linalg.svdvals(torch.stack([*mine, *theirs])).prod())


def singular_value(mine: Vectors, theirs: Vectors) -> float:
    return float(torch.linalg.svdvals(torch.stack([*mine, *theirs])).max())


REFERENCES: dict[str, Callable[[Vectors, Vectors], float]] = {
    "cosine": summed_cosine,
    "summed_cosine": summed_cosine,
    "centroid": centroid,
    "volume": volume,
    "singular_value": singular_value,
}


def reference(score: str, query: dict[str, Tensor], candidates: dict[str, Tensor]) -> Tensor:
    """[q, c]; rows with NaN and rows of zeros are missing."""
    mine, theirs = (_tuples(side) for side in (query, candidates))
    return torch.tensor(
        [[REFERENCES[score](a, b) if a and b else -torch.inf for b in theirs] for a in mine], dtype=torch.float64
    )


def _tuples(side: dict[str, Tensor]) -> list[list[Tensor]]:
    rows = zip(*side.values(), strict=True)
    return [[v.double() / v.double().norm() for v in row if not v.isnan().any() and v.any()] for row in rows]


def unit_rows(num: int, dim: int, seed: int) -> Tensor:
    """Random float32 unit rows."""
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def random_side(num: int, num_modalities: int, dim: int = 8, seed: int = 0, missing: float = 0.0) -> dict[str, Tensor]:
    """Rows by modality, a share of them NaN."""
    side = {f"m{n}": unit_rows(num, dim, 100 * seed + n) for n in range(num_modalities)}
    for n, rows in enumerate(side.values()):
        rows[torch.rand(num, generator=torch.Generator().manual_seed(100 * seed + 50 + n)) < missing] = torch.nan
    return side


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.num_elements = max(self.num_elements, value.numel())
        return result
