"""Which modalities an objective puts together: an anchor and the others, pairs, sums of several."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.settings import UserError, nearest
from pretrain.objective_config import PairOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.terms import PerSample

Vectors = Float[Tensor, "samples dim"]
Mask = Bool[Tensor, " samples"]


def others_of(anchor: str, modalities: Iterable[str], objective: str) -> list[str]:
    """All modalities but the anchor, in their order.

    Raises:
        UserError: the anchor is none of them.
    """
    names = list(modalities)
    if anchor not in names:
        raise UserError(f"objective {objective}: anchor '{anchor}'; {nearest(anchor, names)}")
    return [name for name in names if name != anchor]


def modality_pairs(options: PairOptions, modalities: Iterable[str], objective: str) -> list[tuple[str, str]]:
    """The pairs that `options` mean: all, those named, or those of an anchor with each other modality.

    Raises:
        UserError: a name is no modality.
    """
    names = list(modalities)
    if options.pairs != "all":
        pairs = list(options.pairs)
    elif options.anchor is not None:
        pairs = [(options.anchor, name) for name in names if name != options.anchor]
    else:
        pairs = list(combinations(names, 2))
    for name in (name for pair in pairs for one in pair for name in one.split("+")):
        if name not in names:
            raise UserError(f"objective {objective}: modality '{name}'; {nearest(name, names)}")
    return pairs


def side(embeddings: Embeddings, name: str) -> tuple[Vectors, Mask]:
    """Vectors and validity of one side of a pair: a modality, or the normalised sum of several ("video+audio")."""
    names = name.split("+")
    if len(names) == 1:
        return embeddings.rows(name), embeddings.mask(name)
    return unit(torch.stack([embeddings.rows(one) for one in names]).sum(dim=0))


def unit(rows: Vectors) -> tuple[Vectors, Mask]:
    """Rows over their lengths, and which have one: a row shorter than the root of the rounding has no direction."""
    squared = rows.square().sum(dim=1)
    usable = ~(squared <= torch.finfo(rows.dtype).eps)  # what is no number stays none
    length = torch.where(usable, squared, torch.ones_like(squared)).sqrt()
    return torch.where(usable[:, None], rows / length[:, None], torch.zeros_like(rows)), usable


def num_present(embeddings: Embeddings) -> Tensor:
    """How many modalities each sample has: [n]"""
    return torch.stack([embeddings.mask(name) for name in embeddings.vectors]).sum(dim=0)


def by_arity(quantity: str, values: Tensor, arity: Tensor, valid: Mask, most: int) -> list[PerSample]:
    """Metrics: the mean of `values` over the tuples of each number of modalities, 2 to `most`, which are not comparable
    with each other. values, arity, valid: [n]"""
    return [
        PerSample(name=f"{quantity}/{k} modalities", weight=0.0, values=values.detach(), valid=valid & (arity == k))
        for k in range(2, most + 1)
    ]


def orientation(embeddings: Embeddings, valid: Mask, weight: float, objective: str) -> PerSample:
    """Sum over the pairs of a sample's modalities of max(0, -cosine), averaged over the samples that are `valid`.

    Volumes and singular values are the same for a vector and its opposite; this makes them point one way.
    """
    pairs = list(combinations(embeddings.vectors, 2))
    cosines = [(embeddings.rows(a) * embeddings.rows(b)).sum(dim=1) for a, b in pairs]
    there = torch.stack([embeddings.mask(a) & embeddings.mask(b) for a, b in pairs], dim=1)
    values = (torch.relu(-torch.stack(cosines, dim=1)) * there).sum(dim=1)
    return PerSample(name=f"{objective}/orientation", weight=weight, values=values, valid=valid & there.any(dim=1))
