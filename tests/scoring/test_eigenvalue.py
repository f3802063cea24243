"""The largest eigenvalue of small matrices against LAPACK, where eigenvalues are equal above all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.scoring.eigenvalue import leading_eigenvalue


def entries(matrices: Tensor) -> list[list[Tensor]]:
    """Lower triangles of [n, k, k]."""
    return [[matrices[:, i, j] for j in range(i + 1)] for i in range(matrices.shape[1])]


def check(matrices: Tensor) -> None:
    expected = torch.linalg.eigvalsh(matrices)[:, -1]
    scale = matrices.abs().amax(dim=(1, 2)).clamp_min(1e-300)
    error = (leading_eigenvalue(entries(matrices)) - expected).abs() / scale
    assert error.max() < 1e-14


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_random_matrices(size: int) -> None:
    random = torch.Generator().manual_seed(size)
    matrices = torch.randn(500, size, size, dtype=torch.float64, generator=random)
    check(matrices + matrices.mT)
    check((matrices + matrices.mT) * 10.0 ** torch.randint(-8, 8, (500, 1, 1), generator=random).double())


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_equal_eigenvalues(size: int) -> None:
    random = torch.Generator().manual_seed(size)
    turn = torch.linalg.qr(torch.randn(200, size, size, dtype=torch.float64, generator=random)).Q
    for multiplicity in range(1, size + 1):
        for gap in (0.0, 1e-15, 1e-9):
            values = torch.linspace(-1, 1, size, dtype=torch.float64)
            values[-multiplicity:] = 1.0
            values[-1] += gap
            made = (turn * values) @ turn.mT
            check((made + made.mT) / 2)


def test_what_is_diagonal_or_constant() -> None:
    eye, ones = torch.eye(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    check(torch.stack([eye, ones, 0 * eye, eye - 0.3 * ones, -ones, torch.diag(torch.tensor([3.0, -1, 0]).double())]))


def test_entries_may_broadcast() -> None:
    random = torch.Generator().manual_seed(0)
    own, other = torch.rand(4, 1, generator=random).double(), torch.rand(5, generator=random).double()
    cross = torch.randn(4, 5, generator=random, dtype=torch.float64)
    whole = torch.stack([own.expand(4, 5), cross, cross, other.expand(4, 5)], dim=-1).view(4, 5, 2, 2)
    found = leading_eigenvalue([[own], [cross, other]])
    torch.testing.assert_close(found, torch.linalg.eigvalsh(whole)[..., -1], atol=1e-14, rtol=0)
