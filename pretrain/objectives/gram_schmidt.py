"""Orthonormal axes of the vectors of each sample, and the volume they span, with gradients that stay finite.

Gradients are written out: with respect to [n, D] tensors autograd would keep a dozen more of them a modality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot

Vectors = Float[Tensor, "samples dim"]
PerTuple = Float[Tensor, " samples"]
ROUNDING = 16  # units of it: a shorter residual has no direction
BLOCK = 256  # rows


def orthonormal_axes(
    vectors: Sequence[Vectors], masks: Sequence[Bool[Tensor, " samples"]]
) -> tuple[list[Vectors], PerTuple]:
    """Gram-Schmidt with reorthogonalisation: orthonormal axes of each sample, and the volume its vectors span.

    A masked vector, whose row is zero, gives a zero axis and factor 1. A vector inside the span of those before it
    (residual below a few units of rounding) gives a zero axis and factor 0: the tuple's volume is 0 and so is its
    gradient.
    """
    *axes, volume = _GramSchmidt.apply(tuple(masks), *vectors)
    return axes, volume


class _GramSchmidt(torch.autograd.Function):
    """(v_1, v_2, ...) -> (q_1, q_2, ..., volume): r_m = v_m - sum_l q_l <q_l, v_m>, q_m = r_m / |r_m|."""

    @staticmethod
    def forward(ctx: Any, masks: tuple[Tensor, ...], *vectors: Tensor) -> tuple[Tensor, ...]:
        axes = [torch.empty_like(vector) for vector in vectors]
        inverses, factors = vectors[0].new_empty(2, len(vectors), len(vectors[0]))
        for part in row_blocks(vectors[0]):
            for m, (vector, mask) in enumerate(zip(vectors, masks, strict=True)):
                before = [axis[part] for axis in axes[:m]]
                residual = without(without(vector[part], before), before)  # the second time removes rounding only
                inverses[m, part], factors[m, part] = _lengths(residual, mask[part])
                torch.mul(residual, inverses[m, part, None], out=axes[m][part])
        ctx.save_for_backward(inverses, factors, *vectors, *axes)
        return *axes, factors.prod(dim=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inverses, factors, *rest = ctx.saved_tensors
        vectors, axes = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        *by_axes, by_volume = grads
        found = [torch.empty_like(vector) for vector in vectors]
        for part in row_blocks(by_volume):
            here = [by_axis[part] for by_axis in by_axes]
            for m in reversed(range(len(vectors))):
                others = torch.cat([factors[:m, part], factors[m + 1 :, part]]).prod(dim=0)
                inverse, own, before = inverses[m, part], axes[m][part], [axis[part] for axis in axes[:m]]
                along_own = by_volume[part] * others * (inverse > 0) - vecdot(here[m], own) * inverse
                by_residual = (here[m] * inverse[:, None]).addcmul_(own, along_own[:, None])
                for number, axis in enumerate(before):
                    vector = vectors[m][part]
                    change = by_residual * vecdot(vector, axis)[:, None]
                    here[number] = here[number] - change.addcmul_(vector, vecdot(by_residual, axis)[:, None])
                found[m][part] = without(by_residual, before)
        return None, *found


def _lengths(residual: Vectors, mask: Bool[Tensor, " samples"]) -> tuple[PerTuple, PerTuple]:
    """1 / length, 0 for a vector without an axis; and the factor of the volume."""
    squared = vecdot(residual, residual)
    # What is no number stays none: a loss that is finite all the same would hide it.
    usable = ~(squared <= (ROUNDING * torch.finfo(residual.dtype).eps) ** 2) & mask
    length = torch.where(usable, squared, torch.ones_like(squared)).sqrt()
    zero = torch.zeros_like(length)
    return torch.where(usable, 1 / length, zero), torch.where(mask & ~usable, zero, length)


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Parts of the rows whose temporaries stay in a processor's cache; on a GPU all at once."""
    size = BLOCK if rows.device.type == "cpu" else max(len(rows), 1)
    for start in range(0, len(rows), size):
        yield slice(start, min(start + size, len(rows)))


def without(vector: Vectors, axes: Sequence[Vectors]) -> Vectors:
    """vector - sum of its parts along the axes"""
    alongs = [vecdot(vector, axis)[:, None] for axis in axes]
    for along, axis in zip(alongs, axes, strict=True):
        vector = torch.addcmul(vector, along, axis, value=-1)
    return vector
