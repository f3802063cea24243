"""The folder of a run that was not trained: its config, and a checkpoint of its model's random weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.settings import load_settings
from data_pipeline.shards import ShardedDataset, file_sha256, write_json
from pretrain.checkpoint import FORMAT_VERSION, Progress
from pretrain.config import RunConfig
from pretrain.data.loader import EvalLoader
from pretrain.grad_cache import no_stage
from pretrain.identity import Identity
from pretrain.model import PretrainModel
from pretrain.stored_tensors import persistent_buffers
from tests.tiny_dataset import SAMPLE_RATE_HZ

Rows = dict[str, Tensor]
STEP = 3


def run_config(run: Path, dataset: Path, objective: str = "gram", **towers: dict[str, Any]) -> RunConfig:
    """A run of three small towers under an objective; each further keyword's keys replace those of a tower."""
    encoder = {"width": 16, "depth": 1, "num_heads": 2}
    audio = {"encoder": encoder, "num_mels": 32, "hop_s": 0.02, "sample_rate_hz": SAMPLE_RATE_HZ}
    return RunConfig.model_validate(
        {
            "run_dir": str(run),
            "data": {"train": {"path": str(dataset), "split": "train"}, "window_s": 1.0, "num_workers": 0},
            "towers": {
                "video": {"encoder": encoder, "num_frames": 3, "size_px": 32, **towers.get("video", {})},
                "audio": {**audio, **towers.get("audio", {})},
                "text": {"encoder": encoder, "max_tokens": 16, **towers.get("text", {})},
            },
            "embedding_dim": 12,
            "objective": [{"name": objective}],
            "schedule": {"num_steps": STEP},
            "train": {"global_batch": 4, "chunk": 4},
        }
    )


def write_run(run: Path, dataset: Path, objective: str = "gram", **towers: dict[str, Any]) -> PretrainModel:
    """Write the run; returns its model in evaluation mode."""
    config = run_config(run, dataset, objective, **towers)
    model = PretrainModel(config)
    folder = run / "checkpoints" / f"step-{STEP:08d}"
    folder.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    tensors = {f"weight/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"buffer/{name}": value for name, value in persistent_buffers(model).items()}
    save_file(tensors, folder / "state-00000.safetensors")
    description = {
        "format_version": FORMAT_VERSION,
        "shapes": {},
        "progress": asdict(Progress(step=STEP)),
        "identity": asdict(Identity.of(config, ShardedDataset(dataset, "train").digest)),
        "files": {"state-00000.safetensors": file_sha256(folder / "state-00000.safetensors")},
    }
    write_json(folder / "checkpoint.json", description)
    return model.eval()


@torch.no_grad()
def live_embeddings(model: PretrainModel, run: Path, dataset: Path, split: str = "train") -> tuple[Rows, Rows]:
    """Embeddings and presence of a split as an evaluation computes them, in batches of 4."""
    config = load_settings(RunConfig, run / "config.yaml")
    towers = config.towers
    vectors: dict[str, list[Tensor]] = {name: [] for name in towers.names}
    present: dict[str, list[Tensor]] = {name: [] for name in towers.names}
    for batch in EvalLoader(ShardedDataset(dataset, split), config.data, towers, batch_size=4):
        found, _ = model(batch.inputs, batch.present, around=no_stage)
        for name in towers.names:
            vectors[name].append(found[name])
            present[name].append(batch.present[name])
    return {k: torch.cat(v) for k, v in vectors.items()}, {k: torch.cat(v) for k, v in present.items()}
