"""Orthonormal axes of the vectors of each sample, and the volume they span, with gradients that stay finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Vectors = Float[Tensor, "samples dim"]
PerTuple = Float[Tensor, " samples"]


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
        residual = without(vector, axes)
        with torch.no_grad():  # removes rounding only: along unit axes its derivative is 0
            correction = without(residual, axes) - residual
        residual = residual + correction
        squared = residual.square().sum(dim=1)
        usable = (squared > floor**2) & mask
        length = torch.where(usable, squared, torch.ones_like(squared)).sqrt()
        axes.append(torch.where(usable[:, None], residual / length[:, None], torch.zeros_like(residual)))
        volume = volume * torch.where(mask & ~usable, torch.zeros_like(length), length)
    return axes, volume


def without(vector: Vectors, axes: Sequence[Vectors]) -> Vectors:
    """vector - sum of its parts along the axes"""
    for along, axis in [((vector * axis).sum(dim=1, keepdim=True), axis) for axis in axes]:
        vector = vector - along * axis
    return vector
