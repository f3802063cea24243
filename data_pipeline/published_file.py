"""Files that appear under their names whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def partial_path(final: Path) -> Path:
    """A temporary name beside `final` that nobody else uses."""
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")


def publish(partial: Path, final: Path) -> None:
    """Flush `partial` to disk and rename it to `final`: at no moment is there half a file under the final name."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON under a temporary name, then publish it."""
    partial = partial_path(path)
    partial.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    publish(partial, path)
