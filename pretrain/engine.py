"""The only file that knows DeepSpeed: one gradient reduction a step, no factor of world size, state by parameter name.

Facts this file answers for (DeepSpeed 0.19.8): several `engine.backward` calls a step without
`coalesce_grad_reduction()` give wrong updates under ZeRO 1 and 2 without a warning, so `backward` works inside
`coalesced()` only; gradients are averaged over ranks, which is undone here, once; `gradient_clipping` defaults to 1.0
and other defaults move between releases, so every one that changes numbers is written out.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.collectives import World
from pretrain.config import RunConfig

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


def deepspeed_config(config: RunConfig, world: World) -> dict[str, Any]:
    """The whole configuration that DeepSpeed gets; nothing that changes numbers is left to its defaults."""
    local_batch = config.train.global_batch // world.size
    on_gpu = world.device.type == "cuda"
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": on_gpu}} if config.train.offload_optimizer else {}
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.grad_clip,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},  # bf16 is autocast inside the towers; weights, gradients and moments stay fp32
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.train.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_partitions": True,
            "allgather_bucket_size": 50_000_000,
            "round_robin_gradients": False,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "memory_efficient_linear": True,
            **offload,
        },
        "communication_data_type": "fp32",
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Elements from `start` on of a flattened tensor."""

    start: int
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a step did. grad_norm: before clipping. applied: false where the gradient was not finite on some rank."""

    grad_norm: float
    applied: bool


class Engine:
    """A model under DeepSpeed ZeRO with torch's AdamW or SGD.

    Call it like the model. Gradients: any number of `backward` calls inside one `coalesced()` block, then `step`.

    Args:
        model: on its device; all ranks hold equal weights.
        groups: parameter groups of the optimizer; every trainable parameter of `model` once.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: RunConfig, world: World) -> None:
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints that it has built its collectives
            import deepspeed

            chosen = config.optimizer
            optimizer = (
                torch.optim.AdamW(groups, lr=chosen.lr, betas=chosen.betas, eps=chosen.eps)
                if chosen.name == "adamw"
                else torch.optim.SGD(groups, lr=chosen.lr)
            )
            self.deepspeed_config = deepspeed_config(config, world)
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=self.deepspeed_config, dist_init_required=False
            )
        self.model = model
        self.world = world
        self.moment_names = MOMENTS[config.optimizer.name]
        self.num_reductions = 0  # gradient reductions so far: one a step
        self._stage = config.train.zero_stage
        self._inside = False
        self._create_moments(num_updates=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. Under ZeRO-3 submodules must not be called directly."""
        return self._engine(*args, **kwargs)

    def train(self, mode: bool) -> None:
        """Training mode (dropout) on or off."""
        self._engine.train(mode)

    @contextmanager
    def coalesced(self) -> Iterator[None]:
        """All `backward` calls of one step go in here; gradients are reduced over ranks once, on leaving."""
        self._inside = True
        try:
            with self._engine.no_sync() if self._stage == 0 else self._engine.coalesce_grad_reduction():
                yield
        finally:
            self._inside = False
        if self._stage == 0:
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.allreduce_gradients()
        self.num_reductions += 1

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of `surrogate` (a scalar); summed over ranks it is the gradient of the loss.

        Raises:
            RuntimeError: called outside `coalesced()`.
        """
        if not self._inside:
            raise RuntimeError("Engine.backward outside of Engine.coalesced(): ZeRO would silently lose gradients")
        self._engine.backward(surrogate * self.world.size)  # DeepSpeed divides by the number of ranks

    def step(self, lr: float) -> Update:
        """Clip, update with learning rate `lr`, clear gradients.

        Where the norm of the whole gradient is not finite, weights and moments stay as they were, on all ranks.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.set_gradient_accumulation_boundary(True)
        if self._stage > 0:  # DeepSpeed leaves out an update whose norm is not finite
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            return Update(grad_norm=norm, applied=self._engine.was_step_applied())
        gradients = [p.grad for _, p in self.trainable() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self._engine.step()
            return Update(grad_norm=norm, applied=True)
        self._engine.zero_grad()
        return Update(grad_norm=norm, applied=False)

    @torch.no_grad()
    def move_average(self, average: nn.Module, source: nn.Module, keep: float) -> None:
        """average = keep * average + (1 - keep) * source, parameter by parameter; both are parts of the model."""
        for mean, now in zip(average.parameters(), source.parameters(), strict=True):
            own, new = (getattr(part, "ds_tensor", part) for part in (mean, now))  # under ZeRO-3 a rank's slices
            own.lerp_(new.to(own.device), 1 - keep)
        for mean_buffer, buffer in zip(average.buffers(), source.buffers(), strict=True):
            mean_buffer.copy_(buffer)

    def full_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The reduced gradient of a parameter, whole, between `coalesced()` and `step`. A collective call."""
        if self._stage == 0:
            assert parameter.grad is not None
            return parameter.grad.detach().clone()
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
        assert isinstance(gradient, Tensor)
        return gradient

    def full_weight(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's fp32 values, whole. A collective call."""
        if self._stage < 3:
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's moments of a trainable parameter, whole, in its shape. A collective call."""
        if self._stage == 0:
            state = self._engine.optimizer.state[parameter]
            return {key: state[key] for key in self.moment_names}
        from deepspeed.utils import safe_get_full_optimizer_state

        return {key: safe_get_full_optimizer_state(parameter, key) for key in self.moment_names}

    def own_slices(self, parameter: nn.Parameter, is_owner: bool) -> dict[str, Slice]:
        """The part of a parameter's "weight" and moments that lies on this rank; over all ranks every element once.

        is_owner: this rank answers for what all ranks hold whole. No collective call, and nothing is copied.
        """
        if self._stage == 3:
            return self._zero3_slices(parameter)
        if self._stage == 0 or not parameter.requires_grad:
            if not is_owner:
                return {}
            held = {"weight": parameter.detach(), **(self.moments(parameter) if parameter.requires_grad else {})}
            return {key: Slice(start=0, values=value.reshape(-1)) for key, value in held.items()}
        fragment = getattr(parameter, "_hp_mapping", None)  # of fp32 ("high precision") weights and moments
        if fragment is None:
            return {}
        start = fragment.lp_fragment_address.start
        held = {"weight": fragment.get_hp_fragment()}
        held |= {key: fragment.get_hp_fragment(optim_state_key=key) for key in self.moment_names}
        return {key: Slice(start=start, values=value.detach().reshape(-1)) for key, value in held.items()}

    def _zero3_slices(self, parameter: nn.Parameter) -> dict[str, Slice]:
        partition: Tensor = getattr(parameter, "ds_tensor")  # noqa: B009 - put there by DeepSpeed
        whole = int(getattr(parameter, "ds_numel"))  # noqa: B009
        start = self.world.rank * partition.numel()
        held = {"weight": partition.detach()}
        if parameter.requires_grad:
            state = self._engine.optimizer._get_fp32_opt_state_partition
            held |= {key: state(parameter, False, key)[0].detach() for key in self.moment_names}
        length = max(0, min(partition.numel(), whole - start))  # the last slices are padded
        return {key: Slice(start=start, values=value[:length]) for key, value in held.items() if length}

    def _create_moments(self, num_updates: int) -> None:
        """Moments of zero, made before the first update: so they can be read and written at any time."""
        if not self.moment_names:
            return
        zero = self._engine.optimizer
        base = zero if self._stage == 0 else zero.optimizer
        updated = [tensor for group in base.param_groups for tensor in group["params"]]
        for tensor in zero.fp32_partitioned_groups_flat if self._stage == 3 else updated:
            zeros = {key: torch.zeros_like(tensor, memory_format=torch.preserve_format) for key in self.moment_names}
            base.state[tensor] = {"step": torch.tensor(float(num_updates)), **zeros}
        if self._stage in (1, 2):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def set_moments(self, moments: Mapping[str, Tensor], num_updates: int) -> None:
        """Give every trainable parameter its moments ("exp_avg/NAME", whole) and the optimizer its count of updates.

        Those that are not given, or are of another shape, are zero. Each rank keeps the slices it owns, so ranks and
        ZeRO stage may differ from those that saved them.
        """
        self._create_moments(num_updates)
        for name, parameter in self.trainable():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for key in self.moment_names:
                moment = moments.get(f"{key}/{name}")
                if moment is not None and moment.shape == shape:
                    self._set_moment(parameter, key, moment.to(parameter.device))

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self._stage == 0:
            self._engine.optimizer.state[parameter][key].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        if self._stage == 3:  # slices are padded to equal lengths over the ranks
            padding = -value.numel() % self.world.size
            value = nn.functional.pad(value.flatten(), (0, padding))
            self._set_slice_zero3(parameter, key, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _set_slice_zero3(self, parameter: nn.Parameter, key: str, padded: Tensor) -> None:
        partition, _ = self._engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)
        start = self.world.rank * partition.numel()
        partition.copy_(padded[start : start + partition.numel()])

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained, in the model's order."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()
        if self._stage == 3:  # it replaced torch's linear map for the whole process; in bf16 its own rounds otherwise
            from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Replaced

            torch.nn.functional.linear = Replaced.linear_bk


def prepare_environment() -> None:
    """Choose DeepSpeed's accelerator and keep its notices quiet; called before it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # DeepSpeed 0.19 calls collectives by the names torch 2.13 gave up.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
