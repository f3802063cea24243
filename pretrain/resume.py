"""Where a run starts from: its newest whole checkpoint, the weights of another run, or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.checkpoint import Progress, locate, newest_whole, read_description, set_aside, step_of
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.identity import Identity, check_identity, check_tokenizer
from pretrain.model import PretrainModel
from pretrain.stored_tensors import StoredTensors, load_weights

PARTS = {"towers": ("towers.", "average."), "embedding_dim": ("towers.", "average."), "objective": ("objective.",)}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Progress of a run and the stored moments to go on with, by their names; None: its first step is still to come.

    notes: to tell.
    """

    progress: Progress
    moments: Mapping[str, Tensor] | None
    notes: list[str]


def restore(config: RunConfig, model: PretrainModel, identity: Identity, source: Path | None) -> Start:
    """Put the weights that the run starts from into `model`.

    source: the checkpoint to go on from; None: the run begins.

    Raises:
        UserError: the checkpoint belongs to another run, or has other weights.
    """
    if source is None:
        if config.init_from is None:
            return Start(progress=Progress(), moments=None, notes=[])
        source = locate(Path(config.init_from), "last")
        found = read_description(source)["identity"]
        check_tokenizer(source, found, config)
        notes = load_model(model, StoredTensors(source), fresh=_fresh(found, identity))
        return Start(progress=Progress(), moments=None, notes=[*notes, f"weights from {source}"])
    description = read_description(source)
    notes = check_identity(source, description["identity"], identity, config.accept)
    tensors, fresh = StoredTensors(source), _fresh(description["identity"], identity)
    notes += load_model(model, tensors, [part for name in config.accept for part in PARTS.get(name, ())], fresh)
    notes.append(f"resumed from {source}")
    moments = LazyTensors(tensors, [name for name in tensors if not name.split("/", 1)[1].startswith(tuple(fresh))])
    return Start(progress=Progress(**description["progress"]), moments=moments, notes=notes)


def _fresh(found: dict[str, Any], identity: Identity) -> list[str]:
    """Beginnings of the names of what starts afresh: scalars mean something else under another objective."""
    before, here = ([_meaning(part) for part in parts] for parts in (found["objective"], identity.objective))
    return [f"objective.parts.{i}." for i, (a, b) in enumerate(zip_longest(before, here)) if a != b]


def _meaning(part: dict[str, Any]) -> dict[str, Any]:
    """What of an objective's options says what its learned scalars are."""
    kept = ("name", "temperature_form", "temperature_range")
    return {key: value for key, value in part.items() if key in kept or key.startswith("learn_")}


def load_model(
    model: PretrainModel, tensors: StoredTensors, leave: Sequence[str] = (), fresh: Sequence[str] = ()
) -> list[str]:
    """`load_weights`, where a run may have begun to keep an average of its towers, or ceased to."""
    stored = any(name.startswith("weight/average.") for name in tensors)
    here = model.average is not None
    notes = [f"learned scalars of the objective begin afresh: {tensors.checkpoint} has another one"] if fresh else []
    notes += load_weights(model, tensors, leave, fresh if stored == here else [*fresh, "average."])
    if model.average is not None and not stored:
        model.average.load_state_dict(model.towers.state_dict())
        notes.append(f"{tensors.checkpoint} keeps no average: it begins as the towers it has")
    elif stored and not here:
        notes.append(f"the average in {tensors.checkpoint} is not taken: train.ema_decay is null")
    return notes


class LazyTensors(Mapping[str, Tensor]):
    """Some of the tensors of a checkpoint."""

    def __init__(self, tensors: StoredTensors, names: Sequence[str]) -> None:
        self._tensors, self._names = tensors, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def newest_checkpoint(run: Path, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run goes on from, and what is to be said of it. A collective call.

    Rank 0 chooses, since it alone reads every byte; it holds the run, and sets newer ones, which are damaged, aside.

    Raises:
        UserError: on every rank: the newest has another format or cannot be read; there are some, and none is whole.
    """
    answer: dict[str, str | list[str] | None] = {}
    if world.rank == 0:
        try:
            found, notes = _settled(run)
            answer = {"found": None if found is None else str(found), "notes": notes, "error": None}
        except UserError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"run {run}: damaged checkpoints cannot be set aside: {error.strerror}"}
    answer = world.share(answer)
    if answer["error"] is not None:
        raise UserError(str(answer["error"]))
    found_path, lines = answer["found"], answer["notes"]
    assert isinstance(lines, list)
    return None if found_path is None else Path(str(found_path)), lines


def _settled(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, the damaged ones after it set aside, and what is to be said."""
    found, damaged = newest_whole(run)
    if found is None and damaged:
        raise UserError(
            f"run {run}: none of its {len(damaged)} checkpoints is whole, the oldest: {damaged[-1]}; restore one, or "
            "train in another run_dir"
        )
    aside = [] if found is None else set_aside(run, step_of(found))
    return found, [*(f"{line}: going on from an earlier one" for line in damaged), *aside]
