"""What DeepSpeed works with is what was resolved from the run's config, and stands in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.engine import Engine, deepspeed_config
from tests.ranks import run_ranks
from tests.test_engine import CELLS, make

GRAD_CLIP = 0.37  # nobody's default


def ended_with(engine: Engine) -> dict[str, Any]:
    """DeepSpeed's own view of every key that was given to it, after its parsing, defaults and corrections."""
    parsed = engine._engine._config
    given = engine.deepspeed_config
    found = {key: getattr(parsed, key, "no such key") for key in given}
    found["fp16"] = {"enabled": parsed.float16_config.enabled}
    found["bf16"] = {"enabled": parsed.bfloat16_config.enabled}
    found["communication_data_type"] = {torch.float32: "fp32"}.get(engine._engine.communication_data_type, "other")
    zero = parsed.zero_config.model_dump(by_alias=True, mode="json")
    found["zero_optimization"] = _same_keys(zero, given["zero_optimization"])
    return found


def _same_keys(found: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _same_keys(found[key], value) if isinstance(value, dict) else found.get(key, "no such key")
        for key, value in given.items()
    }


def in_use(engine: Engine) -> dict[str, Any]:
    """What the parts that do the work hold: DeepSpeed's engine, and its ZeRO optimizer if there is one."""
    inner = engine._engine
    found = {"stage": inner.zero_optimization_stage(), "clip": inner.gradient_clipping()}
    found |= {"ranks": inner.dp_world_size, "average": inner.postscale_gradients() and inner.gradient_average}
    if engine._stage > 0:
        zero = inner.optimizer
        offload = zero.offload_optimizer if engine._stage == 3 else zero.cpu_offload
        found |= {"clip": zero.clip_grad, "bucket": zero.reduce_bucket_size, "offload": bool(offload)}
        found |= {"type": str(zero.communication_data_type), "predivide": zero.gradient_predivide_factor}
    return found


def view_engines(world: World, argument: Any) -> list[dict[str, Any]]:
    """For each stage, with and without offload: what was given, what DeepSpeed made of it, and what is in use."""
    found = []
    for stage, offload in CELLS:
        engine, _, _ = make(stage, GRAD_CLIP, world, offload)
        given, ended = json.loads(json.dumps(engine.deepspeed_config)), ended_with(engine)
        found.append({"stage": stage, "offload": offload, "given": given, "ended": ended, "in use": in_use(engine)})
        engine.close()
    return found


def test_deepspeed_ends_with_the_config_it_was_given(tmp_path: Path) -> None:
    for rank in run_ranks("tests.test_deepspeed_config:view_engines", 2, tmp_path):
        assert [(view["stage"], view["offload"]) for view in rank] == [tuple(cell) for cell in CELLS]
        for view in rank:
            given, in_use = view["given"], view["in use"]
            assert view["ended"] == given
            assert given["zero_optimization"]["stage"] == in_use["stage"] == view["stage"]
            assert given["gradient_clipping"] == in_use["clip"] == GRAD_CLIP
            assert in_use["average"]
            assert in_use["ranks"] == 2
            assert given["train_micro_batch_size_per_gpu"] * 2 == given["train_batch_size"]
            if view["stage"] > 0:
                assert in_use["offload"] == view["offload"] == ("offload_optimizer" in given["zero_optimization"])
                assert in_use["bucket"] == given["zero_optimization"]["reduce_bucket_size"]
                assert in_use["type"] == "torch.float32"
                assert in_use["predivide"] == 1.0


def test_the_run_folder_has_that_config(trained_run: Path) -> None:
    config = RunConfig.model_validate(yaml.safe_load((trained_run / "config.yaml").read_text(encoding="utf-8")))
    written = json.loads((trained_run / "deepspeed.json").read_text(encoding="utf-8"))
    assert written == deepspeed_config(config, World())
    assert written["gradient_clipping"] == config.train.grad_clip
