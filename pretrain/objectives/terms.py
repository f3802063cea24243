"""What an objective is made of: learned scalars and terms of a loss. No rank, no group, no cache.

An objective prepares each sample on its own, says how a tile of rows scores against a tile of columns (`Pairs`), and
how the scores are reduced (the kind of the term). `pretrain.pairwise` evaluates terms, in one process or over ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.objective_config import ObjectiveOptions, Options, TemperatureOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.scores import Rows, TileScore

Score = TileScore | Callable[[Rows, Rows, dict[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Every sample as a row against every sample of the global batch as a column.

    rows, columns: per-sample tensors of the local samples; they may differ. score(rows [r], columns [c], scalars) ->
    [r, c], with finite gradients where a row or a column is all zeros: a `TileScore`, or a function that autograd can
    differentiate. valid [n]: samples that take part, as rows and
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
    mean_over: str = ""


@dataclass(frozen=True, kw_only=True)
class SigmoidCrossEntropy:
    """SigLIP: -(1 / N) sum_ij log sigmoid(y_ij s_ij), y = 1 for matched pairs, -1 for others (arXiv 2303.15343).

    The learned scale and bias are scalars of the score.
    """

    name: str
    weight: float
    pairs: Pairs
    mean_over: str = ""


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
    mean_over: str = ""


@dataclass(frozen=True, kw_only=True)
class LogMeanProduct:
    """log mean_i prod_g (mean_j exp(s^g_ij))^power, over the samples that are valid in all pairs g; j includes i."""

    name: str
    weight: float
    pairs: tuple[Pairs, ...]
    power: float = 1.0
    mean_over: str = ""


@dataclass(frozen=True, kw_only=True)
class PairSum:
    """(1 / Z) sum_ij s_ij; Z is the number of valid samples, or of pairs. matched: whether the pairs (i, i) count."""

    name: str
    weight: float
    pairs: Pairs
    normalizer: Literal["samples", "pairs"] = "samples"
    matched: bool = True
    mean_over: str = ""


@dataclass(frozen=True, kw_only=True)
class TupleCrossEntropy:
    """Softmax cross entropy of a row's own tuple among tuples of the other modalities (Symile, arXiv 2411.01053).

    score of row i with a tuple (j, l, ...): scale * sum_d row_id other^1_jd other^2_ld ... A tuple of other samples
    takes part where all its members are there; one that is all of the row's own item is not counted. In the own tuple
    of a sample a missing member is the vector of all `fill`; a modality that no sample has is left out of all.

    row [n, D], valid [n]: those that take part; others, there: {modality: [n, D]} and {modality: [n]}; ids [n] as in
    `Pairs`; scale [1]. candidates "all": every tuple, at most `max_tuples`; "shuffled": as many as the rarest modality
    has samples, each modality in an order drawn from its name and all ids of the global batch by hashing. tile: rows
    and tuples scored at once.
    """

    name: str
    weight: float
    row: Tensor
    valid: Tensor
    others: dict[str, Tensor]
    there: dict[str, Tensor]
    fill: float
    ids: Tensor
    scale: Tensor
    candidates: Literal["all", "shuffled"]
    max_tuples: int
    tile: int
    mean_over: str = ""


@dataclass(frozen=True, kw_only=True)
class PerSample:
    """The mean of `values` [n] over the samples where `valid` [n]. Weight 0: a metric only."""

    name: str
    weight: float
    values: Tensor
    valid: Tensor
    mean_over: str = ""


@dataclass(frozen=True, kw_only=True)
class TermSum:
    """The sum of factor * value over terms, whose own weights do not count."""

    name: str
    weight: float
    parts: tuple[tuple[float, LogMeanExp | LogMeanProduct | PairSum | PerSample], ...]
    mean_over: str = ""


# mean_over: a name shared by terms whose weights are divided by how many of them have samples.
Term = (
    CrossEntropy | SigmoidCrossEntropy | LogMeanExp | LogMeanProduct | PairSum | TupleCrossEntropy | PerSample | TermSum
)


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
    """Base of all objectives: learned scalars, a temperature among them where the options have one, and `terms`.

    Args:
        options: its own, see `pretrain.objective_config`.
        modalities: names the run has, to check names in options; None checks them when called.
        learned: further scalars by name, and what they begin with.
    """

    def __init__(
        self,
        options: Options,
        modalities: tuple[str, ...] | None = None,
        learned: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        self.name = options.name
        self.scalars = LearnedScalars(_initial_temperature(options) | dict(learned or {}))

    def temperature(self, scalars: dict[str, Tensor], like: Tensor) -> Tensor:
        """[1]: log-temperature moves between the logarithms of the range by a sigmoid, so it stays inside and the
        gradient is exact everywhere (a clamp has none outside, and an unbounded one can cross zero)."""
        options = self.options
        assert isinstance(options, TemperatureOptions)
        if "temperature" not in scalars:
            return torch.tensor([options.temperature], dtype=like.dtype, device=like.device)
        learned = scalars["temperature"].to(like.dtype)
        if options.temperature_form == "divided":
            return learned
        low, high = (math.log(limit) for limit in options.temperature_range)
        return (low + (high - low) * learned.sigmoid()).exp()

    def learned_values(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """What each learned scalar stands at, in the unit of its option, for the log."""
        return {
            name: (self.temperature(scalars, value) if name == "temperature" else value).item()
            for name, value in scalars.items()
        }

    @abstractmethod
    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """The terms of the loss for the local samples; every per-sample tensor has one row a sample."""

    def forward(self, embeddings: Embeddings) -> ObjectiveOutput:
        """Loss and metrics of `embeddings` in this process; double in, double out; half precision is raised to single,
        under autocast, too."""
        from pretrain.pairwise import evaluate_terms

        device = next(iter(embeddings.vectors.values())).device
        with torch.autocast(device.type, enabled=False):
            terms = [
                replace(term, weight=term.weight * self.options.weight)
                for term in self.terms(embeddings.at_least_single(), self.scalars())
            ]
            value = evaluate_terms(terms)
        return ObjectiveOutput(loss=value.local_loss, metrics=value.metrics)


def _initial_temperature(options: ObjectiveOptions) -> dict[str, float]:
    if not isinstance(options, TemperatureOptions) or not options.learn_temperature:
        return {}
    if options.temperature_form == "divided":
        return {"temperature": options.temperature}
    low, high = (math.log(limit) for limit in options.temperature_range)
    share = (math.log(options.temperature) - low) / (high - low)
    return {"temperature": math.log(share / (1 - share))}


def positive_cosines(embeddings: Embeddings) -> list[Term]:
    """Metrics `positive_cosine/A-B`: mean cosine of matched pairs, always shown: volumes are blind to its sign."""
    terms: list[Term] = []
    for a, b in combinations(embeddings.vectors, 2):
        values = torch.linalg.vecdot(embeddings.rows(a).detach(), embeddings.rows(b).detach())
        valid = embeddings.mask(a) & embeddings.mask(b)
        terms.append(PerSample(name=f"positive_cosine/{a}-{b}", weight=0.0, values=values, valid=valid))
    return terms
