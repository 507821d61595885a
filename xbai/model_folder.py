"""A Hugging Face model folder as files, read without torch: `xbai infer` starts in a third of the time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xbai.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
"""A folder without any of them has no tokenizer."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Variables of chat templates."""


def check_model_folder(model_path: str | Path) -> dict[str, Any]:
    """The plain content of the model's `config.json`, read without transformers.

    Raises:
        UserError: not a folder with a readable `config.json`, or with a `generation_config.json` that is none.
    """
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a local Hugging Face model folder")
    if (generation := Path(model_path) / "generation_config.json").is_file():
        read_json(generation)
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {value!r:.60}")
    return value


def load_tokenizer(model_path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: a folder without tokenizer files, or with some that make no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = _with_tokenizer(model_path)
    return _loaded(AutoTokenizer, folder, trust_remote_code=trust_remote_code)


def load_chat_tokenizer(model_path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer for its chat template alone, which renders as that of `load_tokenizer` does.

    Raises:
        UserError: as `load_tokenizer`.
    """
    folder = _with_tokenizer(model_path)
    if not (folder / "tokenizer.json").is_file() or not _says_its_special_tokens(folder):
        return load_tokenizer(folder)
    # The one class that comes without torch, which takes transformers seconds.
    from transformers import PreTrainedTokenizerFast

    return _loaded(PreTrainedTokenizerFast, folder)


def _with_tokenizer(model_path: str | Path) -> Path:
    folder = Path(model_path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder}: no tokenizer (one of {', '.join(TOKENIZER_FILES)}) beside the model")
    for file in (folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        if file.is_file():
            read_json(file)
    return folder


def _says_its_special_tokens(folder: Path) -> bool:
    """All that the template asks for: what is not in the files, a model's own tokenizer class may know."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(path) if path.is_file() else {}
    text = (
        template.read_text(encoding="utf-8", errors="replace")
        if template.is_file()
        else str(config.get("chat_template"))
    )
    return all(config.get(name) for name in SPECIAL_TOKENS if name in text)


def _loaded(kind: Any, folder: Path, **options: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:
        # Tokenizers fail by whatever they did not expect; the Rust ones raise bare exceptions.
        raise UserError(f"{folder}: no tokenizer that transformers can load ({one_line(error)})") from error
    # Without a vocabulary transformers makes up a tokenizer that knows nothing but its special tokens.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise UserError(f"{folder}: no tokenizer, the files there hold no vocabulary (tokenizer.json is missing?)")
    return tokenizer
