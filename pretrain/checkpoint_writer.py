"""Writes checkpoints while training goes on.

    begin     every rank copies its share of the state to the host: the only part that a step waits for
    (thread)  writes the share under a temporary name, hashes it, makes it durable
    finish    all ranks agree that all shares are there; rank 0 commits them by one rename, and prunes

At most one checkpoint is under way: the next `begin` first waits for it, so the host holds one copy of the state. The
ranks speak in `begin` and `finish` only, never from the thread. A kill at any moment leaves whole checkpoints only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.settings import UserError
from data_pipeline.shards import publish, write_json
from pretrain.checkpoint import FORMAT_VERSION, Progress, checkpoint_name, checkpoints_folder, prune
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.identity import Identity
from pretrain.stored_tensors import persistent_buffers, slice_key
from pretrain.tensor_file import write_tensors

MAX_ERRNO = 1 << 16


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A checkpoint under way. written: this rank's share; holds its OSError if there was one."""

    progress: Progress
    final: Path
    partial: Path
    written: Future[None]


class CheckpointWriter:
    """Saves the state of `engine` into the folder of a run. All ranks make the same calls in the same order."""

    def __init__(self, config: RunConfig, engine: Engine, identity: Identity, world: World) -> None:
        self._config, self._engine, self._identity, self._world = config, engine, identity, world
        self._run = Path(config.run_dir)
        self._owners = _owners(engine.model, world.size)
        self._host: dict[str, Tensor] = {}  # reused: fresh pages cost as much as the copy itself
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    @property
    def written(self) -> bool:
        """Whether this rank has written its share of the checkpoint under way. When all have, call `finish`."""
        return self._pending is not None and self._pending.written.done()

    def begin(self, progress: Progress) -> None:
        """Start to save; waits for the checkpoint before this one. Committed by `finish`.

        Raises:
            UserError: as `finish`, of the one before; or the folder cannot be made.
        """
        self.finish()
        final = checkpoints_folder(self._run) / checkpoint_name(progress.step)
        partial = final.with_name(f".{final.name}.partial")
        problem: OSError | None = None
        try:
            if self._world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            problem = error
        self._agree(problem, final, partial)
        share = self._copy_share()
        written = self._thread.submit(_write_share, partial, share, self._world.rank)
        self._pending = _Pending(progress=progress, final=final, partial=partial, written=written)
        if not self._config.checkpoint.asynchronous:
            self.finish()
            self._host.clear()

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one, and commit it.

        Raises:
            UserError: on every rank, when any rank could not write; earlier checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        problem: OSError | None = None
        try:
            pending.written.result()
        except OSError as error:
            problem = error
        self._agree(problem, pending.final, pending.partial)
        try:
            if self._world.rank == 0:
                self._commit(pending)
        except OSError as error:
            problem = error
        self._agree(problem, pending.final, pending.partial)

    def close(self) -> None:
        """Let a write that is under way come to its end; it is not committed."""
        self._thread.shutdown()

    def _copy_share(self) -> dict[str, Tensor]:
        """The slices that lie on this rank, copied to the host."""
        share: dict[str, Tensor] = {}
        for name, parameter in self._engine.model.named_parameters():
            is_owner = self._owners[name] == self._world.rank
            for kind, part in self._engine.own_slices(parameter, is_owner).items():
                key = slice_key(f"{kind}/{name}", part.start)
                share[key] = self._to_host(key, part.values)
        if self._world.rank == 0:
            buffers = persistent_buffers(self._engine.model)
            share |= {f"buffer/{name}": self._to_host(f"buffer/{name}", value) for name, value in buffers.items()}
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        return share

    def _to_host(self, key: str, value: Tensor) -> Tensor:
        on_gpu = value.device.type == "cuda"
        if key not in self._host:
            self._host[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_gpu)
        return self._host[key].copy_(value.detach(), non_blocking=on_gpu)

    def _commit(self, pending: _Pending) -> None:
        config = self._config.model_dump(mode="json")
        description = {
            "format_version": FORMAT_VERSION,
            "progress": asdict(pending.progress),
            "identity": asdict(self._identity),
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "config": config,
            "num_ranks": self._world.size,
            "shapes": self._shapes(),
            "files": _collect_digests(pending.partial),
        }
        write_json(pending.partial / "checkpoint.json", description)
        if pending.final.exists():  # damaged, or this step is saved again: set aside in one rename
            os.replace(pending.final, pending.final.with_name(f".{pending.final.name}.old.partial"))
        publish(pending.partial, pending.final)
        keep = self._config.checkpoint
        prune(self._run, keep.keep_last, pending.progress.best_step, keep.keep_every_steps)

    def _shapes(self) -> dict[str, list[int]]:
        """Of what is stored in slices."""
        shapes: dict[str, list[int]] = {}
        for name, parameter in self._engine.model.named_parameters():
            kinds = ("weight", *(self._engine.moment_names if parameter.requires_grad else ()))
            shapes |= {f"{kind}/{name}": list(getattr(parameter, "ds_shape", parameter.shape)) for kind in kinds}
        return shapes

    def _agree(self, problem: OSError | None, final: Path, partial: Path) -> None:
        """All ranks go on, or all raise with the same reason, that of the highest rank that has one."""
        mine = 0 if problem is None else (self._world.rank + 1) * MAX_ERRNO + (problem.errno or errno.EIO)
        worst = int(self._world.max(torch.tensor([mine], device=self._world.device)).item())
        if worst == 0:
            return
        rank, number = worst // MAX_ERRNO - 1, worst % MAX_ERRNO
        if self._world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self._world.barrier()
        raise UserError(
            f"checkpoint {final}: cannot save, rank {rank}: {os.strerror(number)}; earlier checkpoints are whole, "
            "the run resumes from them"
        )


def _owners(model: nn.Module, num_ranks: int) -> dict[str, int]:
    """Which rank writes what all hold whole: the largest first, each to the rank with the least so far."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    loads = [0] * num_ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def _write_share(partial: Path, tensors: dict[str, Tensor], rank: int) -> None:
    name = f"state-{rank:05d}.safetensors"
    sha256 = write_tensors(partial / f".{name}", tensors)
    publish(partial / f".{name}", partial / name)
    write_json(partial / f"{name}.sha256.json", sha256)


def _collect_digests(partial: Path) -> dict[str, Any]:
    files = {}
    for path in sorted(partial.glob("state-*.safetensors")):
        side = path.with_name(f"{path.name}.sha256.json")
        files[path.name] = json.loads(side.read_text())
        side.unlink()
    return files
