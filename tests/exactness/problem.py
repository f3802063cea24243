"""What every cell of the table computes: a tiny run on real shards, and its five global batches."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.shards import ShardedDataset
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.data.loader import TrainLoader
from tests.exactness.cells import GLOBAL_BATCH, Cell, Masks
from tests.small_dataset import write_dataset

NUM_STEPS, POSITION = 5, 40  # the batches cross the borders of epochs
LEARNING_RATE = {"sgd": 0.1, "adamw": 1e-3}
WEIGHT_DECAY = 0.05
# Where they are not the defaults; and what the references call them.
OBJECTIVE_OPTIONS: dict[str, dict[str, Any]] = {
    "gram": {"label_smoothing": 0.1},
    "infonce": {"label_smoothing": 0.1},
    "symile": {"candidates": "all"},
    "pmrl": {"value_temperature": 0.5, "temperature": 0.5},  # at its own, the loss turns 1e-8 of the weights into 1e-5
}
REFERENCE_OPTIONS = {name: OBJECTIVE_OPTIONS[name] for name in ("gram", "infonce", "pmrl")}
EMPTY_ROWS = slice(12, 16)  # of the second batch: nothing is there, so the last of four ranks has no sample at all


def write_datasets(folder: Path) -> None:
    """Real media: one dataset where samples lack modalities, one where none does."""
    write_dataset(folder / "ragged", {"train": 23})
    write_dataset(folder / "complete", {"train": 23}, complete=True)


def learning_rate(cell: Cell) -> float:
    """Smaller where a loss falls by orders of magnitude in five steps, and what is left of it is rounding."""
    known = {"gram", "infonce"}.issuperset(cell.objective.split("+"))
    return LEARNING_RATE[cell.optimizer] * (1 if known else 0.1)


def run_config(cell: Cell, folder: Path) -> RunConfig:
    """The run of a cell, on a dataset that `write_datasets` put into `folder`; augmentation is on."""
    dropout = 0.2 if cell.dropout else 0.0
    encoder: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2, "dropout": dropout}
    video = {**encoder, "patch_dropout": 0.5 if cell.dropout else 0.0}
    dataset = folder / ("complete" if cell.masks == "all present" else "ragged")
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "seed": 3,
            "data": {
                "train": {"path": str(dataset), "split": "train"},
                "window_s": 0.75,
                "num_workers": 0,
                "augment": {"crop_scale": (0.5, 0.9), "flip": True, "brightness": 0.2, "gain_db": 6.0},
            },
            "towers": {
                "video": {"encoder": video, "num_frames": 2, "size_px": 32},
                "audio": {"encoder": {**encoder, "time_stride": 8}, "num_mels": 32, "hop_s": 0.02},
                "text": {"encoder": encoder, "max_tokens": 16},
            },
            "embedding_dim": 12,
            "objective": [{"name": name, **OBJECTIVE_OPTIONS.get(name, {})} for name in cell.objective.split("+")],
            "optimizer": {"name": cell.optimizer, "lr": learning_rate(cell), "weight_decay": WEIGHT_DECAY},
            "schedule": {"num_steps": NUM_STEPS},
            "train": {
                "global_batch": GLOBAL_BATCH,
                "chunk": cell.chunk,
                "zero_stage": cell.stage,
                "offload_optimizer": cell.offload,
                "grad_clip": cell.grad_clip,
                "precision": "bf16" if cell.precision == "bf16" else "fp32",
            },
        }
    )


def read_batches(config: RunConfig, masks: Masks, world: World) -> list[Batch]:
    """This rank's rows of five consecutive global batches, as the loader reads and augments them."""
    dataset = ShardedDataset(config.data.train[0].path, config.data.train[0].split)
    loader = TrainLoader(
        dataset, config.data, config.towers, global_batch=GLOBAL_BATCH, seed=config.seed, rank=world.rank,
        world=world.size, start_position=POSITION, second_view="augmented" in config.views,
    )  # fmt: skip
    with closing(loader):
        batches = list(islice(loader, NUM_STEPS))
    return [_hide(batch, _kept(masks, number), world) for number, batch in enumerate(batches)]


def _kept(masks: Masks, number: int) -> dict[str, Tensor]:
    """Rows of global batch `number` that keep what they have, by modality."""
    kept = {name: torch.ones(GLOBAL_BATCH, dtype=torch.bool) for name in ("video", "audio", "text")}
    if masks == "no audio":
        kept["audio"][:] = False
    if masks == "ragged":
        draws = torch.Generator().manual_seed(number)
        kept = {name: torch.rand(GLOBAL_BATCH, generator=draws) > 0.2 for name in kept}
        kept["audio"][GLOBAL_BATCH // 2 :] &= number != 0  # whole ranks lack it
        if number == 1:
            for mask in kept.values():
                mask[EMPTY_ROWS] = False
    return kept


def _hide(batch: Batch, kept: dict[str, Tensor], world: World) -> Batch:
    rows = slice(world.rank * batch.num_samples, (world.rank + 1) * batch.num_samples)
    return replace(batch, present={name: mask & kept[name][rows] for name, mask in batch.present.items()})
