"""GRAM: contrast by the volume of the parallelotope that the modalities of a tuple span (arXiv 2412.11959).

Rows are anchors, columns are the other modalities of a sample, moving together. Orthonormal Q_j and d_j, the product of
the residual norms, come from Gram-Schmidt on the non-anchor vectors of column j; V_ij = d_j * dist(a_i, span Q_j).
The official code takes sqrt(|det|) of a Gram matrix, whose gradient is NaN at V = 0; here the gradient with respect to
a vector is at most the volume of the others, and 0 where V = 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.settings import UserError, nearest
from pretrain.objective_config import GramOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.terms import CrossEntropy, Objective, Pairs, PerSample, Rows, Term


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
        masks = torch.stack([embeddings.mask(name) for name in others], dim=1)
        vectors = torch.stack([embeddings.rows(name) for name in others], dim=1)
        valid = embeddings.mask(anchor_name) & masks.any(dim=1)
        basis, volume = orthonormal_basis(vectors, masks)
        scale = 1 / self.temperature(scalars, anchor)
        contrast = CrossEntropy(
            name="gram",
            weight=1.0,
            pairs=Pairs(
                rows={"anchor": anchor},
                columns={"basis": basis, "volume": volume},
                scalars={"scale": scale},
                matched=-matched_volumes(anchor, basis, volume) * scale,
                valid=valid,
                ids=embeddings.sample_ids(),
                score=volume_logits,
                tile=self.gram.tile,
            ),
            label_smoothing=self.gram.label_smoothing,
        )
        if self.gram.orientation == 0:
            return [contrast]
        cosines = torch.einsum("nd,nkd->nk", anchor, vectors)
        hinge = (torch.relu(-cosines) * masks).sum(dim=1) / masks.sum(dim=1).clamp_min(1)
        return [contrast, PerSample(name="orientation", weight=self.gram.orientation, values=hinge, valid=valid)]


def _split(embeddings: Embeddings, anchor: str) -> tuple[str, list[str]]:
    if anchor not in embeddings.vectors:
        raise UserError(f"objective gram: no embeddings of anchor '{anchor}'; {nearest(anchor, embeddings.vectors)}")
    return anchor, [name for name in embeddings.vectors if name != anchor]


def orthonormal_basis(
    vectors: Float[Tensor, "samples others dim"], masks: Bool[Tensor, "samples others"]
) -> tuple[Float[Tensor, "samples others dim"], Float[Tensor, " samples"]]:
    """Gram-Schmidt with reorthogonalisation: orthonormal rows Q and the volume d the vectors span.

    A masked vector gives a zero row and factor 1. A vector inside the span of those before it (residual below a few
    units of rounding) gives a zero row and factor 0: the tuple's volume is 0 and so is its gradient.
    """
    floor = 16 * torch.finfo(vectors.dtype).eps
    basis: list[Tensor] = []
    volume = torch.ones_like(vectors[:, 0, 0])
    for index in range(vectors.shape[1]):
        residual = vectors[:, index]
        for _ in range(2):
            for direction in basis:
                residual = residual - (residual * direction).sum(dim=1, keepdim=True) * direction
        squared = residual.square().sum(dim=1)
        usable = (squared > floor**2) & masks[:, index]
        length = torch.where(usable, squared, torch.ones_like(squared)).sqrt()
        basis.append(torch.where(usable[:, None], residual / length[:, None], torch.zeros_like(residual)))
        dependent = masks[:, index] & ~usable
        volume = volume * torch.where(dependent, torch.zeros_like(length), length)
    return torch.stack(basis, dim=1), volume


def matched_volumes(
    anchor: Float[Tensor, "samples dim"],
    basis: Float[Tensor, "samples others dim"],
    volume: Float[Tensor, " samples"],
) -> Float[Tensor, " samples"]:
    """Volumes of the matched tuples through the residual |a - Q Q^T a|: precise even where V is tiny."""
    floor = 16 * torch.finfo(anchor.dtype).eps
    residual = anchor
    for _ in range(2):
        residual = residual - torch.einsum("nk,nkd->nd", torch.einsum("nd,nkd->nk", residual, basis), basis)
    squared = residual.square().sum(dim=1)
    usable = squared > floor**2
    length = torch.where(usable, squared, torch.ones_like(squared)).sqrt()
    return volume * torch.where(usable, length, torch.zeros_like(length))


def volume_logits(rows: Rows, columns: Rows, scalars: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
    """-V_ij / temperature: one matrix product with (k - 1) columns a sample, then a sum of squares."""
    anchor, basis = rows["anchor"], columns["basis"]
    num_columns, others, dim = basis.shape
    projections = (anchor @ basis.reshape(-1, dim).T).view(-1, num_columns, others)
    squared = anchor.square().sum(dim=1, keepdim=True) - projections.square().sum(dim=2)
    usable = squared > 4 * torch.finfo(squared.dtype).eps
    distance = torch.where(
        usable, torch.where(usable, squared, torch.ones_like(squared)).sqrt(), torch.zeros_like(squared)
    )
    return -distance * columns["volume"] * scalars["scale"]


OBJECTIVE = Gram
