"""The module that is trained: towers, and the objective's learned scalars, behind one forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from pretrain.config import RunConfig
from pretrain.objectives import WeightedSum
from pretrain.randomness import keyed_random
from pretrain.towers.build import ModelConfig, Towers


class PretrainModel(nn.Module):
    """Towers of `config` with weights drawn from its seed (or published ones), and its objectives."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        with keyed_random(config.seed, "weights"):
            self.towers = Towers(ModelConfig.of(config))
        self.average = copy.deepcopy(self.towers).requires_grad_(False) if config.train.ema_decay else None
        self.objective = WeightedSum(config.objective, config.towers.names)
        self.augmented_by_average = config.train.second_view_by == "average"

    @property
    def evaluated(self) -> Towers:
        """The towers to evaluate and to take away: the average where the run keeps one."""
        return self.towers if self.average is None else self.average

    def forward(
        self,
        inputs: dict[str, dict[str, Tensor]],
        present: dict[str, Tensor],
        around: Callable[[str], AbstractContextManager[None]],
        *,
        augmented: dict[str, dict[str, Tensor]] | None = None,
        evaluated: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeddings {modality: [n, D]}, fp32 unit rows, and learned scalars {name: [1]}.

        augmented: inputs of a second view, whose embeddings come as {modality@augmented: [n, D]}, without gradients
        where the average of the towers makes them. `around(tower)` is entered for each tower call; it sets the random
        generators. evaluated: by those towers.
        """
        towers = self.evaluated if evaluated else self.towers
        embeddings = towers(inputs, present, around)
        if augmented is not None:
            again = self.evaluated if self.augmented_by_average else self.towers
            views = again(augmented, present, lambda tower: around(f"{tower}@augmented"))
            embeddings |= {_as_view(name, "augmented"): rows for name, rows in views.items()}
        return embeddings, self.objective.scalars()


def _as_view(name: str, view: str) -> str:
    """video -> video@augmented, video@independent -> video@augmented@independent"""
    modality, at, rest = name.partition("@")
    return f"{modality}@{view}{at}{rest}"
