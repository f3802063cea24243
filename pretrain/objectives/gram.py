"""GRAM: contrast by the volume of the parallelotope that the modalities of a tuple span (arXiv 2412.11959).

Rows are anchors, columns are the other modalities of a sample, moving together. Orthonormal Q_j and d_j, the product of
the residual norms, come from Gram-Schmidt on the non-anchor vectors of column j; V_ij = d_j * dist(a_i, span Q_j).
The official code takes sqrt(|det|) of a Gram matrix, whose gradient is NaN at V = 0; here the gradient with respect to
a vector is at most the volume of the others, and 0 where V = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.settings import UserError, nearest
from pretrain.objective_config import GramOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.terms import CrossEntropy, Objective, Pairs, PerSample, Rows, Term

Vectors = Float[Tensor, "samples dim"]
PerTuple = Float[Tensor, " samples"]


class Gram(Objective):
    """Mean of both cross entropies over logits -V_ij / temperature, any number of modalities >= 2.

    A missing non-anchor modality counts as an axis orthonormal to all others (factor 1). Samples without the anchor or
    without any other modality are dropped.

    Args:
        options: see GramOptions.
        modalities: names the run has; None skips the check of `anchor`.

    Raises:
        UserError: `anchor` is not one of `modalities`.
    """

    def __init__(self, options: GramOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.gram = options
        if modalities is not None and options.anchor not in modalities:
            raise UserError(f"objective gram: anchor '{options.anchor}'; {nearest(options.anchor, modalities)}")

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One contrast, and the orientation hinge when it has a weight."""
        anchor_name, others = _split(embeddings, self.gram.anchor)
        anchor = embeddings.rows(anchor_name)
        dim, k = anchor.shape[1], len(others) + 1
        if dim < k:
            raise UserError(f"objective gram: {k} modalities in {dim} dimensions; expected dim >= modalities")
        masks = [embeddings.mask(name) for name in others]
        vectors = [embeddings.rows(name) for name in others]
        valid = embeddings.mask(anchor_name) & torch.stack(masks).any(dim=0)
        axes, volume = orthonormal_axes(vectors, masks)
        scale = 1 / self.temperature(scalars, anchor)
        contrast = CrossEntropy(
            name="gram",
            weight=1.0,
            pairs=Pairs(
                rows={"anchor": anchor},
                columns={"volume": volume, **{f"axis {m}": axis for m, axis in enumerate(axes)}},
                scalars={"scale": scale},
                matched=-matched_volumes(anchor, axes, volume) * scale,
                valid=valid,
                ids=embeddings.sample_ids(),
                score=volume_logits,
                tile=self.gram.tile,
            ),
            label_smoothing=self.gram.label_smoothing,
        )
        if self.gram.orientation == 0:
            return [contrast]
        hinges = torch.stack([torch.relu(-(anchor * vector).sum(dim=1)) for vector in vectors], dim=1)
        kept = torch.stack(masks, dim=1)
        hinge = (hinges * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)
        return [contrast, PerSample(name="orientation", weight=self.gram.orientation, values=hinge, valid=valid)]


def _split(embeddings: Embeddings, anchor: str) -> tuple[str, list[str]]:
    if anchor not in embeddings.vectors:
        raise UserError(f"objective gram: no embeddings of anchor '{anchor}'; {nearest(anchor, embeddings.vectors)}")
    return anchor, [name for name in embeddings.vectors if name != anchor]


def orthonormal_axes(
    vectors: Sequence[Vectors], masks: Sequence[Bool[Tensor, " samples"]]
) -> tuple[list[Vectors], PerTuple]:
    """Gram-Schmidt with reorthogonalisation: orthonormal axes of each sample, and the volume its vectors span.

    A masked vector gives a zero axis and factor 1. A vector inside the span of those before it (residual below a few
    units of rounding) gives a zero axis and factor 0: the tuple's volume is 0 and so is its gradient.
    """
    floor = 16 * torch.finfo(vectors[0].dtype).eps
    axes: list[Tensor] = []
    volume = torch.ones_like(vectors[0][:, 0])
    for vector, mask in zip(vectors, masks, strict=True):
        residual = _without(vector, axes)
        with torch.no_grad():  # removes rounding only: along unit axes its derivative is 0
            correction = _without(residual, axes) - residual
        residual = residual + correction
        squared = residual.square().sum(dim=1)
        usable = (squared > floor**2) & mask
        length = torch.where(usable, squared, torch.ones_like(squared)).sqrt()
        axes.append(torch.where(usable[:, None], residual / length[:, None], torch.zeros_like(residual)))
        volume = volume * torch.where(mask & ~usable, torch.zeros_like(length), length)
    return axes, volume


def _without(vector: Vectors, axes: Sequence[Vectors]) -> Vectors:
    """vector - sum of its parts along the axes"""
    for along, axis in [((vector * axis).sum(dim=1, keepdim=True), axis) for axis in axes]:
        vector = vector - along * axis
    return vector


def matched_volumes(anchor: Vectors, axes: Sequence[Vectors], volume: PerTuple) -> PerTuple:
    """Volumes of the matched tuples through the residual r = a - Q^T Q a: precise even where V is tiny.

    The derivative of |r| is r/|r| with respect to a, and -<a, q> r/|r| with respect to an axis q; 0 where r is 0.
    """
    with torch.no_grad():
        residual = _without(_without(anchor, axes), axes)
        squared = residual.square().sum(dim=1)
        usable = squared > (16 * torch.finfo(anchor.dtype).eps) ** 2
        length = torch.where(usable, squared, torch.zeros_like(squared)).sqrt()
        direction = torch.where(usable[:, None], residual / length[:, None], torch.zeros_like(residual))
        alongs = [(anchor * axis).sum(dim=1) for axis in axes]
    linear = (direction * anchor).sum(dim=1)
    for axis, along in zip(axes, alongs, strict=True):
        linear = linear - along * (direction * axis).sum(dim=1)
    return volume * (length + (linear - linear.detach()))


def volume_logits(rows: Rows, columns: Rows, scalars: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
    """-V_ij / temperature: one matrix product an axis, then a sum of squares."""
    anchor = rows["anchor"]
    products = [anchor @ axis.T for name, axis in columns.items() if name != "volume"]
    distances = _Distances.apply(anchor.square().sum(dim=1, keepdim=True), *products)
    return distances * (columns["volume"] * -scalars["scale"])


class _Distances(torch.autograd.Function):
    """sqrt(s_i - sum_m p^m_ij^2) of s [r, 1] and products p^m [r, c]; 0, as is its gradient, below rounding."""

    @staticmethod
    def forward(ctx: Any, squares: Tensor, *products: Tensor) -> Tensor:
        distances = squares - products[0].square()
        for product in products[1:]:
            distances.addcmul_(product, product, value=-1)
        distances = torch.threshold_(distances, 4 * torch.finfo(distances.dtype).eps, 0.0).sqrt_()
        ctx.save_for_backward(distances, *products)
        return distances

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        distances, *products = ctx.saved_tensors
        slope = (grads[0] / distances).masked_fill_(distances == 0, 0.0)
        by_square = slope.sum(dim=1, keepdim=True) / 2
        slope.neg_()
        return by_square, *(slope * product for product in products)


OBJECTIVE = Gram
