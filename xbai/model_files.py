"""A Hugging Face model folder without its weights: what travels with a model through training and merging."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xbai.calibration import SPRM_CALIBRATION_FILE
from xbai.engine.weight_files import stored_tensors
from xbai.model_folder import check_model_folder
from xbai.sprm.head import SPRM_CONFIG_FILE

CONFIG_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer_config.json", "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
STORED_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class ModelFiles:
    """Configuration, generation settings, tokenizer, chat template and code, by file name.

    They are kept as they were read, byte for byte, but for what transformers 5 spells in another way than 4 and those
    who read its files (vLLM among them): that is written in both spellings, so that either loads the same model.
    The score head's configuration and calibration are no part of them: they belong to the head.
    """

    contents: dict[str, bytes]
    """Of the files."""
    dtype: str | None
    """Of the weights, as the configuration or else the weights themselves say; None where neither does."""

    @classmethod
    def read(cls, folder: str | Path) -> ModelFiles:
        """The files of a model folder.

        Raises:
            UserError: not a folder with a readable `config.json`.
        """
        folder = Path(folder)
        config = check_model_folder(folder)
        paths = [*filter(_travels, folder.iterdir()), *folder.glob("additional_chat_templates/*.jinja")]
        contents = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}
        return cls(contents, config.get("dtype") or config.get("torch_dtype") or _only(stored_dtypes(folder)))

    def write(self, folder: str | Path, dtype: str | None = None) -> None:
        """Write the files into a folder that exists, whose weights are of `dtype` (None: the model's own)."""
        folder = Path(folder)
        for name, content in self.contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        dtype = dtype or self.dtype
        of_weights = {} if dtype is None else {"dtype": dtype, "torch_dtype": dtype}
        config = json.loads(self.contents[CONFIG_FILE])
        _write_changed(folder / CONFIG_FILE, config, config | old_rope(config) | of_weights)
        if TOKENIZER_CONFIG_FILE in self.contents:
            tokenizer = json.loads(self.contents[TOKENIZER_CONFIG_FILE])
            _write_changed(folder / TOKENIZER_CONFIG_FILE, tokenizer, old_tokenizer(tokenizer, self.contents))


def old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 reads in place of `rope_parameters`, unless the configuration has it.

    Parameters that differ between kinds of layers are left alone: each model family had names of its own for them.
    """
    rope = config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        return {}
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    is_scaled = rope.get("rope_type", "default") != "default"
    old = {
        "rope_theta": rope.get("rope_theta"),
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "rope_scaling": scaling if is_scaled else None,
    }
    return {name: value for name, value in old.items() if value is not None and config.get(name) is None}


def old_tokenizer(config: dict[str, Any], contents: dict[str, bytes]) -> dict[str, Any]:
    """A `tokenizer_config.json` that transformers 4 reads as well; `contents` are of the files beside it."""
    old = dict(config)
    if "backend" in config and TOKENIZER_FILE in contents:
        # Written by transformers 5: the classes of 4 are others, or would add to what tokenizer.json says.
        old["tokenizer_class"] = "PreTrainedTokenizerFast"
        # That class's own in transformers 4 are BERT's, which models refuse.
        old.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(config.get("extra_special_tokens"), list):
        old["additional_special_tokens"] = old.pop("extra_special_tokens")
    if "chat_template" not in config and CHAT_TEMPLATE_FILE in contents:
        old["chat_template"] = contents[CHAT_TEMPLATE_FILE].decode()
    return old


def stored_dtypes(folder: str | Path) -> set[str]:
    """Names of all dtypes that a folder's safetensors hold (of those torch does not know, safetensors' own)."""
    return {STORED_DTYPES.get(tensor.dtype, tensor.dtype) for tensor in stored_tensors(folder).values()}


def _only(names: set[str]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None


def _travels(path: Path) -> bool:
    of_head = path.name in (SPRM_CONFIG_FILE, SPRM_CALIBRATION_FILE)
    excluded = of_head or path.name.endswith(".index.json") or path.name.startswith(".")
    return path.is_file() and path.suffix in SUFFIXES and not excluded


def _write_changed(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    if after != before:
        path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
