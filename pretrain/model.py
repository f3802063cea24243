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
        evaluated: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeddings {modality: [n, D]}, fp32 unit rows, and learned scalars {name: [1]}.

        `around(tower)` is entered for each tower call; it sets the random generators. evaluated: by those towers.
        """
        towers = self.evaluated if evaluated else self.towers
        return towers(inputs, present, around), self.objective.scalars()
