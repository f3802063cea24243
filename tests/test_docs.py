"""The pages of docs/ keep their word: their commands run in a newcomer's folder, their links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.media import write_clip, write_wav

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_IN_ORDER = ("your-own-corpus.md", "inference.md")  # the second uses what the first made
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with `my-videos/` (10 clips of different lengths and completeness) and the repository's `configs/`."""
    home = tmp_path / "a newcomer's folder"
    videos = home / "my-videos"
    for number in range(10):
        clip = write_clip(videos / f"clip {number}.mp4", duration_s=2.0 + 0.5 * number, fps=10, sound=number != 3)
        if number != 4:
            clip.with_suffix(".txt").write_text(f"picture {number} gets brighter\na tone for {number} seconds\n")
    write_wav(videos / "clip 5.wav", duration_s=4.0)
    (home / "configs").symlink_to(ROOT / "configs")
    return home


@pytest.mark.slow
def test_every_command_of_the_pages_runs(home: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for page in RUN_IN_ORDER:
        blocks = BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
        assert blocks, page
        for language, text in blocks:
            interpreter = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
            done = subprocess.run([*interpreter, text], cwd=home, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout}\n{done.stderr}"
    for made in ("data/your-videos/inspection/contact-sheet.png", "runs/your-videos-small/report.html"):
        assert (home / made).is_file(), made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}: no such heading"
