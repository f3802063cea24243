"""Where a manifest's files are: local paths or fsspec URLs, opened as binary streams."""

from __future__ import annotations

import os
from typing import BinaryIO, cast

import fsspec

from data_pipeline.filters import Reason, Rejected
from data_pipeline.location import is_url


def resolve(base: str, path: str) -> str:
    """`path` as it can be opened: relative ones are relative to `base`, a folder or URL."""
    return path if is_url(path) or os.path.isabs(path) else f"{base.rstrip('/')}/{path}"


def open_binary(base: str, path: str) -> BinaryIO:
    """A seekable stream of `path`'s bytes.

    Raises:
        Rejected: there is no such file, or it may not be read. Other failures (a network that is down) are no fault of
            the row and raise OSError, so that the task is tried again.
    """
    location = resolve(base, path)
    try:
        if is_url(location):
            return cast(BinaryIO, fsspec.open(location, "rb").open())
        return open(location, "rb")
    except FileNotFoundError as error:
        raise Rejected(Reason.MISSING_FILE, f"{path}: no such file") from error
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise Rejected(Reason.UNREADABLE_FILE, f"{path}: {error.strerror}") from error


def read_bytes(base: str, path: str) -> bytes:
    """All bytes of `path`.

    Raises:
        Rejected: as `open_binary`, or the file is empty.
    """
    with open_binary(base, path) as stream:
        data = stream.read()
    if not data:
        raise Rejected(Reason.EMPTY_FILE, f"{path}: 0 bytes")
    return data
