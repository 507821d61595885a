"""Adapters in a checkpoint, and the base that they are on: which it was, and both of them as one model again.

actor/huggingface/adapter/
  adapter_config.json    peft's: rank, scale, layers, and where the base lay
  base_model.json        SHA-256 of each file with weights of the base, which is in no checkpoint itself
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl.checkpoints.checksums import THREADS, file_digest
from verl.checkpoints.stored_model import StoredModel
from verl.checkpoints.weight_files import WEIGHTS
from verl.models.loading import loading_dtype
from verl.models.lora import ADAPTER, is_adapter, merged_weight
from xbai.engine.weight_files import load_pretrained
from xbai.errors import UserError
from xbai.model_folder import read_json

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_FOLDER = "adapter"
CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "base_model.json"
PEFT_PREFIX = "base_model.model."
"""What peft writes before the name of an adapter's weight."""


def adapter_files(config: LoraConfig, base: str | Path) -> dict[str, bytes]:
    """What travels with a checkpoint's adapters, by the names beside the model's own files."""
    contents = {CONFIG_FILE: peft_config(config), BASE_FILE: json.dumps(_digests(Path(base)), indent=2)}
    return {f"{ADAPTER_FOLDER}/{name}": text.encode() for name, text in contents.items()}


def peft_config(config: LoraConfig) -> str:
    """An `adapter_config.json`."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted)


def read_adapter_config(huggingface: Path) -> dict[str, Any] | None:
    """Of the checkpoint whose model's files are in a folder; None where it is of a whole model."""
    path = huggingface / ADAPTER_FOLDER / CONFIG_FILE
    return read_json(path) if path.is_file() else None


def check_base(huggingface: Path, base: str | Path) -> None:
    """Raise a `UserError` where a model is not the one that a checkpoint's adapters are on."""
    then, now = read_json(huggingface / ADAPTER_FOLDER / BASE_FILE), _digests(Path(base))
    if changed := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
        raise UserError(
            f"{base} is not the model that the adapters in {huggingface.parent} are on: its {changed[0]} is another "
            "(by SHA-256)"
        )


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip((path.name for path in paths), pool.map(file_digest, paths), strict=True))


class AdaptedModel:
    """A checkpoint's adapters and their base as one model, as `StoredModel` is.

    Args:
        stored: adapters, and the score head where there is one.
        scaling: of what they add, alpha / rank.
        base: the folder of their base.

    Raises:
        UserError: no model in that folder.
    """

    def __init__(self, stored: StoredModel, scaling: float, base: Path, trust_remote_code: bool = False) -> None:
        self._stored, self._scaling = stored, scaling
        # As it was trained on. Its weights stay mapped files.
        lm = load_pretrained(
            AutoModelForCausalLM, base, dtype=loading_dtype(base, torch.float32), trust_remote_code=trust_remote_code
        )
        self._base = {name: parameter.detach() for name, parameter in lm.named_parameters()}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Names, shapes and dtypes (on the meta device)."""
        others = {name: tensor for name, tensor in self._stored.tensors.items() if not is_adapter(name)}
        return {name: weight.to("meta") for name, weight in self._base.items()} | others

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, those with adapters merged in float32; errors as of the checkpoint's."""
        names = list(names)
        wanted = (part for name in names for part in (name, *_factors(name)))
        found = self._stored.read(part for part in wanted if part in self._stored.tensors)
        return {name: self._merged(name, found) for name in names}

    def _merged(self, name: str, found: dict[str, Tensor]) -> Tensor:
        if name not in self._base:
            return found[name]
        a, b = (found.get(factor) for factor in _factors(name))
        if a is None or b is None:
            return self._base[name]
        return merged_weight(self._base[name], a, b, self._scaling)


def _factors(name: str) -> Iterator[str]:
    """Of the adapter of a weight, by its name in the base."""
    return (f"{name.removesuffix('.weight')}.lora_{factor}.{ADAPTER}.weight" for factor in "AB")


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads, from its weights by their names in a checkpoint."""
    named = {PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in tensors.items()}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})
