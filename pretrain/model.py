"""The module that is trained: towers, and the objective's learned scalars, behind one forward."""

from __future__ import annotations

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
        self.objective = WeightedSum(config.objective, config.towers.names)

    def forward(
        self,
        inputs: dict[str, dict[str, Tensor]],
        present: dict[str, Tensor],
        around: Callable[[str], AbstractContextManager[None]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeddings {modality: [n, D]}, fp32 unit rows, and learned scalars {name: [1]}.

        `around(tower)` is entered for each tower call; it sets the random generators.
        """
        return self.towers(inputs, present, around), self.objective.scalars()
