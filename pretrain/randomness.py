"""Random draws as a function of what they are for: no generator has a state that would need saving."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_for(*key: int | str) -> int:
    """A 63-bit seed that depends on the whole key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def keyed_random(*key: int | str) -> Iterator[None]:
    """Inside, torch's default generators start from `key`; outside they are as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_for(*key))
        yield
