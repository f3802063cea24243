"""InfoNCE between pairs of modalities: all pairs, named pairs, or one anchor with each other (CLIP, ImageBind).

A side of a pair may be a sum such as `video+audio`: the normalised sum of the modalities a sample has of them.
"""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.settings import UserError, nearest
from pretrain.objective_config import InfonceOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.terms import CrossEntropy, Objective, Pairs, Rows, Term


class Infonce(Objective):
    """Sum (or mean) over pairs of the symmetric cross entropy of cosines / temperature.

    A pair's term counts the samples that have both sides; a pair that no sample has adds 0.

    Raises:
        UserError: a pair or the anchor names a modality that is not one of `modalities`.
    """

    def __init__(self, options: InfonceOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.infonce = options
        if modalities is not None:
            self._pairs(modalities)

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One contrast a pair."""
        pairs = self._pairs(tuple(embeddings.vectors))
        weight = 1.0 if self.infonce.reduce == "sum" else 1 / len(pairs)
        return [self._contrast(a, b, weight, embeddings, scalars) for a, b in pairs]

    def _contrast(
        self, a: str, b: str, weight: float, embeddings: Embeddings, scalars: dict[str, Tensor]
    ) -> CrossEntropy:
        (left, left_valid), (right, right_valid) = side(embeddings, a), side(embeddings, b)
        scale = 1 / self.temperature(scalars, left)
        return CrossEntropy(
            name=f"infonce/{a}-{b}",
            weight=weight,
            pairs=Pairs(
                rows={"left": left},
                columns={"right": right},
                scalars={"scale": scale},
                matched=(left * right).sum(dim=1) * scale,
                valid=left_valid & right_valid,
                ids=embeddings.sample_ids(),
                score=cosine_logits,
                tile=self.infonce.tile,
            ),
            label_smoothing=self.infonce.label_smoothing,
        )

    def _pairs(self, modalities: tuple[str, ...]) -> list[tuple[str, str]]:
        if self.infonce.pairs != "all":
            pairs = list(self.infonce.pairs)
        elif self.infonce.anchor is not None:
            pairs = [(self.infonce.anchor, name) for name in modalities if name != self.infonce.anchor]
        else:
            pairs = list(combinations(modalities, 2))
        for name in (name for pair in pairs for one in pair for name in one.split("+")):
            if name not in modalities:
                raise UserError(f"objective infonce: modality '{name}'; {nearest(name, modalities)}")
        return pairs


def side(embeddings: Embeddings, name: str) -> tuple[Float[Tensor, "samples dim"], Bool[Tensor, " samples"]]:
    """Vectors and validity of one side of a pair: a modality, or the normalised sum of several ("video+audio")."""
    names = name.split("+")
    if len(names) == 1:
        return embeddings.rows(name), embeddings.mask(name)
    total = torch.stack([embeddings.rows(one) for one in names]).sum(dim=0)
    squared = total.square().sum(dim=1)
    usable = squared > torch.finfo(total.dtype).eps
    length = torch.where(usable, squared, torch.ones_like(squared)).sqrt()
    return torch.where(usable[:, None], total / length[:, None], torch.zeros_like(total)), usable


def cosine_logits(rows: Rows, columns: Rows, scalars: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
    """<left_i, right_j> / temperature"""
    return rows["left"] @ columns["right"].T * scalars["scale"]


OBJECTIVE = Infonce
