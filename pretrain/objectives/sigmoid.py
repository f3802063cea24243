"""SigLIP between pairs of modalities: every pair of samples is its own yes or no (arXiv 2303.15343)."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.objective_config import SigmoidOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.infonce import cosine_pairs
from pretrain.objectives.modalities import modality_pairs, side
from pretrain.objectives.scores import CosineScore
from pretrain.objectives.terms import Objective, SigmoidCrossEntropy, Term


class Sigmoid(Objective):
    """Sum (or mean) over pairs of -(1 / N) sum_ij log sigmoid(y_ij (<a_i, b_j> / temperature + bias)).

    N is the number of samples of the global batch that have both sides (the paper's code divides by those of a rank and
    averages over ranks, which is the same without masks).

    Raises:
        UserError: a pair or the anchor names a modality that is not one of `modalities`.
    """

    def __init__(self, options: SigmoidOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities, {"bias": options.bias} if options.learn_bias else {})
        self.sigmoid = options
        if modalities is not None:
            modality_pairs(options, modalities, "sigmoid")

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One term a pair."""
        pairs = modality_pairs(self.sigmoid, embeddings.vectors, "sigmoid")
        mean_over = "" if self.sigmoid.reduce == "sum" else "pairs"
        like = next(iter(embeddings.vectors.values()))
        bias = torch.tensor([self.sigmoid.bias], dtype=like.dtype, device=like.device)
        learned = {
            "scale": 1 / self.temperature(scalars, like),
            "bias": scalars["bias"].to(like.dtype) if self.sigmoid.learn_bias else bias,
        }
        return [
            SigmoidCrossEntropy(
                name=f"sigmoid/{a}-{b}",
                weight=1.0,
                mean_over=mean_over,
                pairs=cosine_pairs(
                    embeddings, side(embeddings, a), side(embeddings, b), learned, self.sigmoid.tile, CosineScore()
                ),
            )
            for a, b in pairs
        ]


OBJECTIVE = Sigmoid
