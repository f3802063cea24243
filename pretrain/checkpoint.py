"""Checkpoints free of topology: fp32 weights and moments in slices by parameter name, whatever the ranks or ZeRO stage.

    RUN/checkpoints/step-00000100/
        state-00000.safetensors ...   each rank writes the slices that lie on it
        checkpoint.json               progress, identity, config, and the files with their SHA-256

This file finds them, `stored_tensors` reads what they hold, `checkpoint_writer` writes them. Order, augmentation and
dropout are functions of the seed and the step: no generator state is saved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.settings import UserError
from data_pipeline.shards import file_sha256

FORMAT_VERSION = 3
NAME = re.compile(r"step-(\d{8,})")


class OtherFormat(UserError):
    """A checkpoint of another format version."""


class Unreadable(UserError):
    """Files of a checkpoint are there and cannot be read now: no permission, a file system that is away."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    step: steps made. position: samples drawn. num_updates: steps that changed the weights; the others were skipped,
    num_skipped of them in a row just now. best_score, best_step: of validation; best_of: digest of what it measures.
    """

    step: int = 0
    position: int = 0
    num_updates: int = 0
    num_skipped: int = 0
    best_score: float | None = None
    best_step: int | None = None
    best_of: str | None = None


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step`; sorts as the steps do."""
    return f"step-{step:08d}"


def finished_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first; nothing that is called otherwise: copies, set aside.

    Raises:
        Unreadable: it may have some, and they cannot be seen now.
    """
    folder = checkpoints_folder(run)
    try:
        named = [folder / name for name in os.listdir(folder) if NAME.fullmatch(name)]
        found = [path for path in named if _is_there(path / "checkpoint.json")]
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(folder):  # else a link to what is away
            return []
        raise Unreadable(f"checkpoints {error.filename}: cannot be read: {error.strerror}") from error
    return sorted(found, key=step_of)


def _is_there(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def read_description(checkpoint: Path) -> dict[str, Any]:
    """The parsed checkpoint.json.

    Raises:
        OtherFormat: another format version.
        Unreadable: the file is there and cannot be read.
        UserError: there is none, or it is no description.
    """
    path = checkpoint / "checkpoint.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format_version"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: not a checkpoint description ({error})") from error
    except OSError as error:
        raise Unreadable(f"checkpoint {path}: cannot be read: {error.strerror}") from error
    if version != FORMAT_VERSION:
        raise OtherFormat(
            f"checkpoint {path}: format version {version} found, {FORMAT_VERSION} expected: "
            "use the version of parallelotope that wrote it, or train in another run_dir"
        )
    assert isinstance(description, dict)
    return description


def read_progress(checkpoint: Path) -> Progress:
    """How far the run was; raises as `read_description`."""
    return Progress(**read_description(checkpoint)["progress"])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None: every checksum fits.

    Raises, since it may be whole and is not to be passed over for an older one or for nothing:
        OtherFormat: another version of parallelotope wrote it.
        Unreadable: the files cannot be read now.
    """
    try:
        for name, sha256 in read_description(checkpoint)["files"].items():
            if file_sha256(checkpoint / name) != sha256:
                return f"checksum of {name} differs"
    except (OtherFormat, Unreadable):
        raise
    except (UserError, FileNotFoundError) as error:
        return str(error)
    except OSError as error:
        raise Unreadable(f"checkpoint {checkpoint}: cannot be read: {error.strerror}") from error
    return None


def newest_whole(run: Path, before_step: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums fit, and a line for each newer one: what is damaged in it.

    before_step: pass over those of this step and later. Raises as `finished_checkpoints` and `damage`.
    """
    damaged: list[str] = []
    for checkpoint in reversed(finished_checkpoints(run)):
        if before_step is not None and step_of(checkpoint) >= before_step:
            continue
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged.append(f"checkpoint {checkpoint} is damaged ({problem})")
    return None, damaged


def set_aside(run: Path, after_step: int) -> list[str]:
    """Rename checkpoints of later steps, which are damaged, so that new ones do not count as older than they are.

    Returns a line for each.
    """
    lines = []
    for checkpoint in finished_checkpoints(run):
        if step_of(checkpoint) > after_step:
            place = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(place, ignore_errors=True)
            os.replace(checkpoint, place)
            lines.append(f"{checkpoint} is now {place.name}: delete it when nobody wants to look at it")
    return lines


def locate(path: Path, which: str) -> Path:
    """The checkpoint meant by `path`: itself, or the "last" or "best" one of the run folder it is.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (path / "checkpoint.json").is_file():
        chosen = path
    else:
        finished = finished_checkpoints(path)
        if not finished:
            raise UserError(f"run {path}: no checkpoint found; expected {checkpoints_folder(path)}/step-*")
        best = checkpoints_folder(path) / checkpoint_name(read_progress(finished[-1]).best_step or 0)
        chosen = best if which == "best" and best in finished else finished[-1]
    problem = damage(chosen)
    if problem is not None:
        raise UserError(f"checkpoint {chosen}: {problem}; name another one")
    return chosen


def to_prune(run: Path, keep_last: int, best_step: int | None, keep_every_steps: int | None = None) -> list[Path]:
    """Checkpoints but the newest `keep_last` (at least one), the best, and those whose step `keep_every_steps` divides;
    and leftovers of interrupted saves."""
    old = finished_checkpoints(run)[: -max(1, keep_last)]
    kept = {path for path in old if keep_every_steps and step_of(path) % keep_every_steps == 0}
    leftovers = checkpoints_folder(run).glob(".step-*.partial")
    return [*(path for path in old if path not in kept and step_of(path) != best_step), *leftovers]


def prune(run: Path, keep_last: int, best_step: int | None, keep_every_steps: int | None = None) -> None:
    """Delete what `to_prune` names. No save may be under way."""
    for doomed in to_prune(run, keep_last, best_step, keep_every_steps):
        hidden = doomed.with_name(f".{doomed.name}.partial")
        if not doomed.name.startswith("."):
            # Renamed first: a kill in the middle of deleting must not leave half a checkpoint under its name.
            os.replace(doomed, hidden)
        shutil.rmtree(doomed if doomed.name.startswith(".") else hidden, ignore_errors=True)
