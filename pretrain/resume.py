"""Where a run starts from: its newest whole checkpoint, the weights of another run, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.settings import UserError
from pretrain.checkpoint import (
    Progress,
    StoredTensors,
    load_weights,
    locate,
    newest_whole,
    read_description,
)
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.identity import Identity, check_identity
from pretrain.model import PretrainModel

PARTS = {"towers": ("towers.", "average."), "embedding_dim": ("towers.", "average."), "objective": ("objective.",)}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Progress of a run and the stored state to go on with; None: its first step is still to come. notes: to tell."""

    progress: Progress
    tensors: StoredTensors | None
    notes: list[str]


def restore(config: RunConfig, model: PretrainModel, identity: Identity, source: Path | None) -> Start:
    """Put the weights that the run starts from into `model`.

    source: the checkpoint to go on from; None: the run begins.

    Raises:
        UserError: the checkpoint belongs to another run, or has other weights.
    """
    if source is None:
        if config.init_from is None:
            return Start(progress=Progress(), tensors=None, notes=[])
        source = locate(Path(config.init_from), "last")
        load_weights(model, StoredTensors(source))
        return Start(progress=Progress(), tensors=None, notes=[f"weights from {source}"])
    description = read_description(source)
    notes = check_identity(source, description["identity"], identity, config.accept)
    tensors = StoredTensors(source)
    notes += load_weights(model, tensors, _may_differ(config.accept))
    notes.append(f"resumed from {source}")
    return Start(progress=Progress(**description["progress"]), tensors=tensors, notes=notes)


def _may_differ(accept: Sequence[str]) -> list[str]:
    return [part for name in accept for part in PARTS.get(name, ())]


def newest_checkpoint(run: Path, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run goes on from, and what is to be said of it. A collective call.

    Rank 0 chooses, since it alone reads every byte.

    Raises:
        UserError: on every rank: the newest one has another format.
    """
    answer: dict[str, str | list[str] | None] = {}
    if world.rank == 0:
        try:
            found, notes = newest_whole(run)
            answer = {"found": None if found is None else str(found), "notes": notes, "error": None}
        except UserError as error:
            answer = {"error": str(error)}
    answer = world.share(answer)
    if answer["error"] is not None:
        raise UserError(str(answer["error"]))
    found_path, lines = answer["found"], answer["notes"]
    assert isinstance(lines, list)
    return None if found_path is None else Path(str(found_path)), lines
