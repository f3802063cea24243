"""Evaluation over ranks that have different numbers of batches, with a model whose weights lie on all of them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from data_pipeline.shards import ShardedDataset
from pretrain.collectives import World
from pretrain.data.loader import EvalLoader
from pretrain.engine import Engine
from pretrain.evaluate import embed_split
from pretrain.grad_cache import no_stage
from pretrain.model import PretrainModel
from pretrain.towers.build import parameter_groups
from tests.exactness.cells import Cell
from tests.exactness.problem import WEIGHT_DECAY, run_config
from tests.ranks import run_ranks
from tests.small_dataset import write_dataset

NUM_SAMPLES = 5


def embed(world: World, argument: tuple[str, int, int]) -> dict[str, list[float] | list[int]]:
    """The embeddings of the first samples, one a batch, as this rank knows them."""
    folder, stage, num_samples = argument
    config = run_config(Cell(group="", ranks=world.size, stage=stage), Path(folder))
    dataset = ShardedDataset(Path(folder) / "ragged", "train")
    model = PretrainModel(config)
    engine = Engine(model, parameter_groups(model, WEIGHT_DECAY), config, world)
    engine.train(False)
    loader = EvalLoader(
        dataset, config.data, config.towers, batch_size=1, rank=world.rank, world=world.size, max_samples=num_samples
    )
    with closing(loader):
        vectors, _, positions = embed_split(
            lambda inputs, masks: engine(inputs, masks, around=no_stage)[0], loader, config, world
        )
    engine.close()
    return {"positions": positions.tolist(), **{name: rows.flatten().tolist() for name, rows in vectors.items()}}


# Of two ranks one has none, or one less.
@pytest.mark.parametrize("num_samples", [pytest.param(1, marks=pytest.mark.slow), NUM_SAMPLES])
def test_ranks_may_have_different_numbers_of_batches(tmp_path: Path, num_samples: int) -> None:
    """Under ZeRO-3 every call gathers weights: a rank that makes one less, or in another order, hangs them all."""
    write_dataset(tmp_path / "ragged", {"train": NUM_SAMPLES})
    (alone,) = run_ranks("tests.test_evaluate:embed", 1, tmp_path / "alone", (str(tmp_path), 0, num_samples))
    ranks = run_ranks("tests.test_evaluate:embed", 2, tmp_path / "two", (str(tmp_path), 3, num_samples), 120.0)
    for found in ranks:
        assert found["positions"] == alone["positions"] == list(range(num_samples))
        for name in ("video", "audio", "text"):
            assert torch.allclose(torch.tensor(found[name]), torch.tensor(alone[name]), atol=1e-6)
