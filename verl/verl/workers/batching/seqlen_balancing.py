"""Which responses go to which rank, so that all ranks have about as many tokens to compute."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


def balanced_partitions(
    lengths: Sequence[int], parts: int, equally_many: bool = True, kinds: Sequence[int] | None = None
) -> list[list[int]]:
    """Cut items into `parts` sets of about equal total length.

    Longest first, each item goes to the shortest set that still has room.

    Args:
        lengths: of the items, above 0.
        parts: how many sets.
        equally_many: each set gets the same number of items, which `parts` must divide. Otherwise no set is empty
            unless there are fewer items than sets, and the longest set gets no longer with more of them.
        kinds: of the items. Those of one kind go together, the most numerous kinds first, as far as there is room, and
            have the length of one; None: all differ.

    Returns:
        Item numbers of each set, ascending.
    """
    if equally_many and len(lengths) % parts:
        raise ValueError(f"{len(lengths)} items do not divide into {parts} sets")
    room = len(lengths) // parts if equally_many else len(lengths)
    sets: list[list[int]] = [[] for _ in range(parts)]
    open_sets = [(0, part) for part in range(parts)]
    alike: dict[int, list[int]] = {}
    for item in range(len(lengths)):
        alike.setdefault(item if kinds is None else kinds[item], []).append(item)
    for items in sorted(alike.values(), key=lambda items: (-len(items), -lengths[items[0]])):
        while items:
            total, part = heapq.heappop(open_sets)
            space = room - len(sets[part])
            sets[part] += items[:space]
            if len(items) < space:
                heapq.heappush(open_sets, (total + lengths[items[0]], part))
            items = items[space:]
    return [sorted(items) for items in sets]


def rows_by_rank(
    lengths: Tensor, mini_batch_rows: int, world_size: int, balance: bool, kinds: Tensor | None = None
) -> Tensor:
    """The order of rows in which chunk r of `world_size` chunks is what rank r computes.

    Each rank gets an equal share of every mini-batch, so that a mini-batch holds the same rows however many ranks
    there are.

    Args:
        lengths: [rows] tokens of each row.
        mini_batch_rows: rows of one optimiser step; `world_size` divides it, and it divides the rows.
        balance: share out by length rather than in order.
        kinds: [rows] the same for rows that are computed once where they are together; None: all differ.

    Returns:
        [rows] row numbers.
    """
    of_rank: list[list[int]] = [[] for _ in range(world_size)]
    for start in range(0, len(lengths), mini_batch_rows):
        rows = slice(start, start + mini_batch_rows)
        block, alike = lengths[rows].tolist(), None if kinds is None else kinds[rows].tolist()
        size = len(block) // world_size
        parts = [list(range(rank * size, (rank + 1) * size)) for rank in range(world_size)]
        if balance:
            parts = balanced_partitions(block, world_size, kinds=alike)
        for rank, items in enumerate(parts):
            of_rank[rank] += [start + item for item in items]
    return torch.tensor(of_rank).flatten()
