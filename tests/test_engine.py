"""The engine under every ZeRO stage: gradients, clipping, updates and moments are those of plain torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.engine import Engine
from tests.ranks import run_ranks

CELLS = [(0, False), *((stage, offload) for stage in (1, 2, 3) for offload in (False, True))]
SAMPLES = 8


def run_config(**train: Any) -> RunConfig:
    """A config of which the engine reads the optimizer and `train` only."""
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "data": {"train": {"path": "unused", "split": "train"}},
            "towers": {"video": {}, "text": {}},
            "objective": [{"name": "gram"}],
            "schedule": {"num_steps": 3},
            "train": {"global_batch": SAMPLES, **train},
        }
    )


class Toy(nn.Module):
    """A tower, a head and a learned scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.tower(rows).tanh()) * self.scale.clone()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def make(
    stage: int, grad_clip: float, world: World, offload: bool = False, optimizer: str = "adamw"
) -> tuple[Engine, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Toy()
    rows = torch.randn(SAMPLES, 5)
    reference = copy.deepcopy(model)  # before ZeRO 3 takes the weights apart
    config = run_config(zero_stage=stage, grad_clip=grad_clip, offload_optimizer=offload)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"name": optimizer})})
    return Engine(model, groups(model), config, world), reference, rows


def local(rows: Tensor, world: World) -> Tensor:
    return rows.chunk(world.size)[world.rank]


def check_stages(world: World, argument: Any) -> dict[str, dict[str, float]]:
    """For each stage: worst differences from torch over three clipped AdamW steps, and after a resume."""
    found = {}
    for stage, offload in CELLS:
        engine, reference, rows = make(stage, 0.5, world, offload)
        optimizer = torch.optim.AdamW(groups(reference), lr=1e-3, betas=(0.9, 0.98))
        gradient_error = norm_error = weight_error = 0.0
        for _ in range(3):
            with engine.coalesced():
                for chunk in local(rows, world).split(3):  # the last one is short
                    engine.backward(engine(chunk).square().sum())
            optimizer.zero_grad()
            reference(rows).square().sum().backward()
            wanted = dict(reference.named_parameters())
            for name, parameter in engine.trainable():
                gradient = wanted[name].grad
                assert gradient is not None
                error = (engine.full_gradient(parameter) - gradient).norm() / gradient.norm()
                gradient_error = max(gradient_error, error.item())
            norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            norm_error = max(norm_error, abs(engine.step(1e-3).grad_norm / norm.item() - 1))
            optimizer.step()
            for name, parameter in engine.trainable():
                weight_error = max(weight_error, (engine.full_weight(parameter) - wanted[name]).abs().max().item())
        found[f"{stage}{' offloaded' if offload else ''}"] = {
            "gradient": gradient_error,
            "norm": norm_error,
            "weight": weight_error,
            "reductions": engine.num_reductions,
            "resumed": resumed_difference(engine, stage, rows, world),
        }
        engine.close()
    return found


def resumed_difference(engine: Engine, stage: int, rows: Tensor, world: World) -> float:
    """One more step of `engine`, and of an engine of every other stage that took over its state: largest difference."""
    weights = {name: engine.full_weight(p).clone() for name, p in engine.trainable()}
    moments = {f"{k}/{name}": v.clone() for name, p in engine.trainable() for k, v in engine.moments(p).items()}
    heir_model = Toy()
    heir_model.load_state_dict(weights)
    heir = Engine(heir_model, groups(heir_model), run_config(zero_stage=(stage + 1) % 4, grad_clip=0.5), world)
    heir.set_moments(moments, 3)
    for one in (engine, heir):
        with one.coalesced():
            one.backward(one(local(rows, world)).square().sum())
        one.step(1e-3)
    worst = 0.0
    for (_, a), (_, b) in zip(engine.trainable(), heir.trainable(), strict=True):
        worst = max(worst, (engine.full_weight(a) - heir.full_weight(b)).abs().max().item())
        for key in engine.moment_names:
            worst = max(worst, (engine.moments(a)[key] - heir.moments(b)[key]).abs().max().item())
    heir.close()
    return worst


def check_skips(world: World, argument: Any) -> dict[str, dict[str, bool]]:
    """One rank's gradient is not a number in the second of three steps: what that step left, and what the third did."""
    found = {}
    for stage, offload in CELLS:
        for optimizer in ("adamw", "sgd"):
            engine, _, rows = make(stage, 0.5, world, offload, optimizer)
            heir, _, _ = make(stage, 0.5, world, offload, optimizer)
            applied = []
            for bad in (False, True, False):
                factor = float("nan") if bad and world.rank == 0 else 1.0
                before = everything(engine)
                with engine.coalesced():
                    for chunk in local(rows, world).split(3):
                        engine.backward(engine(chunk).square().sum() * factor)
                applied.append(engine.step(1e-3).applied)
                after = everything(engine)
                if bad:
                    unchanged = all(torch.equal(before[name], after[name]) for name in before)
            for _ in range(2):
                with heir.coalesced():
                    heir.backward(heir(local(rows, world)).square().sum())
                heir.step(1e-3)
            wanted = everything(heir)
            found[f"{stage} {offload} {optimizer}"] = {
                "applied": applied == [True, False, True],
                "unchanged": unchanged,
                "goes on": all(torch.allclose(after[name], wanted[name], rtol=1e-5, atol=1e-7) for name in wanted),
            }
            engine.close()
            heir.close()
    return found


def everything(engine: Engine) -> dict[str, Tensor]:
    """Weights and moments."""
    found = {name: engine.full_weight(p).clone() for name, p in engine.trainable()}
    return found | {f"{k} {name}": v.clone() for name, p in engine.trainable() for k, v in engine.moments(p).items()}


def check_misuse(world: World, argument: Any) -> dict[str, float]:
    """Without the coalescing block: refused by the engine; wrong when DeepSpeed is called behind its back."""
    refused = 0.0
    errors = {}
    for stage in (1, 2):
        engine, reference, rows = make(stage, 0.0, world)
        try:
            engine.backward(engine(local(rows, world)).square().sum())
        except RuntimeError as error:
            refused += "outside of Engine.coalesced()" in str(error)
        for chunk in local(rows, world).split(1):
            engine._engine.backward(engine(chunk).square().sum() * world.size)
        reference(rows).square().sum().backward()
        wanted = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
        try:
            got = torch.cat([engine.full_gradient(p).flatten() for _, p in engine.trainable()])
            errors[f"stage {stage}"] = ((got - wanted).norm() / wanted.norm()).item()
        except (RuntimeError, ValueError, AssertionError):
            errors[f"stage {stage}"] = 1.0
    return {"refused": refused, **errors}


def check_linear(world: World, argument: Any) -> dict[str, bool]:
    """Whether torch's linear map was replaced while a ZeRO-3 engine lived, and is back afterwards."""
    linear = nn.functional.linear
    engine, _, _ = make(3, 0.5, world)
    replaced = nn.functional.linear is not linear
    engine.close()
    return {"replaced": replaced, "restored": nn.functional.linear is linear}


def test_a_closed_zero3_engine_leaves_torch_as_it_was(tmp_path: Path) -> None:
    assert run_ranks("tests.test_engine:check_linear", 1, tmp_path) == [{"replaced": True, "restored": True}]


@pytest.mark.parametrize("size", [1, 2])
def test_every_stage_equals_torch_on_the_full_batch(tmp_path: Path, size: int) -> None:
    for rank in run_ranks("tests.test_engine:check_stages", size, tmp_path):
        for stage, errors in rank.items():
            assert errors["gradient"] <= 1e-6, (stage, errors)
            assert errors["norm"] <= 1e-6, (stage, errors)
            assert errors["weight"] <= 1e-6, (stage, errors)
            assert errors["reductions"] == 3, "one gradient reduction a step"
            assert errors["resumed"] <= 1e-6, (stage, errors)


def test_an_update_that_is_not_finite_on_one_rank_is_left_out_on_all(tmp_path: Path) -> None:
    for rank in run_ranks("tests.test_engine:check_skips", 2, tmp_path):
        for cell, facts in rank.items():
            assert all(facts.values()), (cell, facts)


def test_several_backwards_without_coalescing_are_refused_and_would_be_wrong(tmp_path: Path) -> None:
    for rank in run_ranks("tests.test_engine:check_misuse", 2, tmp_path):
        assert rank["refused"] == 2
        assert rank["stage 1"] > 1e-2
        assert rank["stage 2"] > 1e-2
