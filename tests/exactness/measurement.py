"""A cell as the trainer computes it (loader, towers, gather, gradient cache, DeepSpeed), and how far off it is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.collectives import World
from pretrain.data.batch import Batch
from pretrain.engine import Engine
from pretrain.grad_cache import GradCache
from pretrain.model import PretrainModel
from pretrain.towers.build import parameter_groups
from tests.exactness.cells import Cell
from tests.exactness.problem import WEIGHT_DECAY, learning_rate, read_batches, run_config
from tests.exactness.reference import Trained, read_reference, reference_path, train_plainly

REDUCTIONS = ("allreduce", "reduce_scatter", "reduce_")  # of torch.ops.c10d


class ReducedElements(TorchDispatchMode):
    """Counts the elements that this process hands to collectives that add."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d" and name.lstrip("_").startswith(REDUCTIONS):
            self.count += _num_elements(args[1] if "scatter" in name else args[0])
        return func(*args, **(kwargs or {}))


def _num_elements(tensors: Any) -> int:
    return tensors.numel() if isinstance(tensors, Tensor) else sum(map(_num_elements, tensors))


class CountingEngine(Engine):
    """An engine that sees what goes over the wire while gradients are made."""

    reduced_elements = 0

    @contextmanager
    def coalesced(self) -> Iterator[None]:
        with ReducedElements() as reduced:
            with super().coalesced():
                yield
        self.reduced_elements += reduced.count


class RecklessEngine(CountingEngine):
    """Several backwards a step, as DeepSpeed takes them without being told that they belong together."""

    @contextmanager
    def coalesced(self) -> Iterator[None]:
        self._inside = True
        with ReducedElements() as reduced:
            yield
        self._inside = False
        self.reduced_elements += reduced.count


class ForgetfulWorld(World):
    """Gathers without gradient, as published trainers do."""

    def gather_rows(self, local: Tensor) -> Tensor:
        return super().gather_rows(local.detach())


def measure_cells(world: World, argument: tuple[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Measures of each cell (given as dicts), in order; the references lie in the folder. Prints a line a cell."""
    folder = Path(argument[0])
    batches: dict[tuple[str, bool], list[Batch]] = {}
    references: dict[Path, Trained] = {}
    found = []
    for number, fields in enumerate(argument[1], 1):
        started, cell, path = time.monotonic(), Cell(**fields), reference_path(folder, Cell(**fields))
        config = run_config(cell, folder)
        kind = cell.masks, "augmented" in config.views
        if kind not in batches:
            batches[kind] = read_batches(config, cell.masks, world)
        if path not in references:
            references[path] = read_reference(path)
        trained = train_plainly(cell, folder) if cell.plain else train(cell, world, folder, batches[kind])
        found.append(compare(trained, references[path]))
        if world.rank == 0:
            print(
                f"{cell.ranks} ranks, {number} of {len(argument[1])}: ZeRO {cell.stage}, {cell.chunks} chunks, "
                f"{cell.objective}, {cell.masks}: gradient {found[-1]['gradient']:.1e}, "
                f"weights {found[-1]['weights']:.1e}, {time.monotonic() - started:.1f} s",
                flush=True,
            )
    return found


def train(cell: Cell, world: World, folder: Path, batches: Sequence[Batch]) -> Trained:
    """Five steps of a cell, as the trainer takes them."""
    config = run_config(cell, folder)
    model = PretrainModel(config)
    engine_type = RecklessEngine if cell.fault == "no coalescing" else CountingEngine
    engine = engine_type(model, parameter_groups(model, WEIGHT_DECAY), config, world)
    num_elements = sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.trainable())
    engine.train(True)
    gathering = ForgetfulWorld(rank=world.rank, size=world.size) if cell.fault == "gather without gradient" else world
    if cell.fault == "factor of world size":
        engine.world = replace(world, size=1)
    seed = config.seed + (cell.fault == "other draws")
    cache = GradCache(engine=engine, world=gathering, chunk=config.train.chunk, seed=seed)
    losses, gradients = [], {}
    for step, batch in enumerate(batches, 1):
        losses.append(cache.backward(batch, step)["loss"])
        if step == 1:
            gradients = {name: engine.full_gradient(parameter).clone() for name, parameter in engine.trainable()}
        assert engine.step(learning_rate(cell)).applied
    weights = {name: engine.full_weight(parameter).clone() for name, parameter in engine.trainable()}
    reduced = engine.reduced_elements / num_elements if world.size > 1 else engine.num_reductions
    engine.close()
    return Trained(losses=losses, gradients=gradients, weights=weights, num_reductions=reduced / len(batches))


def compare(found: Trained, wanted: Trained) -> dict[str, float | str]:
    """Relative differences, by column of the table."""
    weights_off, weights_size = _distance(found.weights, wanted.weights)
    losses, right = (torch.tensor(trained.losses, dtype=torch.float64) for trained in (found, wanted))
    size = right.abs().clamp_min(1e-2 * right.abs().max())  # a loss may pass through 0
    return {
        "loss": ((losses - right).abs() / size).max().item(),  # NaN where one is NaN
        **compare_gradients(found.gradients, wanted.gradients),
        "weights": weights_off / weights_size,
        "movement": weights_off / wanted.movement,
        "reductions": found.num_reductions,
    }


def compare_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float | str]:
    """Relative difference over all parameters; the worst parameter's against its own size (or 1e-3 of all)."""
    error, size = _distance(found, wanted)
    by_name = {
        name: (found[name].double() - wanted[name].double()).norm().item()
        / max(wanted[name].double().norm().item(), 1e-3 * size)
        for name in wanted
    }
    worst = max(by_name, key=lambda name: by_name[name])
    return {"gradient": error / size, "worst_tensor": by_name[worst], "worst_name": worst}


def _distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, float]:
    """|found - wanted| and |wanted| over all tensors."""
    assert found.keys() == wanted.keys()
    errors = [(found[name].double() - wanted[name].double()).norm() for name in wanted]
    return torch.stack(errors).norm().item(), torch.stack([w.double().norm() for w in wanted.values()]).norm().item()


def worst_over_ranks(by_rank: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measures of one cell: of each the largest that any rank has seen; not-a-number counts as largest."""

    def size(value: float) -> tuple[bool, float]:
        return value != value, value

    worst = max(by_rank, key=lambda rank: size(rank["worst_tensor"]))
    numbers = [key for key in worst if key != "worst_name"]
    return {key: max((rank[key] for rank in by_rank), key=size) for key in numbers} | {
        "worst_name": worst["worst_name"]
    }
