"""Bytes that autograd keeps for backward, measured where no allocator counts them: on a CPU."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn


class _Kept:
    """A saved tensor; the graph's node holds it, so its end is the end of the activation."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Inside, counts what is saved for backward, each storage once, without the parameters of `model`.

    peak_bytes: by stage, the most that was alive while it ran; of the innermost stage only.
    """

    def __init__(self, model: nn.Module) -> None:
        self.peak_bytes: defaultdict[str, int] = defaultdict(int)
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._uses: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self._alive = 0
        self._stages: list[str] = ["outside"]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, at)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count under `name` now."""
        self._stages.append(name)
        self._note()
        try:
            yield
        finally:
            self._stages.pop()

    def _note(self) -> None:
        stage = self._stages[-1]
        self.peak_bytes[stage] = max(self.peak_bytes[stage], self._alive)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self._parameters:
            return kept
        if not self._uses[place]:
            self._sizes[place] = storage.nbytes()
            self._alive += self._sizes[place]
        self._uses[place] += 1
        weakref.finalize(kept, self._release, place)
        self._note()
        return kept

    def _release(self, place: int) -> None:
        self._uses[place] -= 1
        if not self._uses[place]:
            self._alive -= self._sizes.pop(place)
