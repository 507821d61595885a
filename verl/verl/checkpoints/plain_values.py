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
        source: a file, or its bytes.
        name: of the source in messages; a file's own path by default.
        stand_ins: as `torch.serialization.safe_globals` takes them: classes, and pairs of one and whose place it takes.

    Raises:
        UserError: it cannot be read, is damaged, or holds anything but tensors and plain values.
    """
    with nothing_but_tensors(source if name is None else name), torch.serialization.safe_globals(list(stand_ins)):
        return torch.load(source, map_location="cpu", weights_only=True)


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
