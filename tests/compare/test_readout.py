"""A read-out finds what can be told from the embeddings and nothing else, the same every time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.compare.readout import accuracy


def problem(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three well separated clusters."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=generator)
    return torch.eye(3)[labels] * 4 + 0.5 * torch.randn(num, 3, generator=generator), labels


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_separated_clusters_are_told_apart(kind: str) -> None:
    found = [accuracy(kind, problem(300, 0), problem(200, 1), 3) for _ in range(2)]
    assert found[0] > 0.97
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_labels_that_say_nothing_are_not_told(kind: str) -> None:
    rows, _ = problem(2000, 0)
    labels = torch.randint(3, (2000,), generator=torch.Generator().manual_seed(5))
    assert accuracy(kind, (rows[:1000], labels[:1000]), (rows[1000:], labels[1000:]), 3) < 0.42


def test_one_hidden_layer_tells_what_a_line_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(1200, 2, generator=generator) * 2 - 1
    labels = (rows[:, 0] * rows[:, 1] > 0).long()
    parts = (rows[:800], labels[:800]), (rows[800:], labels[800:])
    assert accuracy("linear", *parts, 2) < 0.78  # a line can leave one of the four quarters wrong
    assert accuracy("mlp", *parts, 2) > 0.9


def test_a_column_that_never_changes_is_no_trouble() -> None:
    (rows, labels), (test_rows, test_labels) = problem(300, 0), problem(200, 1)
    rows, test_rows = (torch.cat([r, torch.full((len(r), 1), 7.0)], dim=1) for r in (rows, test_rows))
    assert accuracy("linear", (rows, labels), (test_rows, test_labels), 3) > 0.97
