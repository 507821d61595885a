"""Reading what `torch.save` wrote so that the file cannot run code: tensors and plain values, or an error."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from xbai.errors import UserError, one_line


def load_plain(source: Path | io.BytesIO, name: str | Path | None = None, stand_ins: Sequence[Any] = ()) -> Any:
    """What `torch.save` wrote, with tensors on the CPU.

    Args:
        name: of the source in messages; a file's own path by default.
        stand_ins: as `torch.serialization.safe_globals` takes them: classes, and pairs of one and whose place it takes.

    Raises:
        UserError: it cannot be read, is damaged, or holds anything but tensors and plain values.
    """
    with nothing_but_tensors(name or source), torch.serialization.safe_globals(list(stand_ins)):
        return torch.load(source, map_location="cpu", weights_only=True)


class StandIn:
    """What an object in a file had stored, in place of a class whose own unpickling trusts the file, or changes."""

    def __init__(self, *arguments: Any) -> None:
        self.stored: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.stored = stored_fields(state)


def stored_fields(state: Any) -> Any:
    """A class with __slots__ stores a pair: its __dict__ or None, and the slots."""
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        return {**(state[0] or {}), **state[1]}
    return state


@contextmanager
def nothing_but_tensors(name: object) -> Iterator[None]:
    """Make a `UserError` of whatever goes wrong in `torch.load(weights_only=True)`."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(f"{name}: holds more than tensors, which could run code when read; not loaded") from error
    except Exception as error:
        # What is cut or garbled fails anywhere in torch's reader, by whatever that did not expect.
        raise UserError(f"{name}: the file is damaged ({one_line(error)[:200]})") from error
