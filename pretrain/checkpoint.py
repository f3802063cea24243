"""Checkpoints free of topology: fp32 weights and moments by parameter name, whole, whatever the ranks or ZeRO stage.

    RUN/checkpoints/step-00000100/
        state-00000.safetensors ...   each rank writes a share of the tensors
        checkpoint.json               step, position, files with SHA-256, digests of what the state belongs to

Written in a folder with a temporary name and committed by one rename, so a kill at any moment leaves whole checkpoints
only. Order, augmentation and dropout are functions of the seed and the step: no generator state is saved.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.settings import UserError
from data_pipeline.shards import file_sha256, publish, write_json
from pretrain.collectives import World
from pretrain.engine import MOMENTS, Engine
from pretrain.identity import Identity

FORMAT_VERSION = 2


class OtherFormat(UserError):
    """A checkpoint of another format version."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: updates made, samples drawn, and the best validation score with its step."""

    step: int = 0
    position: int = 0
    best_score: float | None = None
    best_step: int | None = None


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def save_checkpoint(run: Path, engine: Engine, progress: Progress, identity: Identity, world: World) -> Path:
    """Save the state of `engine`; a collective call. Returns the checkpoint's folder.

    Raises:
        UserError: on every rank, when any rank could not write; earlier checkpoints are as they were.
    """
    final = checkpoints_folder(run) / f"step-{progress.step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    tensors = _own_tensors(engine, world)
    problem: OSError | None = None
    try:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.barrier()
        _write_share(partial, tensors, world.rank)
    except OSError as error:
        problem = error
    except SafetensorError as error:  # says "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        problem = OSError(int(number.group(1)) if number else errno.EIO, str(error))
    _agree(problem, final, partial, world)
    try:
        if world.rank == 0:
            _commit(partial, final, progress, identity)
    except OSError as error:
        problem = error
    _agree(problem, final, partial, world)
    return final


def _own_tensors(engine: Engine, world: World) -> dict[str, Tensor]:
    """This rank's share of the state on the CPU; every rank takes part in gathering every tensor."""
    own: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(engine.model.named_parameters()):
        found = {f"weight/{name}": engine.full_weight(parameter)}
        if parameter.requires_grad:
            found |= {f"{key}/{name}": value for key, value in engine.moments(parameter).items()}
        if number % world.size == world.rank:
            own |= {key: value.detach().to("cpu", copy=True).contiguous() for key, value in found.items()}
    if world.rank == 0:
        own |= {
            f"buffer/{name}": value.to("cpu", copy=True) for name, value in persistent_buffers(engine.model).items()
        }
    return own


def persistent_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def _write_share(partial: Path, tensors: dict[str, Tensor], rank: int) -> None:
    name = f"state-{rank:05d}.safetensors"
    save_file(tensors, partial / f".{name}")
    publish(partial / f".{name}", partial / name)
    write_json(partial / f"{name}.sha256.json", file_sha256(partial / name))


def _commit(partial: Path, final: Path, progress: Progress, identity: Identity) -> None:
    files = {}
    for path in sorted(partial.glob("state-*.safetensors")):
        side = path.with_name(f"{path.name}.sha256.json")
        files[path.name] = json.loads(side.read_text())
        side.unlink()
    description = {
        "format_version": FORMAT_VERSION,
        "progress": asdict(progress),
        "identity": asdict(identity),
        "files": files,
    }
    write_json(partial / "checkpoint.json", description)
    if final.exists():  # damaged, or this step is saved again: set aside in one rename
        os.replace(final, final.with_name(f".{final.name}.old.partial"))
    os.replace(partial, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _agree(problem: OSError | None, final: Path, partial: Path, world: World) -> None:
    """All ranks go on, or all raise with the same reason."""
    mine = 0 if problem is None else problem.errno or errno.EIO
    number = int(world.max(torch.tensor([mine], device=world.device)).item())
    if number == 0:
        return
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    world.barrier()
    raise UserError(
        f"checkpoint {final}: cannot save: {os.strerror(number)}; earlier checkpoints are whole, "
        "the run resumes from them"
    )


def finished_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    return sorted(path for path in checkpoints_folder(run).glob("step-*") if (path / "checkpoint.json").is_file())


def read_description(checkpoint: Path) -> dict[str, Any]:
    """The parsed checkpoint.json.

    Raises:
        OtherFormat: another format version.
        UserError: unreadable.
    """
    path = checkpoint / "checkpoint.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: not a checkpoint description ({error})") from error
    if version != FORMAT_VERSION:
        raise OtherFormat(
            f"checkpoint {path}: format version {version} found, {FORMAT_VERSION} expected: "
            "use the version of parallelotope that wrote it, or train in another run_dir"
        )
    assert isinstance(description, dict)
    return description


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None: every checksum fits.

    Raises:
        OtherFormat: another version of parallelotope wrote it.
    """
    try:
        for name, sha256 in read_description(checkpoint)["files"].items():
            if file_sha256(checkpoint / name) != sha256:
                return f"checksum of {name} differs"
    except OtherFormat:
        raise  # it is whole, and not to be passed over for an older one or for nothing
    except (UserError, OSError) as error:
        return str(error)
    return None


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums fit, and a line for each newer one that is damaged."""
    notes: list[str] = []
    for checkpoint in reversed(finished_checkpoints(run)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, notes
        notes.append(f"checkpoint {checkpoint} is damaged ({problem}): using the one before")
    return None, notes


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
        best_step = Progress(**read_description(finished[-1])["progress"]).best_step
        best = checkpoints_folder(path) / f"step-{best_step or 0:08d}"
        chosen = best if which == "best" and best in finished else finished[-1]
    problem = damage(chosen)
    if problem is not None:
        raise UserError(f"checkpoint {chosen}: {problem}; name another one")
    return chosen


def load_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint on the CPU: `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `buffer/NAME`."""
    tensors: dict[str, Tensor] = {}
    for name in read_description(checkpoint)["files"]:
        tensors |= load_file(checkpoint / name)
    return tensors


def load_weights(model: torch.nn.Module, tensors: dict[str, Tensor], checkpoint: Path) -> None:
    """Put weights and buffers into `model`, before the engine takes it.

    Raises:
        UserError: names or shapes do not fit.
    """
    wanted = {f"weight/{name}": p.shape for name, p in model.named_parameters()}
    wanted |= {f"buffer/{name}": b.shape for name, b in persistent_buffers(model).items()}
    found = {key: value.shape for key, value in tensors.items() if key.startswith(("weight/", "buffer/"))}
    for key in sorted(set(wanted) | set(found)):
        if wanted.get(key) != found.get(key):
            here, there = wanted.get(key, "nothing"), found.get(key, "nothing")
            raise UserError(f"checkpoint {checkpoint} is of another model: {key} is {there} there, {here} here")
    model.load_state_dict({key.split("/", 1)[1]: tensors[key] for key in wanted}, strict=False)


def load_moments(engine: Engine, tensors: dict[str, Tensor], num_updates: int) -> None:
    """Put AdamW's moments into the engine."""
    names = [name for name, _ in engine.trainable()]
    engine.set_moments({name: {key: tensors[f"{key}/{name}"] for key in MOMENTS} for name in names}, num_updates)


def prune(run: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one, and leftovers of interrupted saves."""
    for leftover in checkpoints_folder(run).glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    for checkpoint in finished_checkpoints(run)[:-keep_last]:
        if checkpoint.name != f"step-{best_step or 0:08d}":
            # Renamed first: a kill in the middle of deleting must not leave half a checkpoint under its name.
            doomed = checkpoint.with_name(f".{checkpoint.name}.partial")
            os.replace(checkpoint, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
