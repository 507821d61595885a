"""Random states of a process, as tensors and plain values."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verl.checkpoints.plain_values import StandIn, load_plain


def rng_state() -> dict[str, Any]:
    """Random states of this process: python, numpy, torch and its GPU."""
    numpy = np.random.get_state(legacy=False)
    keys, position = numpy["state"]["key"].tolist(), numpy["state"]["pos"]
    return {
        "python": random.getstate(),
        "numpy": (numpy["bit_generator"], keys, position, numpy["has_gauss"], numpy["gauss"]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    kind, keys, *place = state["numpy"]
    if isinstance(keys, StandIn):
        *_, content = keys.stored
        keys = np.frombuffer(content, np.uint32)
    random.setstate(state["python"])
    np.random.set_state((kind, keys, *place))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def load_with_rng(source: Path | io.BytesIO, name: str | Path | None = None) -> dict[str, Any]:
    """See `load_plain`: a file that also holds random states, perhaps of an older version."""
    # Older ones are arrays of numpy, whose own unpickling takes the dtype from the file, and with it where an array's
    # bytes are pointers.
    arrays = ("ndarray", "dtype", "core.multiarray._reconstruct", "_core.multiarray._reconstruct")
    return load_plain(source, name, [StandIn, *((StandIn, f"numpy.{array}") for array in arrays)])
