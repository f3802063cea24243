"""Make `import torchvision` work beside a CPU-only torch.

torchvision's wheel from PyPI is a CUDA build: its compiled operators do not load with a CPU build of torch, and its
import then fails on the schemas of `nms` and `qnms`, which nothing here calls. Declaring the two schemas first lets
timm and transformers import their models.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

SCHEMAS = ("nms", "qnms")


@cache
def allow_torchvision() -> bool:
    """Load torchvision's operators, or declare the missing schemas; call before the first import of timm's models.

    Returns whether schemas had to be declared, which is also logged. The second call of a process does nothing.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return False
    for compiled in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(compiled))
            return False
        except OSError:
            continue
    _declare_schemas()
    logging.getLogger(__name__).info("torchvision's operators do not load with this torch: declared %s", SCHEMAS)
    return True


@cache  # torch forgets schemas when the object that declared them goes
def _declare_schemas() -> Any:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in SCHEMAS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
