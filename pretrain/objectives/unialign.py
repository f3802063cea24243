"""UniAlign: modalities are spread apart from themselves and pulled to an anchor, by separate terms (arXiv 2602.09507).

With the kernel kappa(x, y) = exp(-|x - y|^2 / (2 width^2)):

    uniformity   of each modality: log of the mean of kappa over all pairs ("joint"), or the mean over samples of its
                 log-mean ("entropy"); the sources leave open which. The pair of a sample with itself counts.
    alignment    mean squared distance of the anchor to the other modalities of its sample
    volume       mean determinant of the Gram matrix of a sample: its modalities' volume, squared. No negatives.
    centroid     uniformity of the centroids of the samples

The metric `unialign/divergence`, if asked for, is Hoelder's: (1 / k) sum_m log int p_m^k - log int prod_m p_m, which is
>= 0 for densities, and 0 where all are one. By kernel density estimates at the samples that have all modalities; where
there is none, it is not shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.objective_config import UnialignOptions
from pretrain.objectives.centrobind import centroids
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.gram_schmidt import orthonormal_axes
from pretrain.objectives.modalities import Mask, Vectors, by_arity, num_present, others_of
from pretrain.objectives.terms import LogMeanExp, LogMeanProduct, Objective, Pairs, PerSample, Rows, Term, TermSum


class Unialign(Objective):
    """w_uniformity * sum_m U(Z_m) + w_alignment * L_align + w_volume * L_volume + w_centroid * U(C).

    Samples without the anchor, or with nothing else, are dropped.

    Raises:
        UserError: `anchor` is not one of `modalities`; more modalities than dimensions.
    """

    def __init__(self, options: UnialignOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.unialign = options
        if modalities is not None:
            others_of(options.anchor, modalities, "unialign")

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """The four parts, and the divergence as a metric."""
        options = self.unialign
        others = others_of(options.anchor, embeddings.vectors, "unialign")
        valid = embeddings.mask(options.anchor) & (num_present(embeddings) >= 2)
        middle, _ = centroids(embeddings, normalize=False)
        terms: list[Term] = [
            self._uniformity(embeddings, name, embeddings.rows(name), embeddings.mask(name) & valid)
            for name in embeddings.vectors
        ]
        volume = self._volume(embeddings, valid)
        terms += [self._alignment(embeddings, others, valid), volume]
        terms += by_arity("squared_volume", volume.values, num_present(embeddings), valid, len(embeddings.vectors))
        terms.append(self._uniformity(embeddings, "centroid", middle, valid))
        return [*terms, self._divergence(embeddings)] if options.divergence else terms

    def _uniformity(self, embeddings: Embeddings, name: str, rows: Vectors, valid: Mask) -> LogMeanExp:
        options = self.unialign
        is_centroid = name == "centroid"
        width = options.centroid_width if is_centroid else options.kernel_width
        return LogMeanExp(
            name=f"unialign/uniformity-{name}",
            weight=options.weights.centroid if is_centroid else options.weights.uniformity,
            pairs=(kernel_pairs(embeddings, rows, rows, valid, 1 / (2 * width**2), options.tile, same=True),),
            over="pairs" if options.uniformity == "joint" else "rows",
        )

    def _alignment(self, embeddings: Embeddings, others: Sequence[str], valid: Mask) -> PerSample:
        """Over a sample's other modalities, then over samples: those that have few weigh no less."""
        anchor = embeddings.rows(self.unialign.anchor)
        distances = torch.stack([(anchor - embeddings.rows(name)).square().sum(dim=1) for name in others], dim=1)
        there = torch.stack([embeddings.mask(name) for name in others], dim=1)
        values = (distances * there).sum(dim=1) / there.sum(dim=1).clamp_min(1)
        weight = self.unialign.weights.alignment
        return PerSample(name="unialign/alignment", weight=weight, values=values, valid=valid)

    def _volume(self, embeddings: Embeddings, valid: Mask) -> PerSample:
        vectors = [embeddings.rows(name) for name in embeddings.vectors]
        if vectors[0].shape[1] < len(vectors):
            raise UserError(
                f"objective unialign: {len(vectors)} modalities in {vectors[0].shape[1]} dimensions; "
                "expected dim >= modalities"
            )
        _, volume = orthonormal_axes(vectors, [embeddings.mask(name) for name in embeddings.vectors])
        weight = self.unialign.weights.volume
        return PerSample(name="unialign/volume", weight=weight, values=volume.square(), valid=valid)

    def _divergence(self, embeddings: Embeddings) -> TermSum:
        names = list(embeddings.vectors)
        everything = num_present(embeddings) == len(names)
        sharpness = 1 / (2 * self.unialign.kernel_width**2)

        def density(at: str, of: str) -> Pairs:
            rows, columns = embeddings.rows(at).detach(), embeddings.rows(of).detach()
            return kernel_pairs(embeddings, rows, columns, everything, sharpness, self.unialign.tile, same=at == of)

        power = len(names) - 1.0
        own = [LogMeanProduct(name=name, weight=1.0, pairs=(density(name, name),), power=power) for name in names]
        anchor = self.unialign.anchor
        others = tuple(density(anchor, name) for name in names if name != anchor)
        joint = LogMeanProduct(name="joint", weight=1.0, pairs=others)
        parts = (*((1 / len(names), term) for term in own), (-1.0, joint))
        return TermSum(name="unialign/divergence", weight=0.0, parts=parts)


def kernel_pairs(
    embeddings: Embeddings, rows: Vectors, columns: Vectors, valid: Mask, sharpness: float, tile: int, *, same: bool
) -> Pairs:
    """Logarithms of exp(-sharpness |x_i - y_j|^2) for every row x and column y. same: rows are columns."""
    distances = torch.zeros_like(rows[:, 0]) if same else (rows - columns).square().sum(dim=1)
    return Pairs(
        rows={"row": rows},
        columns={"column": columns},
        scalars={"sharpness": rows.new_tensor([sharpness])},
        matched=-sharpness * distances,
        valid=valid,
        ids=embeddings.sample_ids(),
        score=kernel_logarithms,
        tile=tile,
    )


def kernel_logarithms(rows: Rows, columns: Rows, scalars: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
    """-sharpness |x_i - y_j|^2, at most 0"""
    x, y = rows["row"], columns["column"]
    squared = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1) - 2 * (x @ y.T)
    return squared.clamp_min(0) * -scalars["sharpness"]


OBJECTIVE = Unialign
