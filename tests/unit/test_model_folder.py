"""Chat templates of a model folder, rendered without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xbai.errors import UserError
from xbai.model_folder import load_chat_tokenizer, load_tokenizer
from xbai.prompts import prompt_text

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "7 + 8?"},
    {"role": "assistant", "content": "<think>\nEasy.\n\n</think>\n\n15"},
    {"role": "user", "content": "And <|im_end|> 9?"},
]


def with_template(model: Path, folder: Path, template: str, **config: Any) -> Path:
    shutil.copytree(model, folder)
    path = folder / "tokenizer_config.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = {name: value for name, value in {**before, **config}.items() if value is not None}
    path.write_text(json.dumps(changed), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("template", "config"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}", {}),
        ("{{ bos_token }}{{ messages[-1].content }}", {"bos_token": "<|im_start|>"}),
        # What the files do not say, the class of the model's family does.
        ("{{ bos_token }}{{ messages[-1].content }}", {"bos_token": None, "tokenizer_class": "LlamaTokenizer"}),
        ("{{ eos_token }}{{ messages[-1].content }}", {"eos_token": None, "tokenizer_class": "Qwen2Tokenizer"}),
        ("{% if add_generation_prompt %}{{ raise_exception('no') if messages | length < 2 }}go{% endif %}", {}),
    ],
)
def test_prompts_are_those_of_the_models_own_tokenizer(
    template: str, config: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = with_template(tiny_model_dir, tmp_path / "model", template, **config)
    ours, theirs = (prompt_text(load(folder), CONVERSATION) for load in (load_chat_tokenizer, load_tokenizer))
    assert ours == theirs


def test_a_models_own_template_is_rendered_alike(tiny_model_dir: Path) -> None:
    ours, theirs = (prompt_text(load(tiny_model_dir), CONVERSATION) for load in (load_chat_tokenizer, load_tokenizer))
    assert ours == theirs and "Be brief." in ours


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / name).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}: not valid JSON"):
        load_chat_tokenizer(folder)
