"""The files with a model folder's weights: whole, and of this model, before and while a model is loaded from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from xbai.engine.files import LM_HEAD, meta_model, quiet_transformers, weight_shapes
from xbai.errors import UserError, one_line
from xbai.model_folder import check_model_folder, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
BACKBONE_PREFIX = "model."
QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")
"""Of quantised models whose config.json does not say so."""
REMEDY = "copy the model again"


class MissingShardError(UserError):
    """The index names a file that is not there."""


class StoredTensor(NamedTuple):
    """What a file says of one of its tensors."""

    dtype: str
    shape: torch.Size


def stored_tensors(model_path: str | Path) -> dict[str, StoredTensor]:
    """What a folder's safetensors hold, by the headers alone, which also tell a file that is cut off.

    Empty for weights in files of another kind.

    Raises:
        MissingShardError: a file is missing though the index names it.
        UserError: a file is damaged, or no safetensors file.
    """
    return {name: stored for file in _files(Path(model_path)) for name, stored in _header(file).items()}


def check_weights(model_path: str | Path, config: PretrainedConfig) -> None:
    """Refuse safetensors that lack a weight of the model, or have one of another shape.

    What may be stored under other names, or in another shape, is left to whoever loads it: quantised weights, those of
    code that comes with the folder, and what transformers renames or puts together (experts).

    Raises:
        UserError: they are not of this model, or there is none of this configuration; see also `stored_tensors`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    stored = stored_tensors(model_path)
    if not stored or any(getattr(config, name, None) for name in ("quantization_config", "auto_map")):
        return
    if any((Path(model_path) / name).exists() for name in QUANTIZATION_FILES):
        return
    model = meta_model(config)
    if f"{model.base_model_prefix}." != BACKBONE_PREFIX or get_model_conversion_mapping(model, add_legacy=False):
        return
    expected = weight_shapes(model)
    if config.tie_word_embeddings:
        expected.pop(LM_HEAD, None)
    # Saved without its LM head, a model has no prefix.
    found = {
        name: tensor
        for name in expected
        if (tensor := stored.get(name) or stored.get(name.removeprefix(BACKBONE_PREFIX))) is not None
    }
    _check_complete(model_path, [name for name in expected if name not in found], len(expected))
    for name, shape in expected.items():
        _check_shape(model_path, name, found[name].shape, shape)


def load_pretrained(
    auto_class: type[_BaseAutoModelClass],
    model_path: str | Path,
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A transformers model with all of its weights from a folder.

    Args:
        auto_class: transformers' `AutoModel...` of the parts that are needed.
        model_path: the folder.
        device: where it is to be; by default where transformers has it, on the CPU.
        trust_remote_code, **options: of `from_pretrained`.

    Raises:
        UserError: no model, or weights that are damaged or of another one.
    """
    check_model_folder(model_path)
    stored_tensors(model_path)
    try:
        with quiet_transformers():
            # It would make up what is missing, and say so to the log.
            model, loading = auto_class.from_pretrained(
                str(model_path),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        # Files of the wrong kind make it fail anywhere.
        why = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise UserError(f"{model_path}: no model that transformers can load ({why})") from error
    for name, found, expected in loading["mismatched_keys"]:
        _check_shape(model_path, name, found, expected)
    if getattr(model.config, "quantization_config", None) is None:
        weights = dict(model.named_parameters(remove_duplicate=False))
        _check_complete(model_path, loading["missing_keys"] & weights.keys(), len(weights))
    return model if device is None else model.to(device)


def _files(folder: Path) -> list[Path]:
    """Those that transformers reads."""
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).exists():
        return [] if any(folder.glob("pytorch_model*.bin")) else sorted(folder.glob("*.safetensors"))
    places = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{folder / INDEX_FILE}: expected the file of each weight as weight_map; {REMEDY}")
    files = [folder / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            raise MissingShardError(f"{file}: no such file, but {INDEX_FILE} names it; {REMEDY}")
    return files


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: StoredTensor(s.get_dtype(), torch.Size(s.get_shape())) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cut off, or no safetensors file ({one_line(error)}); {REMEDY}") from error


def _check_complete(model_path: str | Path, missing: Iterable[str], of: int) -> None:
    if missing := sorted(missing):
        raise UserError(
            f"{model_path}: {len(missing)} of the {of} weights of its config.json are not in its files, first "
            f"{missing[0]}: weights of another model, or a part of them; {REMEDY}"
        )


def _check_shape(model_path: str | Path, name: str, found: Iterable[int], expected: Iterable[int]) -> None:
    if list(found) != list(expected):
        raise UserError(
            f"{model_path}: {name} has shape {list(found)}, by config.json {list(expected)}: weights of another "
            f"model; {REMEDY}"
        )
