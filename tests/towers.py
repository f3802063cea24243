"""A small run of three towers, and inputs for it as the loader gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.config import RunConfig
from pretrain.towers.build import ModelConfig, Towers

Inputs = dict[str, dict[str, Tensor]]
SIZES: dict[str, Any] = {"width": 32, "depth": 1, "num_heads": 2}
DIM, NUM_FRAMES, MAX_TOKENS, NUM_SAMPLES = 12, 3, 10, 16_000  # samples of sound: one second


def run_config(
    video: dict[str, Any] | None = None, audio: dict[str, Any] | None = None, text: dict[str, Any] | None = None,
    precision: str = "fp32",
) -> RunConfig:  # fmt: skip
    """The small run; each argument's keys replace those of a tower."""
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "data": {"train": {"path": "unused", "split": "train"}, "window_s": 1.0},
            "towers": {
                "video": {"encoder": SIZES, "num_frames": NUM_FRAMES, "size_px": 32, **(video or {})},
                "audio": {"encoder": SIZES, "num_mels": 32, "hop_s": 0.02, **(audio or {})},
                "text": {"encoder": SIZES, "max_tokens": MAX_TOKENS, **(text or {})},
            },
            "embedding_dim": DIM,
            "objective": [{"name": "infonce"}],
            "schedule": {"num_steps": 1},
            "train": {"global_batch": 8, "precision": precision},
        }
    )


def build_towers(config: RunConfig, seed: int = 0) -> Towers:
    """Towers with weights drawn from `seed`."""
    torch.manual_seed(seed)
    return Towers(ModelConfig.of(config))


def draw_inputs(num: int, seed: int = 0) -> Inputs:
    """Random pictures, sounds and token ids of unequal lengths; masks begin where rows end."""
    draws = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draws)

    num_frames, num_tokens = integers(1, NUM_FRAMES + 1, num), integers(1, MAX_TOKENS + 1, num)
    return {
        "video": {
            "frames": integers(0, 256, num, NUM_FRAMES, 32, 32, 3).to(torch.uint8),
            "frame_mask": torch.arange(NUM_FRAMES) < num_frames[:, None],
        },
        "audio": {
            "waveform": integers(-20_000, 20_000, num, NUM_SAMPLES).to(torch.int16),
            "num_samples": integers(NUM_SAMPLES // 4, NUM_SAMPLES + 1, num),
        },
        "text": {
            "token_ids": integers(1, 1000, num, MAX_TOKENS),
            "token_mask": torch.arange(MAX_TOKENS) < num_tokens[:, None],
        },
    }


def hide_garbage(inputs: Inputs, present: dict[str, Tensor], seed: int = 9) -> Inputs:
    """The same inputs with other values wherever a mask, a length or `present` says that nothing is there."""
    other = draw_inputs(len(present["video"]), seed)
    video, audio, text = inputs["video"], inputs["audio"], inputs["text"]
    seen = (video["frame_mask"] & present["video"][:, None])[..., None, None, None]
    heard = (torch.arange(NUM_SAMPLES) < audio["num_samples"][:, None]) & present["audio"][:, None]
    read = text["token_mask"] & present["text"][:, None]
    return {
        "video": {
            "frames": torch.where(seen, video["frames"], other["video"]["frames"]),
            "frame_mask": torch.where(present["video"][:, None], video["frame_mask"], other["video"]["frame_mask"]),
        },
        "audio": {
            "waveform": torch.where(heard, audio["waveform"], other["audio"]["waveform"]),
            "num_samples": torch.where(present["audio"], audio["num_samples"], other["audio"]["num_samples"]),
        },
        "text": {
            "token_ids": torch.where(read, text["token_ids"], torch.full_like(text["token_ids"], 10**9)),
            "token_mask": torch.where(present["text"][:, None], text["token_mask"], other["text"]["token_mask"]),
        },
    }


def all_present(num: int) -> dict[str, Tensor]:
    """No sample lacks anything."""
    return {name: torch.ones(num, dtype=torch.bool) for name in ("video", "audio", "text")}
