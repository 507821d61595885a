"""The batch that travels between the driver and the workers.

The columns of B rollouts, whose prompts are padded on the left to P and responses on the right to R tokens:

- `input_ids`, `attention_mask`, `position_ids` [B, P+R], `prompts` [B, P], `responses` and `response_mask` [B, R];
- `rollout_log_probs`, `old_log_probs`, `ref_log_prob`, `ref_kl`, `values` [B, R]: of the engine, of the policy before
  the update, of the reference, the KL to it summed over the vocabulary, of the critic;
- `entropys` [B, R], of the policy before the update; `rollout_scores` [B], of the engine; `kinds` [B], the same number
  for rows that hold the same tokens;
- `step_feature_mask` and `old_step_logits` [B, P+R];
- `token_level_scores`, `token_level_rewards`, `advantages`, `returns` [B, R];
- `graded` [B] bool, `correct` [B] float, `baselines` [B] (remax), `rival_scores` [B, m] (score losses that compare).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

Index = slice | list[int] | np.ndarray | Tensor


def object_array(values: Iterable[Any]) -> np.ndarray:
    """A 1-D object array; `np.array(values, dtype=object)` would make lists of equal length two-dimensional."""
    return np.fromiter(values, dtype=object)


class DataProto:
    """Rows with tensor columns, object columns, and facts about the whole batch.

    Args:
        batch: tensors of shape [rows, ...]; None when there is no tensor column.
        non_tensor_batch: NumPy arrays (mostly of objects) of shape [rows, ...].
        meta_info: anything that belongs to the batch and not to a row.

    `union` works in place, the other methods return a new batch.

    Attributes:
        tensors: as `batch` was given; `batch` itself is for whoever needs them.
    """

    def __init__(
        self,
        batch: TensorDict | None = None,
        non_tensor_batch: dict[str, np.ndarray] | None = None,
        meta_info: dict[str, Any] | None = None,
    ) -> None:
        self.tensors = batch
        self.non_tensor_batch = {} if non_tensor_batch is None else non_tensor_batch
        self.meta_info = {} if meta_info is None else meta_info
        self.check_consistency()

    @classmethod
    def from_single_dict(
        cls, data: Mapping[str, Tensor | np.ndarray], meta_info: dict[str, Any] | None = None
    ) -> DataProto:
        """Sort the columns of `data` into tensors and arrays."""
        tensors = {key: value for key, value in data.items() if isinstance(value, Tensor)}
        arrays = {key: value for key, value in data.items() if not isinstance(value, Tensor)}
        return cls.from_dict(tensors, arrays, meta_info)

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, Tensor] | None = None,
        non_tensors: Mapping[str, np.ndarray | Sequence[Any]] | None = None,
        meta_info: dict[str, Any] | None = None,
    ) -> DataProto:
        """Build a batch of columns that share their first dimension; plain sequences become object arrays.

        Raises:
            ValueError: columns of different lengths.
        """
        lengths = {key: len(value) for key, value in {**(tensors or {}), **(non_tensors or {})}.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        batch = TensorDict(dict(tensors), batch_size=[next(iter(lengths.values()))]) if tensors else None
        arrays = {
            key: value if isinstance(value, np.ndarray) else object_array(value)
            for key, value in (non_tensors or {}).items()
        }
        return cls(batch, arrays, meta_info or {})

    def check_consistency(self) -> None:
        """Raise a ValueError when the columns are not arrays of one length."""
        for key, value in self.non_tensor_batch.items():
            if not isinstance(value, np.ndarray):
                raise ValueError(f"non_tensor_batch[{key!r}] is a {type(value).__name__}, not a NumPy array")
            if len(value) != len(self):
                raise ValueError(f"non_tensor_batch[{key!r}] has {len(value)} rows, the batch {len(self)}")

    @property
    def batch(self) -> TensorDict:
        """`tensors`, for whoever needs them.

        Raises:
            ValueError: no tensor column.
        """
        if self.tensors is None:
            raise ValueError(f"the batch has no tensor column, only {sorted(self.non_tensor_batch)}")
        return self.tensors

    @batch.setter
    def batch(self, tensors: TensorDict) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        if self.tensors is not None:
            return self.tensors.batch_size[0]
        return len(next(iter(self.non_tensor_batch.values()), ()))

    def __getitem__(self, index: Index) -> DataProto:
        """The rows of a slice (views), of row numbers, or of a bool mask (copies)."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
            index = index if index.dtype == torch.bool else index.long()
        batch = None if self.tensors is None else self.tensors[index]
        rows = index if isinstance(index, slice) else index.numpy()
        arrays = {key: value[rows] for key, value in self.non_tensor_batch.items()}
        return DataProto(batch, arrays, dict(self.meta_info))

    def select(
        self, batch_keys: Iterable[str] | None = None, non_tensor_batch_keys: Iterable[str] | None = None
    ) -> DataProto:
        """A batch of the named columns (None: all of that kind), sharing their data."""
        batch, arrays = self.tensors, self.non_tensor_batch
        if batch is not None and batch_keys is not None:
            batch = batch.select(*batch_keys)
        names = arrays if non_tensor_batch_keys is None else non_tensor_batch_keys
        return DataProto(batch, {name: arrays[name] for name in names}, dict(self.meta_info))

    def union(self, other: DataProto) -> DataProto:
        """Add the columns and facts of `other` in place.

        Raises:
            ValueError: different lengths, or a column or fact that both have with different values.
        """
        if len(self) and len(other) and len(self) != len(other):
            raise ValueError(f"cannot unite batches of {len(self)} and {len(other)} rows")
        if other.tensors is not None:
            mine = {} if self.tensors is None else self.tensors
            _check_same("batch", mine, other.tensors)
            self.tensors = (
                other.tensors.clone(recurse=False) if self.tensors is None else self.tensors.update(other.tensors)
            )
        for name in ("non_tensor_batch", "meta_info"):
            _check_same(name, getattr(self, name), getattr(other, name))
            getattr(self, name).update(getattr(other, name))
        return self

    def repeat(self, repeat_times: int) -> DataProto:
        """Each row `repeat_times` times, next to itself."""
        return self[torch.arange(len(self)).repeat_interleave(repeat_times)]

    def chunk(self, chunks: int) -> list[DataProto]:
        """Cut into `chunks` equal consecutive parts.

        Raises:
            ValueError: the rows do not divide.
        """
        if len(self) % chunks:
            raise ValueError(f"{len(self)} rows do not divide into {chunks} equal chunks")
        size = len(self) // chunks
        return [self[i * size : (i + 1) * size] for i in range(chunks)]

    @staticmethod
    def concat(data: Sequence[DataProto]) -> DataProto:
        """Stack batches of the same columns; `meta_info` is that of the first."""
        tensors = [part.tensors for part in data if part.tensors is not None]
        if tensors and len(tensors) < len(data):
            raise ValueError("some of the batches have tensor columns, and some have none")
        batch = TensorDict.cat(tensors, dim=0) if tensors else None
        keys = data[0].non_tensor_batch.keys()
        arrays = {key: np.concatenate([part.non_tensor_batch[key] for part in data]) for key in keys}
        return DataProto(batch, arrays, dict(data[0].meta_info))

    def __getstate__(self) -> tuple:
        # NumPy arrays travel as out-of-band buffers (one copy into Ray's object store), and a view of a large tensor
        # takes only its own rows along, where a pickled tensor takes its whole storage.
        tensors = (
            None if self.tensors is None else {key: _to_bytes(value) for key, value in self.tensors.to_dict().items()}
        )
        return len(self), tensors, self.non_tensor_batch, self.meta_info

    def __setstate__(self, state: tuple) -> None:
        rows, tensors, self.non_tensor_batch, self.meta_info = state
        columns = None if tensors is None else {key: _from_bytes(*value) for key, value in tensors.items()}
        self.tensors = None if columns is None else TensorDict(columns, batch_size=[rows])


def pad_dataproto_to_divisor(data: DataProto, size_divisor: int) -> tuple[DataProto, int]:
    """Append copies of the first rows until `size_divisor` divides the length; returns the batch and how many."""
    pad_size = -len(data) % size_divisor
    if pad_size == 0:
        return data, 0
    if len(data) == 0:
        raise ValueError("an empty batch cannot be padded")
    return data[torch.arange(len(data) + pad_size) % len(data)], pad_size


def unpad_dataproto(data: DataProto, pad_size: int) -> DataProto:
    """Drop the last `pad_size` rows."""
    return data[: len(data) - pad_size] if pad_size else data


def _check_same(name: str, mine: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for key in other.keys():  # noqa: SIM118 (iterating a TensorDict iterates its rows)
        if key in mine.keys() and not _same(mine[key], other[key]):  # noqa: SIM118
            raise ValueError(f"{name}[{key!r}] differs between the two batches that are to be united")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and all(map(_same, a.flat, b.flat))
    return type(a) is type(b) and a == b


def _to_bytes(tensor: Tensor) -> tuple[np.ndarray, torch.dtype, torch.Size]:
    # NumPy has no bfloat16, raw bytes fit every dtype.
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return raw.numpy(), tensor.dtype, tensor.shape


def _from_bytes(raw: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    # Copied because the buffers that Ray hands out are read-only memory.
    return torch.from_numpy(raw.copy()).view(dtype).view(shape)
