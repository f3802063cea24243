"""The truth: one process, no gradient cache, no DeepSpeed; the loss in float64 from its formula; torch's optimizers."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.model import PretrainModel
from pretrain.objective_config import TemperatureOptions
from pretrain.objectives import Objective
from pretrain.randomness import keyed_random
from pretrain.towers.build import parameter_groups
from tests.exactness.cells import GLOBAL_BATCH, MICRO_CHUNK, Cell
from tests.exactness.problem import (
    REFERENCE_OPTIONS,
    WEIGHT_DECAY,
    learning_rate,
    read_batches,
    run_config,
)
from tests.objectives.references import REFERENCES, Case


@dataclass(frozen=True, kw_only=True)
class Trained:
    """losses: of each step. gradients: of the first, by parameter. weights: after the last. movement: how far they
    went, as an L2 distance. num_reductions: gradient reductions a step."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    movement: float = 0.0
    num_reductions: float = 1.0


def reference_path(folder: Path, cell: Cell) -> Path:
    """The file with the reference of a cell."""
    single = cell.single
    parts = (single.objective, single.masks, single.optimizer, single.precision, single.dropout, single.grad_clip)
    return folder / ("reference-" + "-".join(map(str, parts)).replace(" ", "_") + ".safetensors")


def write_references(world: World, argument: tuple[str, list[dict[str, object]]]) -> None:
    """The files of the given cells (as dicts), each once."""
    folder = Path(argument[0])
    for fields in argument[1]:
        cell = Cell(**fields)  # type: ignore[arg-type]
        if not reference_path(folder, cell).exists():
            print(f"one process: {reference_path(folder, cell).stem}", flush=True)
            _save(reference_path(folder, cell), train_plainly(cell.single, folder))


def _save(path: Path, found: Trained) -> None:
    tensors = {f"gradient/{name}": value for name, value in found.gradients.items()}
    tensors |= {f"weight/{name}": value for name, value in found.weights.items()}
    scalars = json.dumps({"losses": found.losses, "movement": found.movement})
    save_file(tensors, path, metadata={"scalars": scalars})


def read_reference(path: Path) -> Trained:
    """What `write_references` wrote."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        scalars = json.loads(file.metadata()["scalars"])
    parts = {
        part: {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
        for part in ("gradient/", "weight/")
    }
    return Trained(gradients=parts["gradient/"], weights=parts["weight/"], **scalars)


def train_plainly(cell: Cell, folder: Path) -> Trained:
    """Five steps of autograd over all samples in one graph, of which the towers see `cell.chunk` at once."""
    config = run_config(cell, folder)
    model = PretrainModel(config).train()
    if cell.precision == "fp64":
        model.double()
    groups = parameter_groups(model, WEIGHT_DECAY)
    lr = learning_rate(cell)
    optimizer = (
        torch.optim.AdamW(groups, lr=lr, betas=config.optimizer.betas, eps=config.optimizer.eps)
        if cell.optimizer == "adamw"
        else torch.optim.SGD(groups, lr=lr)
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    losses, gradients = [], {}
    for step, batch in enumerate(read_batches(config, cell.masks, World()), 1):
        optimizer.zero_grad()
        with double_for_float() if cell.precision == "fp64" else nullcontext():
            loss = plain_loss(model, batch, config, cell, step)
            loss.backward()
        for p in trained.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if step == 1:
            gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        if cell.grad_clip:
            nn.utils.clip_grad_norm_(trained.values(), cell.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    weights = {name: p.detach() for name, p in trained.items()}
    movement = torch.stack([(weights[name] - start[name]).double().norm() for name in weights]).norm().item()
    return Trained(losses=losses, gradients=gradients, weights=weights, movement=movement)


def plain_loss(model: PretrainModel, batch: Batch, config: RunConfig, cell: Cell, step: int) -> Tensor:
    """The loss of a global batch. With dropout, the samples of a micro-chunk go through the towers together."""
    size = MICRO_CHUNK if cell.dropout else cell.chunk
    parts = []
    for number, start in enumerate(range(0, GLOBAL_BATCH, size)):
        inputs, present = batch.chunk(start, start + size)
        draws = partial(_draws, config.seed, step, f"{number}.0")
        parts.append(model(inputs, present, draws, augmented=batch.augmented_chunk(start, start + size))[0])
    outputs = {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}
    views = ("", "@augmented", "@independent", "@augmented@independent")
    groups = [{n: outputs[f"{n}{view}"] for n in config.towers.names if f"{n}{view}" in outputs} for view in views]
    case = Case(
        vectors=groups[0], augmented=groups[1], independent=groups[2], independent_augmented=groups[3],
        present=batch.present, ids=batch.ids,
    )  # fmt: skip
    losses = [_formula(objective, case) for objective in model.objective.parts if isinstance(objective, Objective)]
    return torch.stack(losses).sum()


def _formula(objective: Objective, case: Case) -> Tensor:
    """The value of an objective as its options and learned scalars are now."""
    scalars, like = objective.scalars(), next(iter(case.vectors.values()))
    learned: dict[str, Tensor | float] = {}
    if isinstance(objective.options, TemperatureOptions):
        learned["temperature"] = objective.temperature(scalars, like)[0]
    if "bias" in scalars:
        learned["bias"] = scalars["bias"][0].double()
    if "log_logit_scale" in scalars:
        learned["ratio"] = scalars["log_logit_scale"][0].double().exp()
    return REFERENCES[objective.name](case, **learned, **REFERENCE_OPTIONS.get(objective.name, {}))


def double_for_float() -> AbstractContextManager[object]:
    """Where the towers ask for float32 they get float64."""
    return mock.patch.object(Tensor, "float", Tensor.double)


def _draws(seed: int, step: int, number: str, tower: str) -> AbstractContextManager[None]:
    return keyed_random(seed, step, tower, number)
