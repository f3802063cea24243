"""InfoNCE between pairs of modalities: all pairs, named pairs, or one anchor with each other (CLIP, ImageBind).

A side of a pair may be a sum such as `video+audio`: the normalised sum of the modalities a sample has of them.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pretrain.objective_config import InfonceOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.modalities import Mask, Vectors, modality_pairs, side
from pretrain.objectives.scores import CosineScore
from pretrain.objectives.terms import CrossEntropy, Objective, Pairs, Term


class Infonce(Objective):
    """Sum (or mean) over pairs of the symmetric cross entropy of cosines / temperature.

    A pair's term counts the samples that have both sides; a pair that no sample has adds 0. `within` adds, of each
    modality, the cross entropy of its augmented view among those of all samples.

    Raises:
        UserError: a pair or the anchor names a modality that is not one of `modalities`.
    """

    def __init__(self, options: InfonceOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.infonce = options
        if modalities is not None:
            modality_pairs(options, modalities, "infonce")

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One contrast a pair."""
        pairs = modality_pairs(self.infonce, embeddings.vectors, "infonce")
        mean_over = "" if self.infonce.reduce == "sum" else "pairs"
        terms: list[Term] = []
        for a, b in pairs:
            contrast = self._contrast(f"{a}-{b}", embeddings, side(embeddings, a), side(embeddings, b), scalars)
            terms.append(replace(contrast, mean_over=mean_over))
        if self.infonce.within:
            augmented = embeddings.view("augmented", "infonce.within")
            for name in embeddings.vectors:
                views = side(embeddings, name), side(augmented, name)
                contrast = self._contrast(f"{name}-augmented", embeddings, *views, scalars)
                terms.append(replace(contrast, weight=self.infonce.within, row_weight=1.0, column_weight=0.0))
        return terms

    def _contrast(
        self,
        place: str,
        embeddings: Embeddings,
        left: tuple[Vectors, Mask],
        right: tuple[Vectors, Mask],
        scalars: dict[str, Tensor],
    ) -> CrossEntropy:
        scale = 1 / self.temperature(scalars, left[0])
        score = CosineScore(kernel=self.infonce.kernel, negatives_precision=self.infonce.negatives_precision)
        return CrossEntropy(
            name=f"infonce/{place}",
            weight=1.0,
            pairs=cosine_pairs(embeddings, left, right, {"scale": scale}, self.infonce.tile, score),
            label_smoothing=self.infonce.label_smoothing,
        )


def cosine_pairs(
    embeddings: Embeddings,
    left: tuple[Vectors, Mask],
    right: tuple[Vectors, Mask],
    scalars: dict[str, Tensor],
    tile: int,
    score: CosineScore = CosineScore(),
) -> Pairs:
    """Every left vector against every right one: <left_i, right_j> * scale + bias, of the samples that have both.

    scalars: "scale", and "bias" where there is one.
    """
    return Pairs(
        rows={"left": left[0]},
        columns={"right": right[0]},
        scalars=scalars,
        matched=(left[0] * right[0]).sum(dim=1) * scalars["scale"] + scalars.get("bias", 0.0),
        valid=left[1] & right[1],
        ids=embeddings.sample_ids(),
        score=score,
        tile=tile,
    )


OBJECTIVE = Infonce
