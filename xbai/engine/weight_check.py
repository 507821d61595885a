"""Whether an engine holds the weights that it was given: checksums of what was sent and of what it computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xbai.errors import UserError

_CHUNK_VALUES = 2**22
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD_NUMBERS = -7046029254386353131, -4658895280553007687


@dataclass(frozen=True)
class HeldWeight:
    """A weight of the checkpoint, or a rank's part of it, as an engine holds it.

    Attributes:
        part: what it is of the whole weight, an index; `()` for all of it.
        dtype: what it is held in.
        copies: reads all copies the engine computes with.
    """

    part: tuple[slice, ...]
    dtype: torch.dtype
    copies: Callable[[], Iterable[Tensor]]


class WeightCheck:
    """Takes the checksum of each weight on its way to an engine, then compares with what the engine holds.

    A rank that holds a part compares that part, so the ranks of a tensor-parallel group together compare everything
    and need not talk to each other.
    """

    def __init__(self, held: Mapping[str, HeldWeight]) -> None:
        self._held = held
        self._sent: dict[str, Tensor] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass weights on.

        Raises:
            UserError: a weight that the engine holds in a form which cannot be compared.
        """
        for name, tensor in weights:
            held = self._held.get(name)
            if held is None:
                raise UserError(
                    f"check_weight_sync cannot act: it does not know how this engine holds {name}; turn it off"
                )
            self._sent[name] = checksum(tensor[held.part], held.dtype)
            yield name, tensor

    def compare(self) -> None:
        """Compare once the engine has loaded them.

        Raises:
            UserError: the first weight that is not what was sent.
        """
        for name, sent in self._sent.items():
            held = self._held[name]
            if any(checksum(copy, held.dtype) != sent for copy in held.copies()):
                raise UserError(
                    f"weight sync: {name} is not in the engine as it was sent (their checksums differ); it would "
                    "generate with another policy than the one that is trained"
                )


def checksum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """64 bits that depend on every value, cast to `dtype`, and on its place; -0.0 counts as 0.0.

    Needs a few times 4 Mi values of memory, whatever the tensor's size.
    """
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 0
    for chunk in rows.split(max(1, _CHUNK_VALUES // rows.shape[1])):
        values = (chunk.to(dtype) + 0.0).contiguous().view(_BITS[dtype.itemsize]).flatten().long()
        places = torch.arange(start, start + len(values), device=tensor.device)
        mixed = (values ^ places * _ODD_NUMBERS[0]) * _ODD_NUMBERS[1]
        total += ((mixed ^ mixed >> 29) * _ODD_NUMBERS[0]).sum()
        start += len(values)
    return total
