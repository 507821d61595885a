"""The `fsdp_config` sections: how a model is sharded, and where it waits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from verl.models.loading import trained_dtype
from verl.trainer.config.fields import ON_GPU, Dtype, Flag, Section, Whole, told


@dataclass(frozen=True, kw_only=True)
class Sharding(Section):
    """What all models have."""

    offload_policy: Annotated[Flag, ON_GPU]
    reshard_after_forward: Flag
    fsdp_size: Whole

    def mistakes(self, name: str, processes: int) -> Iterator[str]:
        """A line for each, of the section `name`, which is sharded over so many processes."""
        for key in ("param_offload", "optimizer_offload"):
            if self.offload_policy and getattr(self, key, False):
                yield (
                    f"{name}: {key} and offload_policy exclude each other (offload_policy keeps weights and optimiser "
                    "in CPU memory at all times); set one of them to false"
                )
        size = self.fsdp_size
        if size == 0 or size < -1 or (size > 0 and processes % size):
            yield (
                f"{name}.fsdp_size={size} must divide the {processes} processes (trainer.nnodes * "
                "trainer.n_gpus_per_node), or be -1 for all of them"
            )


@dataclass(frozen=True, kw_only=True)
class FrozenPlacement(Sharding):
    """Of a model that is not trained: the reference policy."""

    param_offload: Annotated[Flag, ON_GPU]
    compute_dtype: Dtype | None


@dataclass(frozen=True, kw_only=True)
class TrainedPlacement(FrozenPlacement):
    """Of policy and critic."""

    optimizer_offload: Annotated[Flag, ON_GPU]
    model_dtype: Dtype | None

    def mistakes(self, name: str, processes: int) -> Iterator[str]:
        """Also dtypes in which nothing can be trained."""
        for key in ("model_dtype", "compute_dtype"):
            if (dtype := getattr(self, key)) is not None:
                yield from told(trained_dtype, dtype, f"{name}.{key}")
        yield from super().mistakes(name, processes)
