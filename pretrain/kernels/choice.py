"""Whether pairs of samples are scored by the fused kernel or by PyTorch."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.objectives.scores import CosineScore, VolumeScore
from pretrain.objectives.terms import Pairs
from pretrain.side_statistics import Statistic

if TYPE_CHECKING:
    from pretrain.kernels.fused_tiles import FusedTiles


def fused_tiles(pairs: Pairs, wanted: frozenset[Statistic], like: Tensor) -> FusedTiles | None:
    """The kernel for these pairs; None where PyTorch scores them.

    It is taken for single precision on CUDA (on a CPU under Triton's interpreter, TRITON_INTERPRET=1) where Triton is
    installed, the score is one it knows and does not refuse it, and matched scores are given. wanted: statistics of
    rows and columns together. like: a tensor of the vectors' device and dtype.
    """
    knows_score = isinstance(pairs.score, VolumeScore | CosineScore) and pairs.score.kernel == "auto"
    knows_statistics = wanted <= {"log_sum_exp", "sum"} and pairs.matched is not None
    runs_here = like.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not (knows_score and knows_statistics and runs_here and like.dtype == torch.float32):
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    from pretrain.kernels.fused_tiles import FusedTiles

    return FusedTiles()
