"""What travels with a model: byte for byte, but for what transformers 4 and 5 spell differently."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

from xbai.benchmarks.tiny_model import make_tokenizer, write_tiny_model
from xbai.errors import UserError
from xbai.model_files import ModelFiles

GENERATION_CONFIGS = Path(__file__).parents[1] / "cases" / "generation_configs.jsonl"
OLD_TRANSFORMERS = "XBAI_TRANSFORMERS_4_PYTHON"
"""Names a Python that has transformers 4.51 (and torch), to load what is written here."""

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "qwen3": (Qwen3Config(**SHAPE, head_dim=16, rope_theta=1e6), 1e6, None),
    "qwen2": (Qwen2Config(**SHAPE, rope_theta=1e6, tie_word_embeddings=True), 1e6, None),
    "llama": (LlamaConfig(**SHAPE, rope_theta=5e5), 5e5, None),
    "llama3": (LlamaConfig(**SHAPE, rope_parameters=LLAMA3 | {"rope_theta": 5e5}), 5e5, LLAMA3),
    "yarn": (Qwen2Config(**SHAPE, rope_parameters=YARN | {"rope_theta": 54321.0}), 54321.0, YARN),
    "linear": (
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        1e4,
        {"rope_type": "linear", "factor": 4.0},
    ),
}


def byte_tokenizer() -> Qwen2Tokenizer:
    """As transformers 5 makes one of Qwen2's, with special tokens of its own."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("y", "e"), ("ye", "s"), ("Ċ", "Ċ"), (".", "ĊĊ"), ("Ġ", "f")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>", "<|box|>"]
    )
    tokenizer.chat_template = make_tokenizer().chat_template
    return tokenizer


def write_as_transformers_5(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_both(folder: Path) -> None:
    ModelFiles.read(folder).write(folder)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def write_json(folder: Path, name: str, value: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_rotary_embedding_is_written_in_both_spellings(kind: str, tmp_path: Path) -> None:
    config, theta, scaling = CONFIGS[kind]
    config.save_pretrained(tmp_path)
    before, stored = AutoConfig.from_pretrained(tmp_path).to_dict(), read_json(tmp_path, "config.json")
    write_both(tmp_path)
    written = read_json(tmp_path, "config.json")
    assert written["rope_theta"] == theta and written.get("rope_scaling") == scaling
    assert written.items() >= stored.items()
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    # It is the spelling of attributes that transformers 5 keeps beside its own.
    assert {name: value for name, value in after.items() if name in before} == before
    assert after.keys() - before.keys() <= {"rope_theta"}


def test_what_a_part_of_the_layers_rotates_with_is_left_alone(tmp_path: Path) -> None:
    by_layer = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    write_json(tmp_path, "config.json", {"rope_parameters": by_layer, "dtype": "bfloat16"})
    write_both(tmp_path)
    written = read_json(tmp_path, "config.json")
    assert written == {"rope_parameters": by_layer, "dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_a_part_of_the_dimensions_is_said_where_transformers_4_looks(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    write_json(tmp_path, "config.json", {"rope_parameters": rope})
    write_both(tmp_path)
    expected = {"rope_parameters": rope, "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    assert read_json(tmp_path, "config.json") == expected


@pytest.mark.parametrize("make", [make_tokenizer, byte_tokenizer])
def test_the_tokenizer_has_a_class_and_special_tokens_that_transformers_4_knows(make, tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"model_type": "qwen3"})
    make().save_pretrained(tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    write_both(tmp_path)
    after, written = AutoTokenizer.from_pretrained(tmp_path), read_json(tmp_path, "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert written["chat_template"] == before.chat_template == after.chat_template
    assert "extra_special_tokens" not in written
    assert after.all_special_tokens == before.all_special_tokens
    texts = ["So yes from 10.\n\n<think>a</think><|im_start|><|box|>", "x.\n\n\n  far"]
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
    once = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_both(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == once


def test_a_published_folder_stays_as_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    config = {"model_type": "qwen2", "rope_theta": 1000000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    write_json(source, "config.json", config)
    travelling = {
        "tokenizer_config.json": '{"tokenizer_class":   "LlamaTokenizerFast", "add_bos_token": true}',
        "generation_config.json": '{"temperature": 0.6,\n\n "eos_token_id": 151643}',
        "tokenizer.json": "{}",
        "special_tokens_map.json": "{}",
        "vocab.json": "{}",
        "merges.txt": "#version: 0.2\n",
        "chat_template.jinja": "{{ x }}",
        "modeling_mine.py": "x = 1\n",
        "tokenizer.model": "\x00",
    }
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ y }}", encoding="utf-8")
    staying = ["sprm_config.json", "score_module.pt", "model.safetensors.index.json", ".gitattributes", "figure.png"]
    for name, content in {**travelling, **dict.fromkeys(staying, "1")}.items():
        (source / name).write_text(content, encoding="utf-8")
    (source / "original").mkdir()
    ModelFiles.read(source).write(target)
    assert read_json(target, "config.json") == config | {"dtype": "bfloat16"}
    changed = {"config.json", "tokenizer_config.json"}
    written = {path.name: path.read_text(encoding="utf-8") for path in target.glob("*.*") if path.name not in changed}
    assert written == {name: content for name, content in travelling.items() if name not in changed}
    assert (target / "additional_chat_templates" / "tools.jinja").read_text(encoding="utf-8") == "{{ y }}"
    tokenizer = json.loads(travelling["tokenizer_config.json"])
    assert read_json(target, "tokenizer_config.json") == tokenizer | {"chat_template": "{{ x }}"}


@pytest.mark.parametrize("case", map(json.loads, GENERATION_CONFIGS.read_text(encoding="utf-8").splitlines()))
def test_generation_settings_travel_whether_transformers_would_save_them_or_not(case: dict, tmp_path: Path) -> None:
    content = json.dumps(case["generation_config"], indent=3).encode()
    source, target, saved = (tmp_path / name for name in ("source", "target", "saved"))
    write_tiny_model(source)
    (source / "generation_config.json").write_bytes(content)
    settings = AutoModelForCausalLM.from_pretrained(source).generation_config
    if case["refused"]:
        with pytest.raises(ValueError, match="invalid"):
            settings.save_pretrained(saved)
    else:
        settings.save_pretrained(saved)
    target.mkdir()
    ModelFiles.read(source).write(target)
    assert (target / "generation_config.json").read_bytes() == content
    assert GenerationConfig.from_pretrained(target).eos_token_id == case["generation_config"]["eos_token_id"]


@pytest.mark.parametrize(
    ("config", "weights", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, torch.float32, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, torch.bfloat16, "float32"),
        ({}, torch.float16, "float16"),
        ({"torch_dtype": None}, torch.bfloat16, "bfloat16"),
        ({}, None, None),
    ],
)
def test_the_dtype_is_the_configurations_or_else_that_of_the_weights(
    config: dict, weights: torch.dtype | None, expected: str | None, tmp_path: Path
) -> None:
    write_json(tmp_path, "config.json", config)
    if weights is not None:
        save_file({"norm": torch.ones(2, dtype=weights)}, tmp_path / "model.safetensors")
    files = ModelFiles.read(tmp_path)
    assert files.dtype == expected
    files.write(tmp_path)
    assert read_json(tmp_path, "config.json").get("dtype") == expected
    files.write(tmp_path, "float16")
    written = read_json(tmp_path, "config.json")
    assert written["dtype"] == written["torch_dtype"] == "float16"


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        ModelFiles.read(tmp_path)


LOADING = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    case = torch.load(folder + "/case.pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    case["found_ids"] = [tokenizer(text)["input_ids"] for text in case["texts"]]
    case["keys"] = list(tokenizer("a"))
    with torch.no_grad():
        case["found"] = model(case["inputs"]).logits
    torch.save(case, folder + "/case.pt")
import transformers
assert transformers.__version__.startswith(sys.argv[1]), transformers.__version__
"""


@pytest.mark.long
@pytest.mark.skipif(OLD_TRANSFORMERS not in os.environ, reason=f"{OLD_TRANSFORMERS} names no Python")
def test_transformers_4_loads_the_same_model(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = [*".\n\n 0123abc", "yes", "<think>", "</think>", ".\n\n", "<|im_end|>", " from", "So "]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(200)]
    folders = [tmp_path / kind for kind in CONFIGS]
    for folder, (config, _, _) in zip(folders, CONFIGS.values()):
        write_as_transformers_5(folder, config, byte_tokenizer() if config.model_type == "qwen2" else make_tokenizer())
    inputs = torch.randint(5, 120, (2, 90), generator=torch.Generator().manual_seed(1))
    for folder in folders:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            case = {"texts": texts, "inputs": inputs, "logits": model(inputs).logits}
        torch.save(case | {"ids": [tokenizer(text)["input_ids"] for text in texts]}, folder / "case.pt")
        write_both(folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [os.environ[OLD_TRANSFORMERS], "-c", LOADING, "4.51", *map(str, folders)]
    subprocess.run(command, check=True, env=environment)
    for folder in folders:
        case = torch.load(folder / "case.pt")
        assert case["found_ids"] == case["ids"], folder.name
        assert case["keys"] == ["input_ids", "attention_mask"]
        torch.testing.assert_close(case["found"], case["logits"], atol=1e-5, rtol=0)
