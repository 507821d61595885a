"""Model shards that verl 0.3 writes: `model_world_size_N_rank_R.pt`, of DTensors or ShardedTensors.

The files are read as mapped data, without a process group and without unpickling any class of torch.distributed, whose
layouts change between versions of torch: stand-ins keep what was stored, and only the local shards, their placements
and offsets are looked at. A file that holds anything else is refused, for unpickling it could run its code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl.checkpoints.plain_values import StandIn, nothing_but_tensors, stored_fields
from xbai.errors import UserError

Part = tuple[Tensor, Sequence[int]]
"""A piece of a tensor, and where in it the piece begins."""

FILE_PATTERN = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


class VerlShards:
    """The shards in `.../global_step_N/actor`.

    Raises:
        UserError: a rank's file is missing, damaged or holds something other than tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ranks = [_load(path) for path in _rank_files(folder)]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Names, whole shapes and dtypes (on the meta device)."""
        return {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in self._ranks[0].items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors; a `UserError` where the ranks' parts do not make them up, or are laid out as FSDP does not."""
        return {name: self._whole(name) for name in names}

    def _whole(self, name: str) -> Tensor:
        if lacking := [rank for rank, state in enumerate(self._ranks) if name not in state]:
            raise UserError(f"{self._folder}: rank {lacking[0]} has no part of {name}")
        values = [state[name] for state in self._ranks]
        if not isinstance(values[0], _Sharded):
            return values[0]
        parts = self._dtensor_parts(name, values) if values[0].is_dtensor else _sharded_tensor_parts(values)
        whole, filled = torch.empty(values[0].shape, dtype=values[0].dtype), 0
        for part, offsets in parts:
            # Of a damaged file there may be too few offsets, or too many: that shows in the shape.
            region = tuple(slice(offset, offset + size) for offset, size in zip(offsets, part.shape, strict=False))
            if whole[region].shape != part.shape:
                raise UserError(f"{self._folder}: a part of {name} lies outside of its shape {list(whole.shape)}")
            whole[region] = part
            filled += part.numel()
        if filled != whole.numel():
            raise UserError(f"{self._folder}: the parts of {name} do not make up its shape {list(whole.shape)}")
        return whole

    def _dtensor_parts(self, name: str, values: Sequence[_Sharded]) -> Iterator[Part]:
        placements = values[0].stored["_spec"].stored["placements"]
        kinds = [type(placement).__name__ for placement in placements]
        if kinds.count("Shard") > 1 or not set(kinds) <= {"Shard", "Replicate"}:
            raise UserError(f"{self._folder}: {name} is laid out as {kinds}; only FSDP and HSDP shards can be read")
        parts = [value.stored["_local_tensor"] for value in values]
        # HSDP has one copy in every run of consecutive ranks, FSDP one in all.
        copies = sum(part.numel() for part in parts) // max(1, values[0].numel())
        one_copy = parts[: max(1, len(parts) // max(1, copies))]
        dim = placements[kinds.index("Shard")].stored["dim"] if "Shard" in kinds else 0
        offset = 0
        for part in one_copy:
            yield part, [offset if d == dim else 0 for d in range(part.dim())]
            offset += part.shape[dim] if part.dim() else 0


def _sharded_tensor_parts(values: Iterable[_Sharded]) -> Iterator[Part]:
    for value in values:
        for shard in value.stored[0]:
            yield shard.stored["tensor"], shard.stored["metadata"].stored["shard_offsets"]


def has_verl_shards(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return any(FILE_PATTERN.fullmatch(path.name) for path in folder.glob("model_world_size_*.pt"))


def _rank_files(folder: Path) -> list[Path]:
    found = [FILE_PATTERN.fullmatch(path.name) for path in sorted(folder.glob("model_world_size_*.pt"))]
    world_sizes = {int(name[1]) for name in found if name}
    if len(world_sizes) != 1:
        raise UserError(f"{folder}: shards of {sorted(world_sizes)} ranks lie together; leave those of one run")
    (world_size,) = world_sizes
    files = [folder / f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {world_size} ranks); copy all ranks here"
        )
    return files


class _Sharded(Tensor):
    """A DTensor or ShardedTensor in a file: the whole's shape and dtype, and what this rank had stored of it."""

    stored: Any
    is_dtensor: bool

    def __setstate__(self, state: Any) -> None:
        self.stored = stored_fields(state)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as if it were of an instance.
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{cls.__name__} only holds parts")


class _DTensor(_Sharded):
    is_dtensor = True


class _ShardedTensor(_Sharded):
    is_dtensor = False


def _load(path: Path) -> dict[str, Any]:
    with nothing_but_tensors(path), _no_safe_globals():
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = [(_stand_in(name), name) for name in names if _is_known(name)]
        with torch.serialization.safe_globals([StandIn, *stand_ins]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


@contextmanager
def _no_safe_globals() -> Iterator[None]:
    """Stand-ins must also take the places of classes that torch.distributed has declared safe when imported."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(before)


def _is_known(name: str) -> bool:
    return name == "builtins.getattr" or name.startswith("torch.distributed.")


def _stand_in(name: str) -> Any:
    if name == "builtins.getattr":
        return _nested_class
    last = name.rpartition(".")[2]
    bases = {"DTensor": _DTensor, "ShardedTensor": _ShardedTensor}
    return bases.get(last) or type(last, (StandIn,), {})


def _nested_class(owner: Any, name: str) -> type[StandIn]:
    """A class inside of a class (ShardedTensor's process group state) is pickled as a call of getattr."""
    return StandIn
