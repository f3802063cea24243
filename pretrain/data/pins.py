"""The shards that a run trains on, fixed at its first start: RUN/datasets.json.

A dataset that has grown since does not change what a run sees. One that lost or changed a pinned shard is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.settings import UserError
from data_pipeline.shards import (
    GIB,
    ShardCache,
    ShardedDataset,
    ShardInfo,
    is_url,
    shards_digest,
    shards_of,
    write_json,
)
from pretrain.collectives import World
from pretrain.config import DataConfig, RunConfig
from pretrain.data.mixture import Mixture

NAME = "datasets.json"
MAX_NAMED = 3  # shards in one message


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One training split and its shards, in the order that sample ids count through."""

    path: str
    split: str
    shards: tuple[ShardInfo, ...]

    @property
    def digest(self) -> str:
        """That of a `ShardedDataset` with these shards."""
        return shards_digest(self.shards)

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)


def datasets_digest(digests: Sequence[str]) -> str:
    """A short hash of several datasets in order; of one, its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def current_pins(data: DataConfig) -> list[Pin]:
    """The training splits of a config as they are now.

    Raises:
        UserError: a dataset or split is not there.
    """
    return [Pin(path=p.path, split=p.split, shards=tuple(shards_of(p.path, p.split))) for p in data.train]


def read_pins(run: Path) -> list[Pin] | None:
    """What RUN/datasets.json says; None: the run has not started yet.

    Raises:
        UserError: the file cannot be read.
    """
    path = run / NAME
    try:
        return [_as_pin(pin) for pin in json.loads(path.read_text(encoding="utf-8"))["datasets"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no list of shards ({type(error).__name__}: {error}); restore it, or delete it to pin what the "
            "datasets hold now"
        ) from error


def write_pins(run: Path, pins: Sequence[Pin], *, accepted: bool = False) -> None:
    """Write RUN/datasets.json, whole or not at all. accepted: they took the place of others, which was asked for."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / NAME, {"datasets": [asdict(pin) for pin in pins], "accepted": accepted})


def _were_accepted(run: Path) -> bool:
    """Whether the run's pins took the place of others at its last start."""
    try:
        return bool(json.loads((run / NAME).read_text(encoding="utf-8")).get("accepted"))
    except (OSError, ValueError, AttributeError):
        return False


def held_pins(run: Path, data: DataConfig) -> tuple[list[Pin], list[str]]:
    """The pins of a run, made now where it has none, with a line for each dataset that has grown.

    For one process; see `shared_pins`.

    Raises:
        UserError: pinned shards are gone or changed, or the config names another number of datasets.
    """
    pins, now = read_pins(run), current_pins(data)
    if pins is None:
        write_pins(run, now)
        return now, []
    place = run / NAME
    if len(pins) != len(now):
        raise UserError(
            f"data.train: {len(now)} datasets found, {len(pins)} expected: those that the run started with ({place}); "
            "use another run_dir, or go on with --accept dataset"
        )
    notes = []
    for pin, here in zip(pins, now, strict=True):
        lost = _lost(pin, here)
        if lost:
            raise UserError(
                f"dataset {here.path}, split '{here.split}': {_listed(lost)}, of {len(pin.shards)} that the run "
                f"started with ({place}); restore them, use another run_dir, or go on with --accept dataset"
            )
        known = {shard.path for shard in pin.shards}
        new = [shard.num_samples for shard in here.shards if shard.path not in known]
        if new:
            notes.append(
                f"dataset {here.path}, split '{here.split}': {sum(new):,} new samples in {len(new)} new shards are not "
                f"used; the run goes on with the {pin.num_samples:,} it started with"
            )
    # Where a dataset is may change, what it holds may not.
    held = [Pin(path=here.path, split=here.split, shards=pin.shards) for pin, here in zip(pins, now, strict=True)]
    if held != pins:
        write_pins(run, held, accepted=_were_accepted(run))
    return held, notes


def renewed_pins(run: Path, data: DataConfig) -> tuple[list[Pin], list[str]]:
    """What the datasets hold now, whatever the run began with, and a line for each difference. Writes nothing.

    From then on the order of samples is another one: positions of earlier steps mean other samples.

    Raises:
        UserError: a dataset or split is not there.
    """
    before, now = read_pins(run), current_pins(data)
    if before is None:
        return now, []
    lines = [] if len(before) == len(now) else [f"{len(before)} datasets were pinned, {len(now)} are now"]
    return now, lines + [
        f"dataset {new.path}, split '{new.split}': {len(old.shards)} shards with {old.num_samples:,} samples were "
        f"pinned, {len(new.shards)} with {new.num_samples:,} are now"
        for old, new in zip(before, now, strict=False)
        if old.shards != new.shards
    ]


def shared_pins(config: RunConfig, world: World, *, begun: bool) -> tuple[list[Pin], list[str]]:
    """The pins of a run, the same on all ranks though a dataset may grow meanwhile, and what is to be said of them.

    A collective call. The pins are renewed where the config accepts another dataset (written by `keep_accepted`, once
    the run goes on), or the run has made no checkpoint yet (`begun`) and its shards are no more. Accepted ones are then
    kept at every further start of the same command, as a requeued job makes them: a dataset that goes on growing would
    change the order again and again.

    Raises:
        UserError: on every rank: as `held_pins`.
    """
    answer: dict[str, Any] = {}
    if world.rank == 0:
        try:
            pins, notes = _settled_pins(config, begun)
            answer = {"pins": [asdict(pin) for pin in pins], "notes": notes, "error": None}
        except UserError as error:
            answer = {"error": str(error)}
    answer = world.share(answer)
    if answer["error"] is not None:
        raise UserError(answer["error"])
    return [_as_pin(pin) for pin in answer["pins"]], answer["notes"]


def _settled_pins(config: RunConfig, begun: bool) -> tuple[list[Pin], list[str]]:
    run, accepts = Path(config.run_dir), "dataset" in config.accept
    accepted = _were_accepted(run)
    if accepts and not accepted:
        return _newly_accepted(config)
    try:
        pins, notes = held_pins(run, config.data)
    except UserError:
        if accepts:
            return _newly_accepted(config)
        if begun:
            raise
        pins, notes = renewed_pins(run, config.data)[0], []
        write_pins(run, pins)
    if accepted and not accepts:
        write_pins(run, pins)
    if accepts and notes:
        notes.append("what --accept dataset took at an earlier start is kept; start once without it to accept again")
    return pins, notes


def _newly_accepted(config: RunConfig) -> tuple[list[Pin], list[str]]:
    pins, lines = renewed_pins(Path(config.run_dir), config.data)
    return pins, [f"accepted: {line}" for line in lines]


def keep_accepted(config: RunConfig, pins: Sequence[Pin]) -> None:
    """Write the pins of a run that accepts another dataset, when nothing else refuses it any more. For one process."""
    if "dataset" in config.accept:
        write_pins(Path(config.run_dir), pins, accepted=True)


def _as_pin(values: dict[str, Any]) -> Pin:
    shards = tuple(ShardInfo(**shard) for shard in values["shards"])
    return Pin(path=values["path"], split=values["split"], shards=shards)


def pins_digest(pins: Sequence[Pin]) -> str:
    """The digest of the training data of a run."""
    return datasets_digest([pin.digest for pin in pins])


def open_pinned(pins: Sequence[Pin], data: DataConfig) -> Mixture:
    """The pinned shards of all datasets, to train on.

    Raises:
        UserError: an index cannot be had, a split is empty, a weight is too small, or the cache is.
    """
    _check_cache(pins, data)
    cache = ShardCache.of(data.cache_dir, data.cache_gib)
    datasets = []
    for pin in pins:
        # What is open cannot leave the cache: no more than the shards of a block. And 1,024 is a common limit of open
        # files in a process.
        most = data.block_shards if is_url(pin.path) else max(4, 512 // len(pins))
        datasets.append(
            ShardedDataset(pin.path, pin.split, shards=pin.shards, cache=cache, max_open_files=min(most, 64))
        )
    return Mixture(datasets, [part.weight for part in data.train])


def _check_cache(pins: Sequence[Pin], data: DataConfig) -> None:
    """Two blocks of each dataset are in use at once, where one ends and the next begins."""
    num_bytes = 0
    for pin in pins:
        if is_url(pin.path):
            num_bytes += sum(sorted(shard.num_bytes for shard in pin.shards)[-2 * data.block_shards :])
    if num_bytes > data.cache_gib * GIB:
        raise UserError(
            f"data.cache_gib {data.cache_gib:g}: two blocks of {data.block_shards} shards of each dataset are "
            f"{num_bytes / GIB:.3g} GiB, so every shard would be fetched many times; expected at least that much, or "
            "fewer data.block_shards"
        )


def _lost(pin: Pin, here: Pin) -> list[str]:
    """What became of pinned shards that are not here as they were."""
    there = {shard.path: (shard.sha256, shard.index_sha256) for shard in here.shards}
    return [
        f"{shard.path} is {'changed' if shard.path in there else 'gone'}"
        for shard in pin.shards
        if there.get(shard.path) != (shard.sha256, shard.index_sha256)
    ]


def _listed(lost: Sequence[str]) -> str:
    more = [f"{len(lost) - MAX_NAMED} more"] if len(lost) > MAX_NAMED else []
    return ", ".join([*lost[:MAX_NAMED], *more])
