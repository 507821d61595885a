"""What a model folder must hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from xbai.engine.files import read_config, resolve_head_dtype
from xbai.errors import UserError
from xbai.model_folder import check_model_folder, load_tokenizer


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )
    return folder


def test_a_tokenizer_without_vocabulary_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(write(tmp_path, config={"model_type": "qwen3"}))
    with pytest.raises(UserError, match="hold no vocabulary"):
        load_tokenizer(write(tmp_path, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"}))


@pytest.mark.parametrize("template", [["x"], b"\xff"])
def test_a_chat_template_that_is_no_text_is_one_line(
    template: list[str] | bytes, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    if isinstance(template, bytes):
        (tmp_path / "chat_template.jinja").write_bytes(template)
    else:
        path = tmp_path / "tokenizer_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text(encoding="utf-8")), "chat_template": template}), encoding="utf-8"
        )
    with pytest.raises(UserError, match="no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)


SPOILT = {"not valid JSON": ["", "<html>", '{"model', "\udcff"], "expected a JSON object": ["[]", "null", '"text"']}


@pytest.mark.parametrize(("content", "message"), [(text, why) for why, texts in SPOILT.items() for text in texts])
@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer", "tokenizer_config"])
def test_a_file_of_another_kind_is_named(name: str, content: str, message: str, tiny_model_dir: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / f"{name}.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"^{folder}/{name}.json: {message}") as refused:
        load_tokenizer(folder)
        check_model_folder(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": None}, "does not recognize"), ({"hidden_size": "x"}, "hidden_size"), ({"layer_types": 3}, "")],
)
def test_a_configuration_with_values_of_another_kind_is_named(
    changes: dict, message: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.json: no model's \(.*{message}") as refused:
        read_config(write(tmp_path, config=config | changes))
    assert "\n" not in str(refused.value)


def test_config_is_read_or_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json: no such file"):
        check_model_folder(tmp_path)
    with pytest.raises(UserError, match=r"config.json: not valid JSON"):
        check_model_folder(write(tmp_path, config="{"))
    assert check_model_folder(write(tmp_path, config={"hidden_size": 8})) == {"hidden_size": 8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_float32_on_a_gpu_or_where_asked_for(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        assert resolve_head_dtype(None, dtype) == (torch.float32 if on_gpu else dtype)
        assert resolve_head_dtype("model", dtype) == dtype
        assert resolve_head_dtype("float32", dtype) == torch.float32
    with pytest.raises(UserError, match="head_dtype='bf16' is unknown, use float32 or model"):
        resolve_head_dtype("bf16", dtype)
