"""The standardised start on real ranks is that of one process; and in whole runs, fresh heads alone get it.

This file is also the program that the ranks run (see `launch`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import PROMPT, RESPONSE, ROWS, adam, padded_rows, policy_section, tiny_lm
from torch import Tensor
from torch.nn.functional import pad

from verl.checkpoints.state import load_checkpoint, save_checkpoint
from verl.models.fsdp import create_mesh, init_distributed, named_full_tensors, shard_model
from verl.models.head_start import standardize_features
from verl.models.joint_model import JointModel
from verl.models.loading import attention_for, build_joint_model, load_tokenizer
from verl.models.packing import padded_layout
from verl.models.ulysses import sequence_parallel_group
from verl.optim.optimizers import JointOptimizer
from verl.workers.actor.dp_actor import PolicyLogProbs
from xbai.model_files import ModelFiles
from xbai.sprm import FeatureMoments, ScoreHead, load_sprm_config, save_score_head, shift_head, standardize_head
from xbai.sprm.head import SCORE_MODULE_FILE, SPRM_CONFIG_FILE

RANKS = 2
WAYS = ("padded", "packed", "shared", "replicated")
"""How they compute; in `shared` both have the same rows, in `replicated` each has the whole head."""
OPTIM = adam(lr=1e-2)


def make_model(packed: bool = False) -> JointModel:
    """One coordinate of its residual stream is huge."""
    lm = tiny_lm()
    lm.model.embed_tokens.weight.data[:, 5] += 8.0
    lm.set_attn_implementation(attention_for(torch.float32, packed))
    return JointModel(lm, ScoreHead(32))


def make_batch() -> dict[str, Tensor]:
    """The second half of the rows, which is that of rank 1, has a single step."""
    generator = torch.Generator().manual_seed(1)
    rows = padded_rows(generator)
    features = torch.rand(ROWS, PROMPT + RESPONSE, generator=generator) < 0.5
    features &= pad(rows["response_mask"], (PROMPT, 0))
    features[ROWS // 2 :] = False
    features[-1, PROMPT + 1] = True
    return {**rows, "step_feature_mask": features}


def head_of(model: JointModel) -> dict[str, Tensor]:
    tensors = named_full_tensors(model)
    return {name.removeprefix("score_head."): w.clone() for name, w in tensors if name.startswith("score_head.")}


def run_rank(output: Path) -> None:
    """Standardise, shift, and let the optimiser make a step whose gradient is the weights; rank 0 writes the heads."""
    init_distributed()
    rank, groups, results = dist.get_rank(), {size: sequence_parallel_group(size) for size in (1, RANKS)}, {}
    for way in WAYS:
        packed, sp_size = way in ("packed", "shared"), RANKS if way == "shared" else 1
        changes = {"model.use_remove_padding": packed, "rollout.log_prob_micro_batch_size_per_gpu": 3}
        config = policy_section(changes)
        model = shard_model(make_model(packed), create_mesh(1 if way == "replicated" else -1))
        optimizer = JointOptimizer(model, OPTIM, OPTIM)
        policy = PolicyLogProbs(config, model, config.rollout, groups[sp_size])
        half = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
        mine = slice(None) if way == "shared" else half
        batch = {name: column[mine] for name, column in make_batch().items()}
        steps = standardize_features(model, partial(policy.compute_log_prob, batch, compute_entropy=False))
        shift_head(model.score_head, 0.25)
        started = head_of(model)
        for parameter in model.score_head.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step(max_norm=1.0)
        results[way] = {"steps": steps, "started": started, "updated": head_of(model)}
    if rank == 0:
        torch.save(results, output)
    dist.destroy_process_group()


def launch(folder: Path) -> dict[str, dict[str, Any]]:
    output = folder / "heads.pt"
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(RANKS), __file__, str(output)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output, weights_only=False)


@pytest.mark.slow
@torch.no_grad()
def test_the_start_is_that_of_plain_features(tmp_path: Path) -> None:
    batch, model = make_batch(), make_model().eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    features = model.lm(**inputs, output_hidden_states=True).hidden_states[-2][batch["step_feature_mask"]]
    mean, deviation = features.double().mean(0), features.double().std(0, correction=0)
    assert mean.abs().max() > 20 * deviation[mean.abs().argmax()]
    started = model.score_head(((features - mean) / deviation).float()) + 0.25
    moments = FeatureMoments(32)
    moments.add(features)
    standardize_head(model.score_head, moments)
    shift_head(model.score_head, 0.25)
    optimizer = JointOptimizer(model, OPTIM, OPTIM)
    for parameter in model.score_head.parameters():
        parameter.grad = parameter.clone()
    optimizer.step(max_norm=1.0)
    found = ScoreHead(32).eval()
    for way, result in launch(tmp_path).items():
        assert result["steps"] == len(features) > 10
        found.load_state_dict(result["started"])
        torch.testing.assert_close(found(features), started, rtol=1e-4, atol=1e-4, msg=way)
        found.load_state_dict(result["updated"])
        torch.testing.assert_close(found(features), model.score_head(features), rtol=1e-3, atol=1e-3, msg=way)
        assert (found(features) - started).abs().mean() > 0.01


@torch.no_grad()
def test_a_loaded_head_scores_as_before_where_only_its_updates_are_standardised(tmp_path: Path) -> None:
    model, batch = make_model().eval(), make_batch()
    before = {name: weight.clone() for name, weight in model.score_head.state_dict().items()}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layout = padded_layout(batch)
        standardize_features(model, lambda: model(layout), is_fresh=False)
    finally:
        dist.destroy_process_group()
    assert all(map(torch.equal, before.values(), model.score_head.state_dict().values()))
    mean, deviation = model.score_head.standardization
    assert mean[5] > 20 * deviation[5] > 0


def test_a_checkpoint_keeps_what_a_head_was_standardised_by(tiny_model_dir: Path, tmp_path: Path) -> None:
    files, config = ModelFiles.read(tiny_model_dir), load_sprm_config(tiny_model_dir, load_tokenizer(tiny_model_dir))
    moments = FeatureMoments(64)
    moments.add(torch.randn(50, 64) + 3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        models = [shard_model(build_joint_model(tiny_model_dir, sprm_config=config), create_mesh()) for _ in "ab"]
        optimizers = [JointOptimizer(model, OPTIM, OPTIM) for model in models]
        save_checkpoint(tmp_path / "published", models[0], optimizers[0], files, config)
        standardize_head(models[0].score_head, moments)
        save_checkpoint(tmp_path / "standardized", models[0], optimizers[0], files, config)
        load_checkpoint(tmp_path / "published", models[1], optimizers[1])
        assert models[1].score_head.standardization is None
        load_checkpoint(tmp_path / "standardized", models[1], optimizers[1])
        assert all(map(torch.equal, models[1].score_head.standardization, moments.standardization))
        assert all(map(torch.equal, *(head_of(model).values() for model in models)))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def model_without_head(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every third token of random text ends a step."""
    folder = tmp_path_factory.mktemp("model") / "without_head"
    shutil.copytree(tiny_model_dir, folder)
    (folder / SCORE_MODULE_FILE).unlink()
    config = json.loads((folder / SPRM_CONFIG_FILE).read_text(encoding="utf-8"))
    config["step_rule"] |= {"step_ids": list(range(80)), "think_open_id": None, "think_close_id": None}
    (folder / SPRM_CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def published(small_run: list[str], model_without_head: Path) -> list[str]:
    """One process, with the published setting of the score loss."""
    return [
        *(key for key in small_run if "agreement_weighting" not in key),
        f"actor_rollout_ref.model.path={model_without_head}",
        "data.val_files=null",
        "trainer.n_gpus_per_node=1",
    ]


def said_by(run: Any) -> str:
    return " ".join(run.log().split())


@pytest.mark.long
def test_a_fresh_head_starts_undecided(published: list[str], start_run: Callable[..., Any], tmp_path: Path) -> None:
    run = start_run(tmp_path, [*published, "trainer.total_training_steps=2"]).finish()
    assert "the fresh score head starts on features standardised by" in said_by(run)
    metrics = run.metrics()
    assert metrics[1]["score/one_sided"] < 0.7
    assert "timing_s/head_start" in metrics[1] and "timing_s/head_start" not in metrics[2]
    for row in metrics.values():
        assert row["score/counted_right"] > 0 and row["score/counted_wrong"] > 0
        assert {"score/within_prompt_auc", "score/best_of_n_gain"} <= row.keys()


@pytest.mark.long
def test_a_resumed_head_goes_on_and_a_healthy_one_is_not_warned_of(
    published: list[str], start_run: Callable[..., Any], tmp_path: Path
) -> None:
    published = [*published, "trainer.save_freq=6"]
    assert "one-sided" not in said_by(start_run(tmp_path, [*published, "trainer.total_training_steps=6"]).finish())
    resumed = start_run(tmp_path, [*published, "trainer.total_training_steps=7"]).finish()
    assert "standardised" not in resumed.log().partition("going on from")[2]
    metrics = resumed.metrics()
    assert sorted(metrics) == [1, 2, 3, 4, 5, 6, 7] and "timing_s/head_start" not in metrics[7]


@pytest.mark.long
def test_a_one_sided_head_that_was_loaded_is_left_alone_and_warned_of(
    published: list[str], start_run: Callable[..., Any], tmp_path: Path
) -> None:
    head = ScoreHead(64)
    torch.nn.init.constant_(head[3].bias, -9.0)
    save_score_head(tmp_path, head.state_dict(), None)
    loaded = [f"actor_rollout_ref.score.model_path={tmp_path}", "trainer.total_training_steps=6"]
    run = start_run(tmp_path / "run", [*published, *loaded]).finish()
    said = said_by(run)
    assert "standardised by" not in said
    assert said.count("the score head is one-sided: for 5 updates no step of a right answer counted") == 1
    assert "Go on with actor_rollout_ref.score.agreement_weighting=false" in said
    for row in run.metrics().values():
        assert row["score/one_sided"] == 1.0 and row["score/counted_right"] == 0 and row["score/loss"] == 0


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
