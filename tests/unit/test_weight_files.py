"""Weights that are cut off, foreign or of another model: one line that names the file, and never a model made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
)

from verl.models.loading import build_joint_model, loading_dtype
from xbai.engine import Scorer, load_engine
from xbai.engine.files import read_config
from xbai.engine.weight_files import INDEX_FILE, WEIGHTS_FILE, check_weights, load_pretrained, stored_tensors
from xbai.errors import UserError
from xbai.measure.feature_files import FeatureFiles
from xbai.measure.options import FeatureOptions
from xbai.model_folder import load_tokenizer
from xbai.sprm import load_sprm_config

Change = Callable[[Path], None]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ONE = "model.layers.1.mlp.up_proj.weight"


def cut(name: str, kept: float) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(kept * len(content))])

    return change


def content(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def weights(of: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def change(folder: Path) -> None:
        save_file(of(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE, metadata={"format": "pt"})

    return change


def sharded(then: Change = lambda folder: None) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        (folder / WEIGHTS_FILE).unlink()
        places = {name: SHARDS[number % 2] for number, name in enumerate(tensors)}
        for shard in SHARDS:
            part = {name: tensors[name] for name, place in places.items() if place == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
        then(folder)

    return change


def missing(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


DAMAGED = {
    "cut": (cut(WEIGHTS_FILE, 0.9), f"{WEIGHTS_FILE}: cut off, or no safetensors file"),
    "cut in its header": (cut(WEIGHTS_FILE, 0.001), f"{WEIGHTS_FILE}: cut off, or no safetensors file"),
    "empty": (cut(WEIGHTS_FILE, 0), f"{WEIGHTS_FILE}: cut off, or no safetensors file"),
    "a page": (content(WEIGHTS_FILE, "<html>404</html>" * 100), f"{WEIGHTS_FILE}: cut off, or no safetensors file"),
    "any bytes": (content(WEIGHTS_FILE, bytes(range(256)) * 9), f"{WEIGHTS_FILE}: cut off, or no safetensors file"),
    "no shard": (sharded(missing(SHARDS[1])), f"{SHARDS[1]}: no such file, but {INDEX_FILE} names it"),
    "a cut shard": (sharded(cut(SHARDS[0], 0.5)), f"{SHARDS[0]}: cut off, or no safetensors file"),
    "index of no JSON": (sharded(content(INDEX_FILE, "<html>")), f"{INDEX_FILE}: not valid JSON"),
    "index of a list": (sharded(content(INDEX_FILE, "[]")), f"{INDEX_FILE}: expected a JSON object"),
    "index of nothing": (sharded(content(INDEX_FILE, "{}")), f"{INDEX_FILE}: expected the file of each weight"),
    "index of numbers": (
        sharded(content(INDEX_FILE, '{"weight_map": {"a": 1}}')),
        f"{INDEX_FILE}: expected the file of each weight",
    ),
}
FOREIGN = {
    "other names": (weights(lambda found: {f"x.{name}": w for name, w in found.items()}), "47 of the 47 weights"),
    "one missing": (
        weights(lambda found: {name: w for name, w in found.items() if name != ONE}),
        rf"1 of the 47 weights of its config.json are not in its files, first {ONE}",
    ),
    "another shape": (
        weights(lambda found: found | {ONE: found[ONE].T.contiguous()}),
        rf"{ONE} has shape \[64, 128\], by config.json \[128, 64\]",
    ),
}


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A model to spoil."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def load(folder: Path) -> None:
    load_pretrained(AutoModelForCausalLM, folder)


def check(folder: Path) -> None:
    check_weights(folder, read_config(folder))


@pytest.mark.parametrize("read", [load, check, stored_tensors])
@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(folder: Path, change: Change, message: str, read: Change) -> None:
    change(folder)
    with pytest.raises(UserError, match=rf"^{folder}/{message}") as refused:
        read(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("read", [load, check])
@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_weights_of_another_model_are_not_made_up(folder: Path, change: Change, message: str, read: Change) -> None:
    change(folder)
    with pytest.raises(UserError, match=rf"^{folder}: {message}") as refused:
        read(folder)
    assert "\n" not in str(refused.value)


PROGRAMS: dict[str, Change] = {
    "hf engine": lambda folder: load_engine("hf", folder).close(),
    "score service": lambda folder: Scorer.from_folder(folder) and None,
    "features": lambda folder: FeatureFiles(FeatureOptions(str(folder)), folder)._extractor and None,
    "trainer": lambda folder: (
        build_joint_model(folder, sprm_config=load_sprm_config(folder, load_tokenizer(folder))) and None
    ),
    "trainer's dtype": lambda folder: loading_dtype(folder, torch.float32) and None,
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_everything_that_loads_a_model_says_so(folder: Path, program: Change) -> None:
    program(folder)
    cut(WEIGHTS_FILE, 0.5)(folder)
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE}: cut off"):
        program(folder)


@pytest.mark.slow
def test_vllm_never_starts_with_a_part_of_the_weights(folder: Path) -> None:
    FOREIGN["one missing"][0](folder)
    with pytest.raises(UserError, match=f"first {ONE}"):
        load_engine("vllm", folder, max_model_len=64)


def test_whole_weights_are_taken(tiny_model_dir: Path, tied_model_dir: Path, folder: Path) -> None:
    sharded()(folder)
    for each in (tiny_model_dir, tied_model_dir, folder):
        load(each)
        check(each)
    assert stored_tensors(folder) == stored_tensors(tiny_model_dir)
    kept = stored_tensors(folder)[ONE]
    assert (kept.dtype, kept.shape) == ("F32", (128, 64))


def test_weights_that_are_stored_otherwise_are_left_to_who_loads_them(tmp_path: Path) -> None:
    # One tensor an expert on the disk, one of all experts in the model.
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=32, num_hidden_layers=2, num_local_experts=2, **shape)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert any(".experts.1." in name for name in stored_tensors(tmp_path))
    check(tmp_path)
    load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2),
        GPTNeoXConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
    ],
    ids=["of another prefix", "renamed by class"],
)
def test_other_names_are_left_to_transformers(tmp_path: Path, config: PretrainedConfig) -> None:
    AutoModelForCausalLM.from_config(config).base_model.save_pretrained(tmp_path)
    check(tmp_path)


def test_files_beside_the_weights_are_not_looked_at(folder: Path) -> None:
    content("consolidated.safetensors", "version https://git-lfs.github.com/spec/v1")(folder)
    load(folder)
    check(folder)


def test_sizes_that_make_no_model_are_one_line(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"num_key_value_heads": 0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: no "):
        check(folder)


def test_weights_of_another_kind_are_read_too(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "pytorch_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    load(folder)
    check(folder)
    cut("pytorch_model.bin", 0.5)(folder)
    with pytest.raises(UserError, match=rf"^{folder}: no model that transformers can load \(\w+: .*\)$"):
        load(folder)
