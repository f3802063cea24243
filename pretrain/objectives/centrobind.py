"""CentroBind: each modality is bound to the centroid of all of them (arXiv 2410.02086).

The centroid holds the modality it is compared with, so the loss is below log N even for unrelated embeddings; a
centroid that is not normalised is shorter than 1 and softens the temperature (docs/objectives.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.objective_config import CentrobindOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.infonce import cosine_pairs, cosine_score
from pretrain.objectives.modalities import Mask, Vectors, num_present, unit
from pretrain.objectives.terms import CrossEntropy, Objective, Term


class Centrobind(Objective):
    """Sum (or mean) over modalities of CE(centroid -> modality) + CE(modality -> centroid).

    The centroid is the mean of the modalities that a sample has. Samples with fewer than two are dropped.
    """

    def __init__(self, options: CentrobindOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.centrobind = options

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One contrast a modality."""
        options = self.centrobind
        middle, has_one = centroids(embeddings, normalize=options.normalize)
        if options.stop_gradient:
            middle = middle.detach()
        scale = 1 / self.temperature(scalars, middle)
        return [
            CrossEntropy(
                name=f"centrobind/{name}",
                weight=1.0,
                mean_over="" if options.reduce == "sum" else "modalities",
                pairs=cosine_pairs(
                    embeddings,
                    (middle, has_one),
                    (embeddings.rows(name), embeddings.mask(name)),
                    {"scale": scale},
                    options.tile,
                    cosine_score(options),
                ),
                label_smoothing=options.label_smoothing,
                row_weight=1.0,
                column_weight=1.0,
            )
            for name in embeddings.vectors
        ]


def centroids(embeddings: Embeddings, *, normalize: bool) -> tuple[Vectors, Mask]:
    """Mean of the modalities that each sample has [n, D], and which samples have at least two (and a direction)."""
    count = num_present(embeddings)
    total = torch.stack([embeddings.rows(name) for name in embeddings.vectors]).sum(dim=0)
    middle = total / count.clamp_min(1)[:, None]
    enough = count >= 2
    if not normalize:
        return middle, enough
    middle, usable = unit(middle)
    return middle, enough & usable


OBJECTIVE = Centrobind
