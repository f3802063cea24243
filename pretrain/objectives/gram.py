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
from torch import Tensor
from torch.linalg import vecdot

from data_pipeline.settings import UserError
from pretrain.objective_config import GramOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.gram_schmidt import ROUNDING, PerTuple, Vectors, orthonormal_axes, row_blocks, without
from pretrain.objectives.modalities import by_arity, num_present, orientation, others_of
from pretrain.objectives.scores import VolumeScore
from pretrain.objectives.terms import CrossEntropy, Objective, Pairs, Term


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
        if modalities is not None:
            others_of(options.anchor, modalities, "gram")

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One contrast, and the orientation hinge when it has a weight."""
        anchor_name = self.gram.anchor
        others = others_of(anchor_name, embeddings.vectors, "gram")
        anchor = embeddings.rows(anchor_name)
        dim, k = anchor.shape[1], len(others) + 1
        if dim < k:
            raise UserError(f"objective gram: {k} modalities in {dim} dimensions; expected dim >= modalities")
        masks = [embeddings.mask(name) for name in others]
        vectors = [embeddings.rows(name) for name in others]
        valid = embeddings.mask(anchor_name) & torch.stack(masks).any(dim=0)
        axes, volume = orthonormal_axes(vectors, masks)
        matched = matched_volumes(anchor, axes, volume)
        scale = 1 / self.temperature(scalars, anchor)
        contrast = CrossEntropy(
            name="gram",
            weight=1.0,
            pairs=Pairs(
                rows={"anchor": anchor, "square": vecdot(anchor, anchor)},
                columns={"volume": volume, **{f"axis {m}": axis for m, axis in enumerate(axes)}},
                scalars={"scale": scale},
                matched=-matched * scale,
                valid=valid,
                ids=embeddings.sample_ids(),
                score=VolumeScore(kernel=self.gram.kernel, negatives_precision=self.gram.negatives_precision),
                tile=self.gram.tile,
            ),
            label_smoothing=self.gram.label_smoothing,
        )
        terms: list[Term] = [contrast, *by_arity("volume", matched, num_present(embeddings), valid, k)]
        if self.gram.orientation:
            terms.append(orientation(embeddings, valid, self.gram.orientation, self.name))
        return terms


def matched_volumes(anchor: Vectors, axes: Sequence[Vectors], volume: PerTuple) -> PerTuple:
    """Volumes of the matched tuples through the residual r = a - Q^T Q a: precise even where V is tiny.

    The derivative of |r| is r/|r| with respect to a, and -<a, q> r/|r| with respect to an axis q; 0 where r is 0.
    """
    volumes = _MatchedVolumes.apply(anchor, volume, *axes)
    assert isinstance(volumes, Tensor)
    return volumes


class _MatchedVolumes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, volume: Tensor, *axes: Tensor) -> Tensor:
        length, inverse, *alongs = anchor.new_empty(2 + len(axes), len(anchor))
        directions = torch.empty_like(anchor)
        for part in row_blocks(anchor):
            rows, own = anchor[part], [axis[part] for axis in axes]
            residual = without(without(rows, own), own)
            size = torch.linalg.vector_norm(residual, dim=1)
            usable = ~(size <= ROUNDING * torch.finfo(anchor.dtype).eps)
            length[part] = torch.where(usable, size, torch.zeros_like(size))
            inverse[part] = torch.where(usable, 1 / size, torch.zeros_like(size))
            torch.mul(residual, inverse[part, None], out=directions[part])
            for along, axis in zip(alongs, own, strict=True):
                along[part] = vecdot(rows, axis)
        ctx.save_for_backward(directions, length, volume, *alongs)
        return volume * length

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        directions, length, volume, *alongs = ctx.saved_tensors
        by_length = (grads[0] * volume)[:, None]
        by_axes = [directions * (by_length * -along[:, None]) for along in alongs]
        return directions * by_length, grads[0] * length, *by_axes


OBJECTIVE = Gram
