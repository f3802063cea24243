"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_dataset import write_dataset


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded dataset: 23 training samples and 12 for validation, of one second each."""
    return write_dataset(tmp_path_factory.mktemp("small") / "dataset", {"train": 23, "val": 12})
