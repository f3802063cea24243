"""Comparisons that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from data_pipeline.settings import check_settings
from pretrain.compare.config import CompareConfig


def small_values(out_dir: Path, **changes: Any) -> dict[str, Any]:
    """Two objectives, two seeds, modalities of a few numbers; `changes` replace keys of the top level."""
    return {
        "out_dir": str(out_dir),
        "seeds": [0, 1],
        "baseline": "infonce",
        "experiment": {
            "name": "synthetic",
            "generator": {
                "name": "mixture", "num_modalities": [3], "num_components": 4, "latent_dim": 4, "observed_dim": 8,
                "num_train": 64, "num_test": 40,
            },
            "encoder": {"hidden_dim": 16, "embedding_dim": 8},
            "budget": {"num_steps": 4, "batch": 16, "warmup_steps": 1},
        },
        "objectives": [
            {"label": "infonce", "objective": [{"name": "infonce"}]},
            {"label": "gram", "objective": [{"name": "gram", "anchor": "best"}]},
        ],
    } | changes  # fmt: skip


def small_config(out_dir: Path, **changes: Any) -> CompareConfig:
    """The same, checked."""
    return check_settings(CompareConfig, small_values(out_dir, **changes), "small.yaml")


def write_small(out_dir: Path, path: Path, **changes: Any) -> Path:
    """The same, as a file."""
    path.write_text(yaml.safe_dump(small_values(out_dir, **changes)), encoding="utf-8")
    return path
