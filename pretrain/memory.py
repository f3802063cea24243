"""What to do when memory runs out, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_pipeline.settings import UserError
from pretrain.config import RunConfig

GPU_REFUSAL = re.compile(r"Tried to allocate ([\d.]+ \w+)")
CPU_REFUSAL = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


@contextmanager
def out_of_memory_said(config: RunConfig) -> Iterator[None]:
    """Turn torch's refusals to allocate, on a GPU or in main memory, into a line that says what to lower.

    Raises:
        UserError: in place of such a refusal; other errors pass.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        found = GPU_REFUSAL.search(str(error))
        size = f": {found.group(1)} asked for at once" if found else ""
        raise UserError(f"out of GPU memory{size}; {_advice(config)}") from error
    except RuntimeError as error:
        found = CPU_REFUSAL.search(str(error))
        if found is None:
            raise
        size = f"{int(found.group(1)) / 2**30:.1f} GiB"
        raise UserError(f"out of memory: {size} asked for at once; {_advice(config)}") from error
    except MemoryError as error:
        raise UserError(f"out of memory; {_advice(config)}") from error


def _advice(config: RunConfig) -> str:
    train, stage = config.train, config.train.zero_stage
    shard = "" if stage == 3 else f", raise train.zero_stage (now {stage}) with several ranks"
    return (
        f"lower train.chunk (now {train.chunk}; the result stays the same), use train.precision bf16{shard}, or make "
        "the towers smaller; in main memory also lower data.num_workers and data.prefetch_batches"
    )
