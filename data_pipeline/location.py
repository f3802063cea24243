"""Locations: a local path, or a URL that fsspec opens."""

from __future__ import annotations

import os


def is_url(location: str) -> bool:
    """Whether fsspec, not the local file system, opens `location`."""
    return "://" in location or "::" in location


def dataset_name(location: str) -> str:
    """The last part of a dataset's location."""
    return location.rstrip("/").rpartition("/")[2] or location


def join_location(location: str, name: str) -> str:
    """The file `name` in a folder or below a URL."""
    return f"{location.rstrip('/')}/{name}" if is_url(location) else os.path.join(location, name)
