"""Token sequences laid out for one forward pass of a decoder that attends with `PACKED_ATTENTION`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

SHARED_COST = 1 / 16
"""What it costs to attend to a token that another sequence brought, in tokens: its keys and values are copied."""
ROW_MULTIPLE = 64
"""Rows are filled up to a multiple of it: libraries of matrix products prepare, and keep, a kernel for each shape."""


class PackedBatch:
    """Sequences end to end, without padding, and without repeating what one begins with like another before it.

    Candidates of one question share its prompt, those of a search also the steps before the last. Causal attention
    makes the same states of a shared prefix in all of them.

    Args:
        max_tokens: most tokens, of which shared ones count for `SHARED_COST`; a longer sequence goes alone. 0 for a
            decoder that does not compute packed sequences: each goes alone.

    Attributes:
        paths: for each sequence, where in the packed row each of its tokens lies.
    """

    def __init__(self, max_tokens: int) -> None:
        self.paths: list[list[int]] = []
        self._max_tokens = max_tokens
        self._cost = 0.0
        self._token_ids: list[int] = []
        self._positions: list[int] = []
        self._own_lengths: list[int] = []
        # A tree of prefixes: from a place in the row (None for the beginning of a sequence) by a token to the next.
        self._next: dict[tuple[int | None, int], int] = {}

    def add(self, ids: Sequence[int]) -> bool:
        """Take a sequence; False where the batch is too full for it."""
        path: list[int] = []
        place = None
        for token in ids:
            if (place := self._next.get((place, token))) is None:
                break
            path.append(place)
        shared = len(path)
        cost = len(ids) - shared + shared * SHARED_COST
        if self._cost and self._cost + cost > self._max_tokens:
            return False
        place = path[-1] if path else None
        for position in range(shared, len(ids)):
            self._next[place, ids[position]] = place = len(self._token_ids)
            self._token_ids.append(ids[position])
            self._positions.append(position)
            path.append(place)
        self._cost += cost
        self._own_lengths.append(len(ids) - shared)
        self.paths.append(path)
        return True

    def __len__(self) -> int:
        """How many tokens are computed."""
        return len(self._token_ids)

    def places(self, positions: Iterable[Sequence[int]]) -> Tensor:
        """Where in the packed row the tokens at these positions of each sequence lie, one sequence after the other."""
        found = [path[i] for path, chosen in zip(self.paths, positions, strict=True) for i in chosen]
        return torch.tensor(found, dtype=torch.long)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """The decoder's keyword arguments: one row, which a sequence of zeros fills up."""
        if not self._max_tokens:
            return {"input_ids": torch.tensor([self._token_ids], device=device)}
        from xbai.engine.packed_attention import Packing, SharedPrefixPacking

        def extents(lengths: list[int]) -> tuple[Tensor, int]:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths)

        fill = -len(self) % ROW_MULTIPLE
        filling = list(range(len(self), len(self) + fill))
        rows = zip([*self.paths, filling], [*self._own_lengths, fill], strict=True)
        attending = [(path, own) for path, own in rows if own]
        own = extents([own for _, own in attending])
        if sum(len(path) for path, _ in attending) == len(self) + fill:
            packing = Packing(*own)
        else:
            key_index = torch.tensor([place for path, _ in attending for place in path], device=device)
            packing = SharedPrefixPacking(*own, key_index, *extents([len(path) for path, _ in attending]))
        return {
            "input_ids": torch.tensor([self._token_ids + [0] * fill], device=device),
            "position_ids": torch.tensor([self._positions + list(range(fill))], device=device),
            "packing": packing,
        }
