"""Training objectives, one file a paper: `build_objective(name, **options)` and `WeightedSum` of several."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from data_pipeline.settings import UserError, check_settings, nearest
from pretrain.objective_config import OPTIONS, Options
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.terms import LearnedScalars, Objective, ObjectiveOutput, Term, positive_cosines

__all__ = ["Embeddings", "Objective", "ObjectiveOutput", "WeightedSum", "build_objective"]


def build_objective(name: str, *, modalities: tuple[str, ...] | None = None, **options: Any) -> Objective:
    """The objective registered as `name` (its file's name) with its options.

    Args:
        name: a file of this folder: "gram", "infonce", "pmrl", ...
        modalities: the names the run has, to check names in options; None checks them when called.

    Raises:
        UserError: unknown name or option, with the nearest valid one.
    """
    if name not in OPTIONS:
        raise UserError(f"objective '{name}': unknown; {nearest(name, OPTIONS)}")
    checked = check_settings(OPTIONS[name], {"name": name, **options}, f"objective {name}")
    return _build(name, checked, modalities)


def _build(name: str, options: Options, modalities: tuple[str, ...] | None) -> Objective:
    built = importlib.import_module(f"pretrain.objectives.{name}").OBJECTIVE(options, modalities)
    assert isinstance(built, Objective)
    return built


class WeightedSum(nn.Module):
    """Several objectives as one: terms are concatenated, their weights multiplied, and cosines of positives added.

    Args:
        configs: options of each objective, as in a run's config.
        modalities: names the run has.
    """

    def __init__(self, configs: Sequence[Options], modalities: tuple[str, ...]) -> None:
        super().__init__()
        parts = [_build(config.name, config, modalities) for config in configs]
        self.parts = nn.ModuleList(parts)
        names = [part.name for part in parts]
        # As the config counts them where one occurs twice: infonce.0, infonce.2.
        self.labels = [name if names.count(name) == 1 else f"{name}.{index}" for index, name in enumerate(names)]
        self.scalars = _JoinedScalars([part.scalars for part in parts])

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """All terms; `scalars` are those that `self.scalars()` returns."""
        return [*self.loss_terms(embeddings, scalars), *positive_cosines(embeddings)]

    def loss_terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """The terms that have a weight."""
        return [
            dataclasses.replace(
                term,
                name=_relabelled(term.name, part.name, self.labels[index]),
                weight=term.weight * part.options.weight,
                mean_over=f"{index}.{term.mean_over}" if term.mean_over else "",
            )
            for index, (part, own) in enumerate(self._with_scalars(scalars))
            for term in part.terms(embeddings, own)
        ]

    def learned_values(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """{"temperature/gram": 0.07}: what each learned scalar stands at, for the log."""
        return {
            f"{name}/{label}": value
            for label, (part, own) in zip(self.labels, self._with_scalars(scalars), strict=True)
            for name, value in part.learned_values(own).items()
        }

    def _with_scalars(self, scalars: dict[str, Tensor]) -> Iterator[tuple[Objective, dict[str, Tensor]]]:
        for index, part in enumerate(self.parts):
            assert isinstance(part, Objective)
            prefix = f"{index}."
            yield part, {name.removeprefix(prefix): v for name, v in scalars.items() if name.startswith(prefix)}


def _relabelled(term: str, name: str, label: str) -> str:
    """infonce/text-video as infonce.2/text-video; terms that do not bear the objective's name stay."""
    return label + term.removeprefix(name) if term == name or term.startswith(f"{name}/") else term


class _JoinedScalars(nn.Module):
    """The scalars of several objectives as one dict, keys prefixed by the position of the objective."""

    def __init__(self, parts: list[LearnedScalars]) -> None:
        super().__init__()
        self.parts = parts  # a plain list: the parameters are registered by the objectives themselves

    def forward(self) -> dict[str, Tensor]:
        return {f"{index}.{name}": value for index, part in enumerate(self.parts) for name, value in part().items()}
