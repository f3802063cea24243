"""InfoNCE between pairs of modalities: all pairs, named pairs, or one anchor with each other (CLIP, ImageBind).

A side of a pair may be a sum such as `video+audio`: the normalised sum of the modalities a sample has of them.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pretrain.objective_config import InfonceOptions, KernelOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.modalities import Mask, Vectors, modality_pairs, side
from pretrain.objectives.scores import CosineScore
from pretrain.objectives.terms import CrossEntropy, Objective, Pairs, Term


class Infonce(Objective):
    """Sum (or mean) over pairs of the symmetric cross entropy of cosines / temperature.

    A pair's term counts the samples that have both sides; a pair that no sample has adds 0. `within` adds, of each
    side of a pair, half the cross entropy of its augmented view among those of all samples of the pair: with two
    modalities and 1 that is the sum of CyCLIP's four contrasts over two.

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
            left, right = side(embeddings, a), side(embeddings, b)
            contrast = self._contrast(f"{a}-{b}", embeddings, left, right, scalars)
            terms.append(replace(contrast, mean_over=mean_over))
            if self.infonce.within:
                both = left[1] & right[1]
                terms += self._within(f"{a}-{b}", (a, b), embeddings, both, scalars)
        return terms

    def _within(
        self, place: str, pair: tuple[str, str], embeddings: Embeddings, both: Mask, scalars: dict[str, Tensor]
    ) -> list[Term]:
        """Each side of a pair with its own augmented view."""
        augmented = embeddings.view("augmented", "infonce.within")
        terms: list[Term] = []
        for number, name in enumerate(pair):
            (rows, there), (again, also_there) = side(embeddings, name), side(augmented, name)
            views = (rows, there & both), (again, also_there & both)
            contrast = self._contrast(f"{place}/{name}-augmented", embeddings, *views, scalars)
            group = "" if self.infonce.reduce == "sum" else f"within {number}"
            terms.append(replace(contrast, weight=self.infonce.within, column_weight=0.0, mean_over=group))
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
        score = cosine_score(self.infonce)
        return CrossEntropy(
            name=f"infonce/{place}",
            weight=1.0,
            pairs=cosine_pairs(embeddings, left, right, {"scale": scale}, self.infonce.tile, score),
            label_smoothing=self.infonce.label_smoothing,
        )


def cosine_score(options: KernelOptions) -> CosineScore:
    """Cosines scored as the options say."""
    return CosineScore(kernel=options.kernel, negatives_precision=options.negatives_precision)


def cosine_pairs(
    embeddings: Embeddings,
    left: tuple[Vectors, Mask],
    right: tuple[Vectors, Mask],
    scalars: dict[str, Tensor],
    tile: int,
    score: CosineScore,
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
