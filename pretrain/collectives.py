"""The few collectives the loss needs, with the gradients they must have; one process is the trivial case."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks that share a global batch. Every rank holds equally many rows, rank r the r-th block of them.

    device: where this rank computes, and where the tensors of its collectives live. around(): a context around each
    exchange with other ranks, for timing; it includes the wait for the slowest of them.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    def gather_rows(self, local: Tensor) -> Tensor:
        """[n, ...] on each rank -> [size * n, ...] in rank order on all; backward sums the gradients of all ranks."""
        if self.size == 1:
            return local
        gathered = _GatherRows.apply(local, self)
        assert isinstance(gathered, Tensor)
        return gathered

    def sum(self, value: Tensor) -> Tensor:
        """Element-wise sum over ranks, without gradient."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """Element-wise maximum over ranks, without gradient."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: Tensor, operation: Any) -> Tensor:
        result = value.detach().clone()
        if self.size > 1:
            with self.around():
                dist.all_reduce(result, op=operation)
        return result

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.max(torch.tensor([here], dtype=torch.int32, device=self.device)).item())

    def share(self, value: Any) -> Any:
        """What rank 0 passes, on all ranks; anything JSON can say."""
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.rank == 0 else b""
        length = torch.tensor([len(content)], device=self.device)
        dist.broadcast(length, src=0)
        wire = torch.zeros(int(length.item()), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            wire.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(wire, src=0)
        return json.loads(wire.cpu().numpy().tobytes())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, world: World) -> Tensor:
        ctx.world = world
        local = local.contiguous()
        # Booleans travel as bytes: not every backend takes them.
        wire = local.to(torch.uint8) if local.dtype == torch.bool else local
        gathered = wire.new_empty((world.size * wire.shape[0], *wire.shape[1:]))
        with world.around():
            dist.all_gather_single(gathered, wire)
        return gathered.to(local.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        world: World = ctx.world
        grad = grads[0].contiguous()
        own = grad.new_empty((grad.shape[0] // world.size, *grad.shape[1:]))
        with world.around():
            dist.reduce_scatter_single(own, grad, op=dist.ReduceOp.SUM)
        return own, None
