"""The merger's command: what it writes, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.utils.checkpoint import save_checkpoint
from verl.utils.fsdp import create_mesh, shard_model
from verl.utils.model import build_joint_model
from verl.utils.optim import JointOptimizer
from xbai.errors import UserError
from xbai.sprm import load_score_head, load_sprm_config

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def experiment(
    request, process_group, make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An experiment's folder with one checkpoint, and the model that is in it."""
    source, folder = make_tiny_model(tied=request.param), tmp_path_factory.mktemp("experiment")
    tokenizer = AutoTokenizer.from_pretrained(source)
    sprm_config = load_sprm_config(source, tokenizer)
    model = shard_model(build_joint_model(source, sprm_config=sprm_config), create_mesh(), OmegaConf.create({}))
    optimizer = JointOptimizer(model, OmegaConf.create({"lr": 1e-3}), OmegaConf.create({"lr": 1e-3}))
    save_checkpoint(folder / "global_step_3" / "actor", model, optimizer, tokenizer, sprm_config)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return folder, source


@pytest.fixture(scope="module")
def merge() -> Callable:
    return runpy.run_path(str(SCRIPTS / "model_merger.py"))["merge"]


def run_shell(*arguments: object, cwd: Path = SCRIPTS, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPTS / "model_merger.sh"), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.mark.slow
def test_the_latest_checkpoint_becomes_the_same_model(experiment: tuple[Path, Path], tmp_path: Path):
    folder, source = experiment
    merged = tmp_path / "merged"
    result = run_shell(LOCAL_DIR=str(folder), TARGET_DIR=str(merged))
    assert result.returncode == 0, result.stderr
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, merged))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = load_sprm_config(merged, AutoTokenizer.from_pretrained(merged))
    assert config == load_sprm_config(source, AutoTokenizer.from_pretrained(source))
    heads = [load_score_head(path, 64, config).state_dict() for path in (source, merged)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    result = run_shell(folder, merged)
    assert result.returncode == 2
    assert result.stderr == f"error: {merged} exists already; remove it or choose another --target_dir\n"


def test_the_merged_model_gives_every_token_the_actors_probability(
    process_group: None, make_tiny_model: Callable[..., Path], merge: Callable, tmp_path: Path
):
    source = make_tiny_model(tied=False)
    tokenizer = AutoTokenizer.from_pretrained(source)
    actor = shard_model(build_joint_model(source), create_mesh(), OmegaConf.create({})).eval()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.1)
    save_checkpoint(tmp_path / "actor", actor, JointOptimizer(actor, OmegaConf.create({"lr": 1e-3})), tokenizer)
    merge(tmp_path / "actor", tmp_path / "merged")

    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, tmp_path / "merged"))
    vocabulary = torch.arange(after.config.vocab_size)
    ids = torch.cat([torch.tensor([[5, 9, 2, 7]]).expand(len(vocabulary), -1), vocabulary[:, None]], dim=1)
    with torch.no_grad():
        found = actor(ids, torch.ones_like(ids), torch.arange(5).expand_as(ids), response_length=1).log_probs[:, 0]
        then, now = (model(ids[:1, :-1]).logits[0, -1].log_softmax(-1) for model in (before, after))
    torch.testing.assert_close(found, now, atol=1e-5, rtol=1e-5)
    assert (found - then).abs().max() > 0.01


def test_a_tensor_that_does_not_fit_is_named(experiment: tuple[Path, Path], merge: Callable, tmp_path: Path):
    copy = tmp_path / "actor"
    shutil.copytree(experiment[0] / "global_step_3" / "actor", copy)
    path = copy / "huggingface" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))
    wrong = (
        r"12 tensors do not fit .*: model.lm.model.layers.0.mlp.down_proj.weight has shape \[64, 128\], .*\[64, 96\]"
    )
    with pytest.raises(UserError, match=wrong):
        merge(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_leaves_nothing_behind(experiment: tuple[Path, Path], merge: Callable, tmp_path: Path):
    copy = tmp_path / "actor"
    shutil.copytree(experiment[0] / "global_step_3" / "actor", copy)
    shard = next(copy.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        merge(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["actor"]


def test_what_is_missing_is_said(merge: Callable, tmp_path: Path):
    with pytest.raises(UserError, match=r"not a checkpoint: expected .* with .metadata"):
        merge(tmp_path, tmp_path / "out")
    result = run_shell()
    assert result.returncode == 2
    assert "LOCAL_DIR (the checkpoint) and TARGET_DIR (the folder to write) missing" in result.stderr
