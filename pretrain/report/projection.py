"""Embeddings of all modalities on a plane: the two directions in which they differ most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pretrain.kept_embeddings import KeptEmbeddings
from pretrain.report.scores import spread

MAX_POINTS = 500  # of a modality


@dataclass(frozen=True, kw_only=True)
class Projection:
    """points: by modality. rows: which rows of the kept embeddings they are. variance_share: kept by each axis."""

    points: dict[str, Float[Tensor, "_ 2"]]
    rows: dict[str, Int64[Tensor, " _"]]
    variance_share: tuple[float, float]


def project(kept: KeptEmbeddings) -> Projection | None:
    """The first two principal components of at most `MAX_POINTS` vectors of each modality, evenly spread; None without
    two vectors.

    Each axis points so that its largest loading is positive: the same vectors always give the same picture.
    """
    rows = {name: spread(mask.nonzero()[:, 0], MAX_POINTS) for name, mask in kept.present.items()}
    stacked = torch.cat([kept.vectors[name][where].double() for name, where in rows.items()])
    if len(stacked) < 2 or not stacked.isfinite().all():
        return None
    centred = stacked - stacked.mean(dim=0)
    _, strength, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    plane = centred @ (axes * torch.where(largest < 0, -1.0, 1.0)).T
    shares = strength.square() / strength.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    parts = plane.split([len(where) for where in rows.values()])
    return Projection(
        points=dict(zip(rows, parts, strict=True)),
        rows=rows,
        variance_share=(float(shares[0]), float(shares[1])),
    )
