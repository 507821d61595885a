"""A model on this rank: sharded over all ranks, with its optimiser where it is trained, and where both of them wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar, overload

import torch
from torch import nn

from verl.models.fsdp import create_mesh, local_device, move_optimizer, reshard, shard_model
from verl.models.loading import torch_dtype
from verl.optim.optimizers import Optimizers
from verl.trainer.config.schema import FrozenPlacement, TrainedPlacement

Model_co = TypeVar("Model_co", bound=nn.Module, covariant=True)
Optimizer_co = TypeVar("Optimizer_co", bound=Optimizers | None, covariant=True)


class Dtypes(NamedTuple):
    """What weights are kept in, and what they are cast to for multiplying."""

    stored: torch.dtype
    compute: torch.dtype

    @classmethod
    def from_config(cls, fsdp_config: FrozenPlacement, on_gpu: bool | None = None) -> Dtypes:
        """From `model_dtype` and `compute_dtype`.

        By default float32 weights are multiplied in bfloat16 on a GPU, ten times faster, and as they are on CPU.

        Args:
            fsdp_config: a model's section of this name.
            on_gpu: where it is multiplied; None for this rank's device.
        """
        kept = fsdp_config.model_dtype if isinstance(fsdp_config, TrainedPlacement) else None
        stored = torch_dtype(kept or "float32")
        if fsdp_config.compute_dtype is not None:
            return cls(stored, torch_dtype(fsdp_config.compute_dtype))
        on_gpu = local_device().type == "cuda" if on_gpu is None else on_gpu
        return cls(stored, torch.bfloat16 if on_gpu else stored)


class PlacedModel(Generic[Model_co, Optimizer_co]):
    """Policy, reference and critic are three of these.

    Between two uses the weights wait in CPU memory with `param_offload`, and the optimiser's state with
    `optimizer_offload`; with `offload_policy` FSDP2 itself keeps both there and fetches each layer when it is needed.

    Args:
        model: whole, on the CPU, with the same weights on every rank; it is sharded in place. One that is trained is
            kept in `model_dtype`, another, or one whose base is frozen, as it was loaded.
        fsdp_config: the model's section of this name.
        build_optimizer: makes the optimiser of the sharded model; None for one that is not trained.

    Attributes:
        model: the sharded model.
        optimizer: its optimiser, or None.

    Raises:
        UserError: `offload_policy` without a GPU, or an `fsdp_size` that does not divide the ranks.
    """

    @overload
    def __init__(self: PlacedModel[Model_co, None], model: Model_co, fsdp_config: FrozenPlacement) -> None: ...

    @overload
    def __init__(
        self, model: Model_co, fsdp_config: TrainedPlacement, build_optimizer: Callable[[Model_co], Optimizer_co]
    ) -> None: ...

    def __init__(
        self,
        model: Model_co,
        fsdp_config: FrozenPlacement,
        build_optimizer: Callable[[Model_co], Any] | None = None,
    ) -> None:
        self._offloads_model = fsdp_config.param_offload
        self._offloads_optimizer = isinstance(fsdp_config, TrainedPlacement) and fsdp_config.optimizer_offload
        dtypes = Dtypes.from_config(fsdp_config)
        mesh = create_mesh(fsdp_config.fsdp_size)
        # To what is not trained more bits than its checkpoint has are nothing but memory.
        is_trained = build_optimizer is not None and all(weight.requires_grad for weight in model.parameters())
        stored = dtypes.stored if is_trained else None
        self.model = shard_model(
            model,
            mesh,
            dtypes.compute,
            stored,
            reshards=fsdp_config.reshard_after_forward,
            offload=fsdp_config.offload_policy,
        )
        optimizer: Any = None if build_optimizer is None else build_optimizer(self.model)
        self.optimizer: Optimizer_co = optimizer
        # The next model that comes to the device finds room.
        self._offload()

    @contextmanager
    def on_device(self, with_optimizer: bool = False) -> Iterator[None]:
        """Have the weights, and the optimiser's state where asked for, on this rank's device inside."""
        if self._offloads_model:
            self.model.to(local_device())
        if self._offloads_optimizer and with_optimizer:
            self._move_optimizer(local_device())
        try:
            yield
        finally:
            self._offload()

    def _offload(self) -> None:
        reshard(self.model)
        if self._offloads_model:
            self.model.to("cpu")
        if self._offloads_optimizer:
            self._move_optimizer("cpu")
        if local_device().type == "cuda":
            # A rollout engine in this process takes its memory from the device, not from torch's cache.
            torch.cuda.empty_cache()

    def _move_optimizer(self, device: torch.device | str) -> None:
        for optimizer in {} if self.optimizer is None else self.optimizer.optimizers.values():
            move_optimizer(optimizer, device)
