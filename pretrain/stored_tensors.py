"""What a checkpoint holds: tensors put together from the slices of its ranks, and a model's weights from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.checkpoint import read_description


def slice_key(name: str, start: int) -> str:
    """Under which key a file holds the elements from `start` on of a flattened tensor."""
    return f"{name}@{start}"


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint, each put together from its slices when it is asked for.

    Names: `weight/NAME`, `buffer/NAME`, `exp_avg/NAME`, ... A file holds a whole tensor under its name, or a slice of
    it under `slice_key`.

    Raises:
        UserError: a file cannot be opened, or slices are missing.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        description = read_description(checkpoint)
        self._files: dict[str, Any] = {}
        for name in sorted(description["files"]):
            try:
                stored = safe_open(checkpoint / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"checkpoint {checkpoint / name}: cannot be opened: {error}") from error
            self._files |= dict.fromkeys(stored.keys(), stored)
        self._slices: dict[str, list[tuple[int, str]]] = {}
        for key in self._files:
            name, at, start = key.rpartition("@")
            if at:
                self._slices.setdefault(name, []).append((int(start), key))
        self._shapes: dict[str, tuple[int, ...]] = {n: tuple(description["shapes"][n]) for n in self._slices}
        self._shapes |= {key: self._stored_shape(key) for key in self._files if "@" not in key}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._slices:
            return self._read(name)
        parts = [(start, self._read(key)) for start, key in sorted(self._slices[name])]
        ends = [0, *(start + len(part) for start, part in parts)]
        whole = math.prod(self._shapes[name])
        if [start for start, _ in parts] != ends[:-1] or ends[-1] != whole:
            raise UserError(f"checkpoint {self.checkpoint}: slices of {name} do not make its {whole} elements")
        return torch.cat([part for _, part in parts]).view(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._shapes[name]

    def _read(self, key: str) -> Tensor:
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

    def _stored_shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._files[key].get_slice(key).get_shape())


def persistent_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def load_weights(
    model: torch.nn.Module, tensors: StoredTensors, leave: Sequence[str] = (), fresh: Sequence[str] = ()
) -> list[str]:
    """Put weights and buffers into `model`, before the engine takes it.

    leave: beginnings of names whose weights stay as they are where the checkpoint has no such weight of that shape.
    fresh: beginnings of names whose weights stay as they are whatever it has. Returns a line for each weight that was
    left for its shape.

    Raises:
        UserError: names or shapes do not fit.
    """
    wanted = {f"weight/{name}": tuple(p.shape) for name, p in model.named_parameters()}
    wanted |= {f"buffer/{name}": tuple(b.shape) for name, b in persistent_buffers(model).items()}
    found = {key: tensors.shape(key) for key in tensors if key.startswith(("weight/", "buffer/"))}
    state = model.state_dict()
    notes = []
    for key in sorted(set(wanted) | set(found)):
        here, there = wanted.get(key), found.get(key)
        name = key.split("/", 1)[1]
        if name.startswith(tuple(fresh)):
            continue
        if here == there:
            with torch.no_grad():
                state[name].copy_(tensors[key])
        elif name.startswith(tuple(leave)):
            notes.append(f"{key} is {_shape(there)} in {tensors.checkpoint}, {_shape(here)} here: not taken")
        else:
            raise UserError(
                f"checkpoint {tensors.checkpoint} is of another model: {key} is {_shape(there)} there, "
                f"{_shape(here)} here"
            )
    return notes


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
