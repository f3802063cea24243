"""Splits for rows that name none: a fixed share of them each, chosen by their ids alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

REST = "train"


def held_out_split(row_id: str, shares: Mapping[str, float]) -> str:
    """The split of a row: the first of `shares` whose stretch of [0, 1) the row's hash falls into, else train.

    A row keeps its split when rows are added to the manifest, and when a split is appended to `shares`.
    """
    digest = hashlib.sha256(f"hold-out/{row_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return REST
