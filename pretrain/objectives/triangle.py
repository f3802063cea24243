"""TRIANGLE: contrast by the area between an anchor and two other modalities (code: utils/area.py at 6951d49).

With u = a_i - b_j and w = a_i - c_j, the code's score is (|u|^2 |w|^2 - <u, w>^2) / 2: twice the squared area, without
a root, so its gradient is finite everywhere. The code holds [B, B, D] differences; here two matrix products do.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.objective_config import TriangleOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.modalities import by_arity, num_present, others_of
from pretrain.objectives.terms import CrossEntropy, Objective, Pairs, Rows, Term

MAX_OTHERS = 2


class Triangle(Objective):
    """Mean of both cross entropies over logits -area_ij / temperature.

    A sample that lacks one of the two others has |u|^2 / 2 in the place of the area: the missing side counts as
    orthonormal. Samples without the anchor, or without both others, are dropped.

    Raises:
        UserError: `anchor` is not one of `modalities`, or there are more than three.
    """

    def __init__(self, options: TriangleOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.triangle = options
        if modalities is not None:
            self._others(modalities)

    def _others(self, modalities: tuple[str, ...]) -> list[str]:
        others = others_of(self.triangle.anchor, modalities, "triangle")
        if len(others) > MAX_OTHERS:
            raise UserError(
                f"objective triangle: {len(others) + 1} modalities; expected 3 (an area has three corners): "
                "use gram for more"
            )
        return others

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One contrast, and the areas as metrics."""
        others = self._others(tuple(embeddings.vectors))
        anchor = embeddings.rows(self.triangle.anchor)
        vectors = [embeddings.rows(name) for name in others]
        masks = [embeddings.mask(name) for name in others]
        valid = embeddings.mask(self.triangle.anchor) & torch.stack(masks).any(dim=0)
        scale = 1 / self.temperature(scalars, anchor)
        matched = _matched_areas(anchor, vectors, masks)
        columns = {f"vector {m}": vector for m, vector in enumerate(vectors)}
        columns |= {f"there {m}": mask.to(anchor.dtype) for m, mask in enumerate(masks)}
        pairs = Pairs(
            rows={"anchor": anchor},
            columns=columns,
            scalars={"scale": scale},
            matched=-scale * matched,
            valid=valid,
            ids=embeddings.sample_ids(),
            score=area_logits,
            tile=self.triangle.tile,
        )
        smoothing = self.triangle.label_smoothing
        contrast = CrossEntropy(name="triangle", weight=1.0, pairs=pairs, label_smoothing=smoothing)
        return [contrast, *by_arity("area", matched, num_present(embeddings), valid, len(others) + 1)]


def _matched_areas(anchor: Tensor, vectors: list[Tensor], masks: list[Tensor]) -> Tensor:
    """[n], from the differences themselves: they lose no digits where the corners are close."""
    sides = [(anchor - vector) * mask[:, None] for vector, mask in zip(vectors, masks, strict=True)]
    squares = [
        torch.where(mask, side.square().sum(dim=1), torch.ones_like(side[:, 0]))
        for side, mask in zip(sides, masks, strict=True)
    ]
    if len(sides) == 1:
        return squares[0] / 2
    return (squares[0] * squares[1] - (sides[0] * sides[1]).sum(dim=1).square()) / 2


def area_logits(rows: Rows, columns: Rows, scalars: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
    """-area_ij / temperature"""
    anchor = rows["anchor"]
    own = anchor.square().sum(dim=1, keepdim=True)
    names = [name.removeprefix("vector ") for name in columns if name.startswith("vector ")]
    products, squares = [], []
    for name in names:
        vector, there = columns[f"vector {name}"], columns[f"there {name}"]
        product = anchor @ vector.T
        products.append(product)
        squares.append((own - 2 * product + vector.square().sum(dim=1)) * there + (1 - there))
    if len(names) == 1:
        return squares[0] * (-scalars["scale"] / 2)
    across = (columns["vector 0"] * columns["vector 1"]).sum(dim=1)
    both = columns["there 0"] * columns["there 1"]
    inner = (own - products[0] - products[1] + across) * both
    return (squares[0] * squares[1] - inner.square()) * (-scalars["scale"] / 2)


OBJECTIVE = Triangle
