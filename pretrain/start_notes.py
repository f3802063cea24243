"""What a person should know when a run starts: why it is silent for a while, and what its batches will hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CPU_COLLECTIVES = "deepspeed_shm_comm"  # the extension that DeepSpeed compiles on machines without a GPU


def compile_notes() -> Iterator[str]:
    """A line where DeepSpeed is about to compile; its accelerator is chosen already (`prepare_environment`)."""
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        return
    # There is no public way to ask where torch keeps what it has built; the folder depends on versions of both.
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(CPU_COLLECTIVES, verbose=False))
    if not (folder / f"{CPU_COLLECTIVES}.so").is_file():
        yield "compiling DeepSpeed's CPU collectives, once: about a minute"


def batch_notes(num_samples: int, global_batch: int) -> Iterator[str]:
    """A line where a global batch is larger than the split it is drawn from."""
    if global_batch > num_samples:
        yield (
            f"warning: train.global_batch {global_batch} is larger than the {num_samples} training samples: every "
            "batch holds samples several times, and copies of one are not negatives of each other; expected at most "
            f"{num_samples}"
        )
