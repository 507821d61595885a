"""The batch that travels between the driver and the workers.

The columns of B rollouts, whose prompts are padded on the left to P and responses on the right to R tokens:

- `input_ids`, `attention_mask`, `position_ids` [B, P+R], `prompts` [B, P], `responses` and `response_mask` [B, R];
- `rollout_log_probs`, `old_log_probs`, `ref_log_prob`, `ref_kl`, `values` [B, R]: of the engine, of the policy before
  the update, of the reference, the KL to it summed over the vocabulary, of the critic;
- `rollout_versions` [B, R], the step for which each token was sampled, -1 on padding, of groups that may wait;
- `entropys` [B, R], of the policy before the update; `rollout_scores` [B], of the engine; `kinds` [B], the same number
  for rows that hold the same tokens;
- `step_feature_mask` and `old_step_logits` [B, P+R];
- `token_level_scores`, `token_level_rewards`, `advantages`, `returns` [B, R];
- `importance_weights` [B, R] or [B, 1] and `in_policy_loss` [B] bool, where the policy loss asks for them;
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
        batch: tensors of shape [rows, ...]; None for no tensor column.
        non_tensor_batch: NumPy arrays (mostly of objects) of shape [rows, ...].
        meta_info: anything that belongs to the batch and not to a row.

    `union` works in place, the other methods return a new batch.
    """

    def __init__(
        self,
        batch: TensorDict | None = None,
        non_tensor_batch: dict[str, np.ndarray] | None = None,
        meta_info: dict[str, Any] | None = None,
    ) -> None:
        self.non_tensor_batch = {} if non_tensor_batch is None else non_tensor_batch
        self.meta_info = {} if meta_info is None else meta_info
        rows = len(next(iter(self.non_tensor_batch.values()), ()))
        self.batch = TensorDict({}, batch_size=[rows]) if batch is None else batch
        for key, value in self.non_tensor_batch.items():
            if not isinstance(value, np.ndarray):
                raise ValueError(f"non_tensor_batch[{key!r}] is a {type(value).__name__}, not a NumPy array")
            if len(value) != len(self):
                raise ValueError(f"non_tensor_batch[{key!r}] has {len(value)} rows, the batch {len(self)}")

    @classmethod
    def from_dict(
        cls, columns: Mapping[str, Tensor | np.ndarray | Sequence[Any]], meta_info: dict[str, Any] | None = None
    ) -> DataProto:
        """Build a batch of columns that share their first dimension; plain sequences become object arrays.

        Raises:
            ValueError: columns of different lengths.
        """
        lengths = {key: len(value) for key, value in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        tensors = {key: value for key, value in columns.items() if isinstance(value, Tensor)}
        arrays = {
            key: value if isinstance(value, np.ndarray) else object_array(value)
            for key, value in columns.items()
            if not isinstance(value, Tensor)
        }
        return cls(TensorDict(tensors, batch_size=[next(iter(lengths.values()), 0)]), arrays, meta_info)

    def __len__(self) -> int:
        return self.batch.batch_size[0]

    def __getitem__(self, index: Index) -> DataProto:
        """The rows of a slice (views), of row numbers, or of a bool mask (copies)."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
            index = index if index.dtype == torch.bool else index.long()
        rows = index if isinstance(index, slice) else index.numpy()
        arrays = {key: value[rows] for key, value in self.non_tensor_batch.items()}
        return DataProto(self.batch[index], arrays, dict(self.meta_info))

    def select(self, batch_keys: Iterable[str], non_tensor_batch_keys: Iterable[str] = ()) -> DataProto:
        """A batch of the named columns, sharing their data."""
        arrays = {name: self.non_tensor_batch[name] for name in non_tensor_batch_keys}
        return DataProto(self.batch.select(*batch_keys), arrays, dict(self.meta_info))

    def union(self, other: DataProto) -> DataProto:
        """Add the columns and facts of `other` in place.

        Raises:
            ValueError: different lengths, or a column or fact that both have with different values.
        """
        if len(self) != len(other):
            raise ValueError(f"cannot unite batches of {len(self)} and {len(other)} rows")
        for name in ("batch", "non_tensor_batch", "meta_info"):
            _check_same(name, getattr(self, name), getattr(other, name))
            getattr(self, name).update(getattr(other, name))
        return self

    def repeat(self, repeat_times: int) -> DataProto:
        """Each row `repeat_times` times, next to itself."""
        return self[torch.arange(len(self)).repeat_interleave(repeat_times)]

    def padded(self, rows: int) -> DataProto:
        """With copies of the first rows appended, as many as are asked for."""
        return self[torch.arange(len(self) + rows) % len(self)] if rows else self

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
        keys = data[0].non_tensor_batch.keys()
        arrays = {key: np.concatenate([part.non_tensor_batch[key] for part in data]) for key in keys}
        return DataProto(TensorDict.cat([part.batch for part in data], dim=0), arrays, dict(data[0].meta_info))

    def __getstate__(self) -> tuple:
        # NumPy arrays travel as out-of-band buffers (one copy into Ray's object store), and a view of a large tensor
        # takes only its own rows along, where a pickled tensor takes its whole storage.
        tensors = {key: _to_bytes(value) for key, value in self.batch.to_dict().items()}
        return len(self), tensors, self.non_tensor_batch, self.meta_info

    def __setstate__(self, state: tuple) -> None:
        rows, tensors, self.non_tensor_batch, self.meta_info = state
        columns = {key: _from_bytes(*value) for key, value in tensors.items()}
        self.batch = TensorDict(columns, batch_size=[rows])


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
