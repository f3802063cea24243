"""A short form of `make chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import main


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_runs_are_those_left_alone(tmp_path: Path) -> None:
    assert main(["--kills", "8", "--seed", "3", "--folder", str(tmp_path)]) == 0
