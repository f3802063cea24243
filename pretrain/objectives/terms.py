"""What an objective is made of: learned scalars and terms of a loss. No rank, no group, no cache.

An objective prepares each sample on its own, says how a tile of rows scores against a tile of columns, and how scores
are reduced. `pretrain.pairwise` evaluates the terms, in one process or over ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from pretrain.objective_config import ObjectiveOptions
from pretrain.objectives.embeddings import Embeddings

Rows = dict[str, Tensor]  # per-sample tensors [n, ...] by name
Score = Callable[[Rows, Rows, dict[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Cross entropy of the matched column among all columns, and of the matched row among all rows; their mean.

    rows, columns: per-sample tensors of the local samples. score(rows [r], columns [c], scalars) -> logits [r, c].
    positive: logits [n] of the matched pairs, computed apart so that they may be more precise. valid [n]: samples that
    take part. ids [n]: equal ids are not negatives; -1 differs from everything.
    Label smoothing ls: lse_j L_ij - (1 - ls) L_ii - ls mean_j L_ij, over the valid j that are not duplicates of i.
    """

    name: str
    weight: float
    rows: Rows
    columns: Rows
    scalars: dict[str, Tensor]
    positive: Tensor
    valid: Tensor
    ids: Tensor
    score: Score
    label_smoothing: float
    tile: int


@dataclass(frozen=True, kw_only=True)
class PerSample:
    """The mean of `values` [n] over the samples where `valid` [n]. Weight 0: a metric only."""

    name: str
    weight: float
    values: Tensor
    valid: Tensor


Term = Contrast | PerSample


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
