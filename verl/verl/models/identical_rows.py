"""Rows of a batch that hold the same tokens, as short responses to one prompt often do: what a model computes for one
of them it has computed for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class DistinctRows(NamedTuple):
    """B rows of which D differ."""

    rows: Tensor
    """[D] the first row of each kind, ascending."""
    kinds: Tensor
    """[B] the place in `rows` of the one that each row is like."""

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> DistinctRows:
        """Compare `input_ids` and `attention_mask` [B, T]."""
        columns = (batch[name].cpu().numpy() for name in ("input_ids", "attention_mask"))
        places: dict[tuple[bytes, bytes], int] = {}
        kinds = [
            places.setdefault((ids.tobytes(), mask.tobytes()), len(places)) for ids, mask in zip(*columns, strict=True)
        ]
        return cls.of_kinds(torch.tensor(kinds, dtype=torch.long))

    @classmethod
    def of_kinds(cls, kinds: Tensor) -> DistinctRows:
        """From `kinds`, which are numbered in the order of their first rows."""
        rows = torch.zeros(int(kinds.max()) + 1, dtype=torch.long)
        # The first of each kind is written last.
        rows[kinds.flip(0)] = torch.arange(len(kinds)).flip(0)
        return cls(rows, kinds)

    def members(self) -> list[list[int]]:
        """The rows of each kind."""
        found: list[list[int]] = [[] for _ in self.rows]
        for row, kind in enumerate(self.kinds.tolist()):
            found[kind].append(row)
        return found


def sum_over_kinds(values: Tensor, kinds: Tensor) -> Tensor:
    """The sum of `values` [B], each kind's of `kinds` [B] once: they are the same for all rows of a kind."""
    return values.new_zeros(int(kinds.max()) + 1).scatter(0, kinds, values).sum()
