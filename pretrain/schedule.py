"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pretrain.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of update number `step` (from 0): linear warmup, then half a cosine to `final_lr_ratio`."""
    if step < schedule.warmup_steps:
        return optimizer.lr * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, schedule.num_steps - schedule.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return optimizer.lr * (schedule.final_lr_ratio + (1 - schedule.final_lr_ratio) * cosine)
