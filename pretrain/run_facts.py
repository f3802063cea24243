"""What a run is besides its config: its ranks, parameters and samples. RUN/run.json, of its newest start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.shards import write_json

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
