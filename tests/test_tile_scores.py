"""Scores with written-out gradients: against autograd, kept or scored again, and at a lower precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain import pair_statistics
from pretrain.objectives import Embeddings, build_objective
from pretrain.objectives.scores import CosineScore, TileScore, VolumeScore

NAMES = ("text", "video", "audio")


def vectors(count: int, dim: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(count, dim, generator=generator)
    rows = {name: common + torch.randn(count, dim, generator=generator) for name in NAMES}
    return {name: torch.nn.functional.normalize(row, dim=1).requires_grad_() for name, row in rows.items()}


def volumes(rows: dict[str, Tensor], columns: dict[str, Tensor], scalars: dict[str, Tensor]) -> Tensor:
    squared = rows["square"][:, None] - sum((rows["anchor"] @ columns[f"axis {m}"].T).square() for m in (0, 1))
    return -scalars["scale"] * columns["volume"] * squared.sqrt()


def cosines(rows: dict[str, Tensor], columns: dict[str, Tensor], scalars: dict[str, Tensor]) -> Tensor:
    return rows["left"] @ columns["right"].T * scalars["scale"] + scalars["bias"]


def inputs(score: TileScore) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * 0.3 + 0.1

    if isinstance(score, VolumeScore):
        columns = {"volume": draw(4), "axis 0": draw(4, 3), "axis 1": draw(4, 3)}
        return {"anchor": draw(5, 3), "square": draw(5) + 1}, columns, {"scale": draw(1)}
    return {"left": draw(5, 3)}, {"right": draw(4, 3)}, {"scale": draw(1), "bias": draw(1)}


@pytest.mark.parametrize(("score", "formula"), [(VolumeScore(), volumes), (CosineScore(), cosines)])
def test_written_out_gradients_are_those_of_autograd(score: TileScore, formula: object) -> None:
    assert callable(formula)
    tile = inputs(score)
    leaves = [tensor.requires_grad_() for group in tile for tensor in group.values()]
    expected = formula(*tile)
    weights = torch.rand(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    with torch.no_grad():
        found, kept = score.forward(*tile)
        assert torch.allclose(found, expected, rtol=1e-14)
        assert torch.equal(score(*tile), found)
        rows, columns, scalars = ({name: torch.ones_like(value) for name, value in group.items()} for group in tile)
        score.backward(kept, weights.clone(), tile, (dict(rows), dict(columns), dict(scalars)))
    totals = [*rows.values(), *columns.values(), *scalars.values()]
    for total, grad in zip(totals, wanted, strict=True):
        assert torch.allclose(total - 1, grad, rtol=1e-12, atol=1e-15)  # it adds to what was there


def gradients(name: str, **options: object) -> list[list[Tensor]]:
    """Of two backward passes through one graph, in tiles of 8."""
    leaves = vectors(20, 16)
    loss = build_objective(name, tile=8, **options)(Embeddings(vectors=leaves)).loss
    return [list(torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)) for _ in range(2)]


@pytest.mark.parametrize("name", ["gram", "infonce"])
def test_tiles_kept_for_backward_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gradients(name)
    monkeypatch.setattr(pair_statistics, "KEPT_BYTES", 0)
    found += gradients(name)
    monkeypatch.setattr(pair_statistics, "KEPT_BYTES", 2000)  # some tiles
    found += gradients(name)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("name", ["gram", "infonce"])
def test_negatives_in_bfloat16_are_near(name: str) -> None:
    exact, coarse = (torch.cat(gradients(name, negatives_precision=p)[0]) for p in ("float32", "bfloat16"))
    difference = ((coarse - exact).norm() / exact.norm()).item()
    assert 1e-6 < difference < 2e-2
