"""Under ZeRO-3 a module's weights are gathered when it is called, so all ranks must make the same calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain.collectives import World
from pretrain.engine import Engine
from pretrain.grad_cache import GradCache
from pretrain.model import PretrainModel
from pretrain.towers.build import parameter_groups
from tests.exactness.cells import Cell
from tests.exactness.problem import WEIGHT_DECAY, read_batches, run_config, write_datasets
from tests.ranks import run_ranks

NUM_CHUNKS = 4


def record_calls(world: World, folder: str) -> list[dict[str, Any]]:
    """Names of the modules that were called in the passes of two steps, and the modalities that this rank had."""
    cell = Cell(group="", ranks=world.size, stage=3, chunks=NUM_CHUNKS, masks="ragged")
    config = run_config(cell, Path(folder))
    model = PretrainModel(config)
    engine = Engine(model, parameter_groups(model, WEIGHT_DECAY), config, world)
    engine.train(True)
    calls: dict[str, list[str]] = {}
    current: list[str] = []

    def note(name: str, *_: Any) -> None:
        current.append(name)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        current.clear()
        yield
        calls[name] = list(current)

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(note, name))
    cache = GradCache(engine=engine, world=world, chunk=config.train.chunk, seed=config.seed, stage=stage)
    found = []
    for step, batch in enumerate(read_batches(config, cell.masks, world)[:2], 1):
        cache.backward(batch, step)
        engine.step(0.1)
        here = [name for name, mask in batch.present.items() if mask.any()]
        found.append({"here": here, "pass_1": calls["pass_1"], "pass_2": calls["pass_2"]})
    engine.close()
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rank_calls_the_same_modules_in_both_passes_whatever_it_lacks(tmp_path: Path, size: int) -> None:
    write_datasets(tmp_path)
    ranks = run_ranks("tests.test_module_calls:record_calls", size, tmp_path / "ranks", str(tmp_path))
    first, second = zip(*ranks, strict=True)
    assert first[0]["here"] == ["video", "audio", "text"]
    assert "audio" not in first[-1]["here"], "the last rank must lack a modality altogether"
    assert size == 2 or second[-1]["here"] == [], "the last of four ranks must lack everything"
    wanted = first[0]["pass_1"]
    for name in ("video", "audio", "text"):
        assert wanted.count(f"towers.towers.{name}.projection") == NUM_CHUNKS
    for step in (first, second):
        for rank in step:
            assert rank["pass_1"] == wanted
            assert rank["pass_2"] == wanted
