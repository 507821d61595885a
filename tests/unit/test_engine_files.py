"""What a model folder must hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xbai.engine.files import check_model_folder, load_tokenizer
from xbai.errors import UserError


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_tokenizer_without_vocabulary_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(write(tmp_path, config={"model_type": "qwen3"}))
    with pytest.raises(UserError, match="hold no vocabulary"):
        load_tokenizer(write(tmp_path, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"}))


def test_config_is_read_or_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json: no such file"):
        check_model_folder(tmp_path)
    with pytest.raises(UserError, match=r"config.json: not valid JSON"):
        check_model_folder(write(tmp_path, config="{"))
    assert check_model_folder(write(tmp_path, config={"hidden_size": 8})) == {"hidden_size": 8}
