"""One side of a comparison: the tuples of vectors that a set of samples has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.settings import UserError, nearest
from pretrain.objectives.embeddings import Embeddings

Rows = slice | Tensor  # which samples: consecutive ones, or numbers [n]


@dataclass(frozen=True, kw_only=True)
class Tuples:
    """Some samples of a side, ready for arithmetic.

    units: unit vectors, zeros where one is missing or holds NaN. there: which are not missing. offset: what is added to
    all scores of a tuple: -inf where it has no vector at all, NaN where one holds NaN, else 0.
    """

    units: Float[Tensor, "n modalities dim"]
    there: Bool[Tensor, "n modalities"]
    offset: Float[Tensor, " n"]


def embeddings_of(vectors: Mapping[str, Tensor], side: str = "embeddings") -> Embeddings:
    """Embeddings of rows [n, D] by modality; one with NaN is missing, as `Model.encode` marks what a sample lacks.

    Raises:
        UserError: no modality, or rows of different shapes, of what is called `side`.
    """
    if not vectors:
        raise UserError(f"{side}: no modality; expected rows of at least one")
    shapes = {name: tuple(rows.shape) for name, rows in vectors.items()}
    first = next(iter(shapes.values()))
    if len(set(shapes.values())) > 1 or len(first) != 2:
        raise UserError(f"{side}: shapes {shapes}; expected [n, D], the same for every modality")
    return Embeddings(vectors=dict(vectors), present={name: ~rows.isnan().any(dim=1) for name, rows in vectors.items()})


def part_of(embeddings: Embeddings, side: str) -> Embeddings:
    """Only the modalities that `side` names ("video", "video+audio").

    Raises:
        UserError: it names another.
    """
    names = side.split("+")
    for name in names:
        if name not in embeddings.vectors:
            raise UserError(f"side '{side}': modality '{name}'; {nearest(name, embeddings.vectors)}")
    present = embeddings.present
    return Embeddings(
        vectors={name: embeddings.vectors[name] for name in names},
        present=None if present is None else {name: present[name] for name in names},
        ids=embeddings.ids,
    )


def tuples(embeddings: Embeddings, rows: Rows, dtype: torch.dtype, device: torch.device) -> Tuples:
    """The tuples of some samples. A row of zeros has no direction and counts as missing."""
    vectors, masks = [], []
    for name, all_rows in embeddings.vectors.items():
        some = all_rows[rows].detach().to(device, dtype)
        mask = (some != 0).any(dim=1)
        if embeddings.present is not None:
            mask &= embeddings.present[name][rows].to(device)
        vectors.append(some.masked_fill(~mask[:, None], 0))
        masks.append(mask)
    units, there = F.normalize(torch.stack(vectors, dim=1), dim=2), torch.stack(masks, dim=1)
    spoilt = units.isnan().any(dim=2)
    offset = units.new_zeros(len(units)).masked_fill(~there.any(dim=1), -torch.inf)
    return Tuples(
        units=units.masked_fill(spoilt[:, :, None], 0),
        there=there,
        offset=offset.masked_fill(spoilt.any(dim=1), torch.nan),
    )
