"""Writing a language model's weights as transformers reads them: safetensors, with an index where they are several."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from xbai.engine.weight_files import INDEX_FILE
from xbai.errors import UserError
from xbai.files import why_not_written

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Files of a model folder that hold weights."""
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors, which is written in Rust, names the system's number of an error."""


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, read: Callable[[Iterable[str]], dict[str, Tensor]]
) -> None:
    """Write weights in `dtype`, holding one file of at most 5 GB in memory.

    Args:
        tensors: names and shapes; on any device, the meta device too.
        read: gives the values of some of them, on the CPU.

    Raises:
        UserError: values that are not finite in `dtype`, or that safetensors cannot hold.
        OSError: a file cannot be written.
    """
    planned = {name: torch.empty(like.shape, dtype=dtype, device="meta") for name, like in tensors.items()}
    plan = split_torch_state_dict_into_shards(planned, max_shard_size="5GB")
    for filename, names in track(plan.filename_to_tensors.items(), description="writing weights", transient=True):
        written = {name: tensor.to(dtype).contiguous() for name, tensor in read(names).items()}
        for name, tensor in written.items():
            if not tensor.isfinite().all():
                raise UserError(f"{name} holds values that are not finite as {dtype}; write bfloat16 or float32")
        try:
            save_file(written, folder / filename, metadata={"format": "pt"})
        except SafetensorError as error:
            if number := _SYSTEM_ERROR.search(str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise UserError(f"{folder / filename}: {why_not_written(error)}") from error
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
