"""Features of the steps of graded responses, on disk: what heads are trained and judged on without the model.

A safetensors file, which is mapped into memory for writing and reading: neither takes memory for all features.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xbai.errors import UserError
from xbai.files import atomic_write
from xbai.sprm.step_rule import StepRule

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Int64

FORMAT = "xbai step features 2"
SUFFIX = ".safetensors"
_DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FeatureSource:
    """What decides the features of given responses.

    Attributes:
        model: `model_identity` of the model, without its score head.
        step_rule: which positions are steps.
        layers: the decoder layers, counted from 0, after which the residual stream was read.
        dtype: in which the model computed.
    """

    model: str
    step_rule: StepRule
    layers: tuple[int, ...]
    dtype: torch.dtype

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        dtype = str(self.dtype).removeprefix("torch.")
        return vars(self) | {"step_rule": self.step_rule.to_dict(), "layers": list(self.layers), "dtype": dtype}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> FeatureSource:
        """The inverse of `to_dict`."""
        rule, dtype = StepRule.from_dict(value["step_rule"]), getattr(torch, value["dtype"])
        return cls(value["model"], rule, tuple(value["layers"]), dtype)


@dataclass(frozen=True)
class StepFeatures:
    """K steps of R responses; the steps of a response are consecutive, in the order of the responses.

    Attributes:
        source: what they came from.
        features: in the model's dtype.
        steps: how many each response has.
        questions: equal for responses to the same prompt, in every file.
        correct: in [0, 1]; 0 where not graded.
        graded: those that were.
        tokens: of the response's text.
        mean_log_prob: of those tokens at temperature 1; nan where there is none.
        states: equal for steps before which, and up to which, the same was said to the same prompt.
    """

    source: FeatureSource
    features: Float[Tensor, "K layers c"]
    steps: Int64[Tensor, "R"]
    questions: Int64[Tensor, "R"]
    correct: Float32[Tensor, "R"]
    graded: Bool[Tensor, "R"]
    tokens: Int64[Tensor, "R"]
    mean_log_prob: Float32[Tensor, "R"]
    states: Int64[Tensor, "K"]

    @classmethod
    def open(cls, path: str | Path) -> StepFeatures:
        """Features of a file, which are read when they are used.

        Raises:
            UserError: there is no such file, or it is another kind of file.
        """
        try:
            with safe_open(str(path), framework="pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{path}: no step features, which `xbai features` writes")
                columns = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no step features can be read ({error})") from None
        return cls(FeatureSource.from_dict(json.loads(metadata["source"])), **columns)

    @classmethod
    @contextmanager
    def create(
        cls, path: str | Path, source: FeatureSource, steps: Sequence[int], hidden_size: int
    ) -> Iterator[StepFeatures]:
        """Zeros for responses of so many steps, to be filled in; the file takes its name when the context ends well.

        Raises:
            UserError: it cannot be written, or the disk has no room for it.
        """
        columns = {
            **dict.fromkeys(("steps", "questions", "tokens"), (torch.int64, [len(steps)])),
            "states": (torch.int64, [sum(steps)]),
            **dict.fromkeys(("correct", "mean_log_prob"), (torch.float32, [len(steps)])),
            "features": (source.dtype, [sum(steps), len(source.layers), hidden_size]),
            "graded": (torch.bool, [len(steps)]),
        }
        header, places = _layout(columns, {"format": FORMAT, "source": json.dumps(source.to_dict())})
        size = len(header) + max(end for _, end in places.values())
        with atomic_write(path, "w+b") as stream:
            stream.write(header)
            stream.flush()
            # Without room, writing to a mapped file would end the process.
            os.posix_fallocate(stream.fileno(), 0, size)
            mapped = mmap.mmap(stream.fileno(), size)
            tensors = {
                name: _mapped_tensor(mapped, dtype, shape, len(header) + places[name][0])
                for name, (dtype, shape) in columns.items()
            }
            tensors["steps"].copy_(torch.tensor(steps, dtype=torch.int64))
            yield cls(source, **tensors)
            mapped.flush()

    @property
    def starts(self) -> Int64[Tensor, "R"]:
        """Where the steps of each response begin."""
        return self.steps.cumsum(0) - self.steps

    def of_layer(self, layer: int) -> Float[Tensor, "K c"]:
        """The features after one decoder layer, counted from 0.

        Raises:
            UserError: it was not kept.
        """
        if layer not in self.source.layers:
            kept = ", ".join(map(str, self.source.layers))
            raise UserError(f"step features: layer {layer} was not kept, only {kept}; make them again with --layers")
        return self.features[:, self.source.layers.index(layer)]


def _layout(
    columns: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a safetensors file, and where behind it each tensor begins and ends.

    The columns of wide numbers come first, so that all are aligned; the format allows no gaps.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    places, end = {}, 0
    for name, (dtype, shape) in columns.items():
        places[name] = begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _mapped_tensor(mapped: mmap.mmap, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)
