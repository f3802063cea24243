"""What the loader hands to the trainer: the rows of one rank, decoded, on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

Inputs = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LoadEvent:
    """A modality of a sample that should be there and could not be had; its row is masked."""

    key: str
    modality: str
    reason: str
    dataset: int = 0  # its number, where several are mixed


@dataclass(frozen=True, kw_only=True)
class Batch:
    """n samples. What is missing is zero in the tensors, false in every mask.

    keys: of the samples, unique in one dataset. ids: their index in the dataset split, or in all that are mixed, one
    after the other; equal ids are the same sample. epochs: of its dataset, in which each is seen. present: which
    rows have the modality. inputs: by modality and name,

        video   frames uint8 [n, T, H, W, 3] RGB    frame_mask bool [n, T]
        audio   waveform int16 [n, S] mono          num_samples int64 [n], the valid length of each row
        text    token_ids int64 [n, L]              token_mask bool [n, L]

    augmented: the same for a second view of each sample, drawn otherwise; None: nobody asked for one.

    position, next_position: where the *global* batch begins in the run's sequence of samples, and where the next does.
    events: what could not be read, with the reason.
    """

    keys: list[str]
    ids: Int64[Tensor, " samples"]
    epochs: Int64[Tensor, " samples"]
    present: dict[str, Bool[Tensor, " samples"]]
    inputs: Inputs
    position: int
    next_position: int
    events: list[LoadEvent]
    augmented: Inputs | None = None

    @property
    def num_samples(self) -> int:
        """Rows of this batch."""
        return len(self.keys)

    def chunk(self, start: int, stop: int, device: torch.device | str = "cpu") -> tuple[Inputs, dict[str, Tensor]]:
        """`inputs` and `present` of rows [start, stop) on `device`; copies from pinned memory do not block."""
        present = {name: mask[start:stop].to(device, non_blocking=True) for name, mask in self.present.items()}
        return _cut(self.inputs, start, stop, device), present

    def augmented_chunk(self, start: int, stop: int, device: torch.device | str = "cpu") -> Inputs | None:
        """The second view of these rows, if there is one."""
        return None if self.augmented is None else _cut(self.augmented, start, stop, device)

    def pin_memory(self) -> Batch:
        """The same batch with page-locked inputs; torch's DataLoader calls this."""
        present = {name: mask.pin_memory() for name, mask in self.present.items()}
        augmented = None if self.augmented is None else _map(self.augmented, Tensor.pin_memory)
        return replace(self, inputs=_map(self.inputs, Tensor.pin_memory), augmented=augmented, present=present)

    def share_memory(self) -> None:
        """Move all tensors to memory that another process can map.

        Raises:
            RuntimeError: there is no room for them.
        """
        both = [*self.inputs.values(), *(self.augmented or {}).values()]
        inputs = [tensor for tensors in both for tensor in tensors.values()]
        for tensor in (self.ids, self.epochs, *self.present.values(), *inputs):
            tensor.share_memory_()


def _cut(inputs: Inputs, start: int, stop: int, device: torch.device | str) -> Inputs:
    return _map(inputs, lambda tensor: tensor[start:stop].to(device, non_blocking=True))


def _map(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    return {modality: {name: function(t) for name, t in tensors.items()} for modality, tensors in inputs.items()}
