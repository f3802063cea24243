"""Geometric consistency: distances between samples are the same in every modality (arXiv 2303.05952, section 3.4).

Of a pair (V, T), with <.,.> the cosine and ^a the augmented view:

    (1 / N) sum_jk [(<V_j, T_k> - <V_k, T_j>)^2 + (<V_j, V_k> - <T_j, T_k>)^2]
    (1 / N) sum_jk [(<V_j, V_k> - <V^a_j, V^a_k>)^2 + (<T_j, T_k> - <T^a_j, T^a_k>)^2]
    (1 / N) sum_j (<V_j, T_j> - <V^a_j, T^a_j>)^2

The first line over N is CyCLIP's (arXiv 2205.14459), which weighs it 0.25; 1 / N as printed grows with the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.objective_config import GeometricConsistencyOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.modalities import Mask, Vectors, modality_pairs, side
from pretrain.objectives.terms import Objective, Pairs, PairSum, PerSample, Rows, Score, Term


class GeometricConsistency(Objective):
    """Sum (or mean) over pairs. Needs the view "augmented" unless `augmented` is false.

    Two samples with the same id are no pair.

    Raises:
        UserError: a pair or the anchor names no modality; the view is missing.
    """

    def __init__(self, options: GeometricConsistencyOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.geometry = options
        if modalities is not None:
            modality_pairs(options, modalities, self.name)

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One sum over pairs of samples; with augmented views another, and one over samples."""
        terms: list[Term] = []
        for a, b in modality_pairs(self.geometry, embeddings.vectors, self.name):
            (left, left_valid), (right, right_valid) = side(embeddings, a), side(embeddings, b)
            valid = left_valid & right_valid
            vectors = {"left": left, "right": right}
            terms.append(self._sum("pairs", f"{a}-{b}", embeddings, vectors, valid, cross_differences))
            if not self.geometry.augmented:
                continue
            view = embeddings.view("augmented", self.name)
            (left_again, left_there), (right_again, right_there) = side(view, a), side(view, b)
            valid = valid & left_there & right_there
            vectors |= {"left again": left_again, "right again": right_again}
            terms.append(self._sum("augmented", f"{a}-{b}", embeddings, vectors, valid, view_differences))
            terms.append(self._matched("matched", f"{a}-{b}", vectors, valid))
        return terms

    def _sum(
        self, kind: str, place: str, embeddings: Embeddings, vectors: dict[str, Vectors], valid: Mask, score: Score
    ) -> PairSum:
        return PairSum(
            name=f"geometric_consistency/{kind}/{place}",
            weight=1.0,
            pairs=Pairs(
                rows=vectors,
                columns=vectors,
                scalars={},
                valid=valid,
                ids=embeddings.sample_ids(),
                score=score,
                tile=self.geometry.tile,
            ),
            normalizer=self.geometry.normalizer,
            mean_over=kind if self.geometry.reduce == "mean" else "",
        )

    def _matched(self, kind: str, place: str, vectors: dict[str, Vectors], valid: Mask) -> PerSample:
        now = (vectors["left"] * vectors["right"]).sum(dim=1)
        again = (vectors["left again"] * vectors["right again"]).sum(dim=1)
        return PerSample(
            name=f"geometric_consistency/{kind}/{place}",
            weight=1.0,
            values=(now - again).square(),
            valid=valid,
            mean_over=kind if self.geometry.reduce == "mean" else "",
        )


def cross_differences(rows: Rows, columns: Rows, scalars: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
    """(<V_j, T_k> - <V_k, T_j>)^2 + (<V_j, V_k> - <T_j, T_k>)^2; on the diagonal 0, for unit vectors."""
    across = rows["left"] @ columns["right"].T - rows["right"] @ columns["left"].T
    within = rows["left"] @ columns["left"].T - rows["right"] @ columns["right"].T
    return across.square() + within.square()


def view_differences(rows: Rows, columns: Rows, scalars: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
    """(<V_j, V_k> - <V^a_j, V^a_k>)^2 + (<T_j, T_k> - <T^a_j, T^a_k>)^2"""
    differences = [
        rows[name] @ columns[name].T - rows[f"{name} again"] @ columns[f"{name} again"].T for name in ("left", "right")
    ]
    return torch.stack([difference.square() for difference in differences]).sum(dim=0)


OBJECTIVE = GeometricConsistency
