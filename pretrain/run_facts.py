"""What a run is besides its config: its ranks, parameters and samples. RUN/run.json, of its newest start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from data_pipeline.shards import write_json
from pretrain.collectives import World
from pretrain.config import RunConfig

NAME = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Derived numbers of a run. parameters: by part of the model (towers.video, ...)."""

    num_ranks: int
    device: str
    parameters: dict[str, int]
    num_trained_parameters: int
    num_train_samples: int
    num_validation_samples: int | None

    @classmethod
    def of(
        cls, model: nn.Module, config: RunConfig, world: World, num_train_samples: int, num_held_out: int | None
    ) -> RunFacts:
        """Facts of a run whose model is still whole. The average of the towers is not counted."""
        parts = dict.fromkeys((*config.towers.names, "objective"), 0)
        for name, parameter in model.named_parameters():
            if not name.startswith("average."):
                parts[name.split(".")[2] if name.startswith("towers.") else "objective"] += parameter.numel()
        on_gpu = world.device.type == "cuda"
        return cls(
            num_ranks=world.size,
            device=torch.cuda.get_device_name(world.device) if on_gpu else "CPU",
            parameters=parts,
            num_trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            num_train_samples=num_train_samples,
            num_validation_samples=None if num_held_out is None else min(num_held_out, config.validation.max_samples),
        )

    def write(self, run: Path) -> None:
        """Write RUN/run.json, whole or not at all."""
        write_json(run / NAME, asdict(self))

    @classmethod
    def read(cls, run: Path) -> RunFacts | None:
        """What is in RUN/run.json; None when a run has none, or one of another version."""
        try:
            return cls(**json.loads((run / NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
