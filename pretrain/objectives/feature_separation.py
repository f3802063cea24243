"""Deep feature separation: what modalities do not share has embeddings of its own (arXiv 2303.05952, section 3.2).

Each modality has a second, independent projection z^i beside its embedding z. Of a pair (V, T), summed:

    orthogonal   mean_j(<z_Vj, z^i_Vj>^2 + <z_Tj, z^i_Tj>^2)
    contrast     of each independent embedding with that of the augmented view, V to V^a and T to T^a
    uniformity   log (1 / N) sum_jk [G(z^i_Vj, z^i_Vk) + G(z^i_Tj, z^i_Tk)], G = exp(-t |u - v|^2); j = k counts, and
                 the divisor is N as printed, not N^2

The paper prints <z^i, z^i> as the numerator of the contrast, which is 1; the augmented view stands there in its code's
base (CyCLIP), and here. With more than two modalities, which the paper does not treat, terms are added over pairs.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.objective_config import FeatureSeparationOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.infonce import cosine_pairs, cosine_score
from pretrain.objectives.modalities import Mask, Vectors, modality_pairs, side
from pretrain.objectives.terms import CrossEntropy, LogMeanExp, Objective, PerSample, Term
from pretrain.objectives.unialign import kernel_pairs


class FeatureSeparation(Objective):
    """Sum (or mean) over pairs of the three terms.

    Needs the views "augmented" (a second augmentation) and "independent" (the second projections) of `Embeddings`; the
    augmented view has an independent one, too.

    Raises:
        UserError: a pair or the anchor names no modality; a view is missing.
    """

    def __init__(self, options: FeatureSeparationOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.separation = options
        if modalities is not None:
            modality_pairs(options, modalities, self.name)

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """Three kinds of terms a pair."""
        independent = embeddings.view("independent", self.name)
        augmented = embeddings.view("augmented", self.name).view("independent", self.name)
        mean = self.separation.reduce == "mean"
        terms: list[Term] = []
        for pair in modality_pairs(self.separation, embeddings.vectors, self.name):
            own = [side(independent, name) for name in pair]
            again = [side(augmented, name) for name in pair]
            shared = [side(embeddings, name) for name in pair]
            valid = shared[0][1] & shared[1][1]
            place = "-".join(pair)
            terms.append(self._orthogonal(place, shared, own, valid, mean))
            for number, views in enumerate(zip(own, again, strict=True)):
                group = f"contrast {number}" if mean else ""
                terms.append(self._contrast(embeddings, f"{place}/{pair[number]}", views, valid, scalars, group))
            terms.append(self._uniformity(embeddings, place, own, valid, mean))
        return terms

    def _orthogonal(
        self, place: str, shared: list[tuple[Vectors, Mask]], own: list[tuple[Vectors, Mask]], valid: Mask, mean: bool
    ) -> PerSample:
        cosines = [(a * b).sum(dim=1) for (a, _), (b, _) in zip(shared, own, strict=True)]
        return PerSample(
            name=f"feature_separation/orthogonal/{place}",
            weight=self.separation.weights.orthogonal,
            values=cosines[0].square() + cosines[1].square(),
            valid=valid,
            mean_over="orthogonal" if mean else "",
        )

    def _contrast(
        self,
        embeddings: Embeddings,
        place: str,
        views: tuple[tuple[Vectors, Mask], tuple[Vectors, Mask]],
        valid: Mask,
        scalars: dict[str, Tensor],
        mean_over: str,
    ) -> CrossEntropy:
        (left, left_valid), (right, right_valid) = views
        scale = {"scale": 1 / self.temperature(scalars, left)}
        return CrossEntropy(
            name=f"feature_separation/contrast/{place}",
            weight=self.separation.weights.contrast,
            pairs=cosine_pairs(
                embeddings,
                (left, left_valid & valid),
                (right, right_valid & valid),
                scale,
                self.separation.tile,
                cosine_score(self.separation),
            ),
            row_weight=1.0,
            column_weight=0.0,
            mean_over=mean_over,
        )

    def _uniformity(
        self, embeddings: Embeddings, place: str, own: list[tuple[Vectors, Mask]], valid: Mask, mean: bool
    ) -> LogMeanExp:
        sharpness, tile = self.separation.uniformity_t, self.separation.tile
        return LogMeanExp(
            name=f"feature_separation/uniformity/{place}",
            weight=self.separation.weights.uniformity,
            pairs=tuple(
                kernel_pairs(embeddings, rows, rows, there & valid, sharpness, tile, same=True) for rows, there in own
            ),
            normalizer="samples",
            mean_over="uniformity" if mean else "",
        )


OBJECTIVE = FeatureSeparation
