"""Where a command may write: a new folder, an empty one, or one that it wrote itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.settings import UserError

NUM_SHOWN = 3


def check_target_folder(folder: Path, place: str, ours: Sequence[str], what: str) -> None:
    """Refuse a folder that holds something, and nothing of `ours`. Makes nothing.

    Hidden files and the `lost+found` of a fresh disk do not count as something.

    Args:
        place: how the message names it: "out_dir", "--out".
        ours: glob patterns; one match makes it a folder of ours.
        what: a folder of ours in words.

    Raises:
        UserError: names what is there.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise UserError(f"{place} {folder}: a file; expected a new or empty folder, or {what}") from None
    except OSError as error:
        raise UserError(f"{place} {folder}: cannot be read: {error.strerror}") from error
    found = [name for name in names if not name.startswith(".") and name != "lost+found"]
    if not found or any(True for pattern in ours for _ in folder.glob(pattern)):
        return
    shown = ", ".join(found[:NUM_SHOWN]) + (", ..." if len(found) > NUM_SHOWN else "")
    raise UserError(f"{place} {folder}: holds other things ({shown}); expected a new or empty folder, or {what}")
