"""Measure every cell and write docs/exactness.md: `python -m tests.exactness_table [PAGE]`."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.exactness.cells import CELLS
from tests.exactness.page import render
from tests.exactness.table import measure_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "exactness.md"


def main() -> int:
    """The exit code: 1 if a row that must hold does not."""
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_table(CELLS, Path(folder), show=True)
    page.write_text(render(rows, time.monotonic() - started), encoding="utf-8")
    missed = [row for row in rows if row.missed]
    for row in missed:
        print(f"not met: {', '.join(row.missed)}: {row.cell}; {row.measures}")
    print(f"{page}: {len(rows) - len(missed)} of {len(rows)} rows as they must be")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
