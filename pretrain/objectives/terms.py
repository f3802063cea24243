"""What an objective is made of: learned scalars and terms of a loss. No rank, no group, no cache.

An objective prepares each sample on its own, says how a tile of rows scores against a tile of columns (`Pairs`), and
how the scores are reduced (the kind of the term). `pretrain.pairwise` evaluates terms, in one process or over ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.objective_config import ObjectiveOptions
from pretrain.objectives.embeddings import Embeddings

Rows = dict[str, Tensor]  # per-sample tensors [n, ...] by name
Score = Callable[[Rows, Rows, dict[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Every sample as a row against every sample of the global batch as a column.

    rows, columns: per-sample tensors of the local samples; they may differ. score(rows [r], columns [c], scalars) ->
    [r, c], with finite gradients where a row or a column is all zeros. valid [n]: samples that take part, as rows and
    as columns; nothing behind a false one has an effect. ids [n]: two samples with the same id are the same item, their
    pair is never counted; -1 differs from everything. So a duplicate adds its own pairs and changes no other's.
    matched: scores [n] of the pairs (i, i) where they can be had more precisely than in a tile; None: the tile's.
    tile: rows and columns scored at once; memory, never the result, depends on it.
    """

    rows: Rows
    columns: Rows
    scalars: dict[str, Tensor]
    score: Score
    valid: Tensor
    ids: Tensor
    tile: int
    matched: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Softmax cross entropy of the matched pair among all pairs of its row, and among all pairs of its column.

    mean_i[ row_weight * CE_i(s_i.) + column_weight * CE_i(s_.i) ]; a weight of 0 leaves a direction out. Label
    smoothing ls: CE_i = lse_j s_ij - (1 - ls) s_ii - ls mean_j s_ij, over i itself and the j counted with it.
    """

    name: str
    weight: float
    pairs: Pairs
    label_smoothing: float = 0.0
    row_weight: float = 0.5
    column_weight: float = 0.5


@dataclass(frozen=True, kw_only=True)
class SigmoidCrossEntropy:
    """SigLIP: -(1 / N) sum_ij log sigmoid(y_ij s_ij), y = 1 for matched pairs, -1 for others (arXiv 2303.15343).

    The learned scale and bias are scalars of the score.
    """

    name: str
    weight: float
    pairs: Pairs


@dataclass(frozen=True, kw_only=True)
class LogMeanExp:
    """Logarithm of a mean of exp(score), for one or several scores.

    over "pairs": log sum_g (1 / Z_g) sum_ij exp(s^g_ij). over "rows": mean_i log sum_g (1 / Z_gi) sum_j exp(s^g_ij),
    over the rows that have a pair. Z is how many pairs there are (in g; in row i of g), or, with normalizer "samples",
    how many valid samples g has. matched: whether the pairs (i, i) count. Without any pair the term is 0.
    """

    name: str
    weight: float
    pairs: tuple[Pairs, ...]
    over: Literal["pairs", "rows"] = "pairs"
    normalizer: Literal["pairs", "samples"] = "pairs"
    matched: bool = True


@dataclass(frozen=True, kw_only=True)
class PairSum:
    """(1 / Z) sum_ij s_ij; Z is the number of valid samples, or of pairs. matched: whether the pairs (i, i) count."""

    name: str
    weight: float
    pairs: Pairs
    normalizer: Literal["samples", "pairs"] = "samples"
    matched: bool = True


@dataclass(frozen=True, kw_only=True)
class PerSample:
    """The mean of `values` [n] over the samples where `valid` [n]. Weight 0: a metric only."""

    name: str
    weight: float
    values: Tensor
    valid: Tensor


Term = CrossEntropy | SigmoidCrossEntropy | LogMeanExp | PairSum | PerSample


class LearnedScalars(nn.Module):
    """Parameters of shape (1,) by name. Called, it returns them as fresh tensors.

    They are outputs of a module call so that their gradients enter through the same hooked backward as the towers'.
    """

    def __init__(self, initial: Mapping[str, float]) -> None:
        super().__init__()
        self.values = nn.ParameterDict({name: nn.Parameter(torch.tensor([v])) for name, v in initial.items()})

    def forward(self) -> dict[str, Tensor]:
        """{name: [1]}"""
        return {name: value.clone() for name, value in self.values.items()}


@dataclass(frozen=True, kw_only=True)
class ObjectiveOutput:
    """Loss (a scalar over the global batch) and named scalar metrics."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module, ABC):
    """Base of all objectives: a temperature, learned or fixed, and `terms`."""

    def __init__(self, options: ObjectiveOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.options = options
        self.name = type(self).__name__.lower()
        low, high = (math.log(limit) for limit in options.temperature_range)
        share = (math.log(options.temperature) - low) / (high - low)
        learned = {"temperature": math.log(share / (1 - share))} if options.learn_temperature else {}
        self.scalars = LearnedScalars(learned)

    def temperature(self, scalars: dict[str, Tensor], like: Tensor) -> Tensor:
        """[1]: log-temperature moves between the logarithms of the range by a sigmoid, so it stays inside and the
        gradient is exact everywhere (a clamp has none outside, and an unbounded one can cross zero)."""
        if "temperature" not in scalars:
            return torch.tensor([self.options.temperature], dtype=like.dtype, device=like.device)
        low, high = (math.log(limit) for limit in self.options.temperature_range)
        return (low + (high - low) * scalars["temperature"].to(like.dtype).sigmoid()).exp()

    @abstractmethod
    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """The terms of the loss for the local samples; every per-sample tensor has one row a sample."""

    def forward(self, embeddings: Embeddings) -> ObjectiveOutput:
        """Loss and metrics of `embeddings` in this process; double in, double out."""
        from pretrain.pairwise import evaluate_terms

        value = evaluate_terms(self.terms(embeddings, self.scalars()))
        return ObjectiveOutput(loss=value.local_loss, metrics=value.metrics)


def positive_cosines(embeddings: Embeddings) -> list[Term]:
    """Metrics `positive_cosine/A-B`: mean cosine of matched pairs, always shown: volumes are blind to its sign."""
    terms: list[Term] = []
    for a, b in combinations(embeddings.vectors, 2):
        values = (embeddings.rows(a).detach() * embeddings.rows(b).detach()).sum(dim=1)
        valid = embeddings.mask(a) & embeddings.mask(b)
        terms.append(PerSample(name=f"positive_cosine/{a}-{b}", weight=0.0, values=values, valid=valid))
    return terms
