"""Checkpoints on real FSDP2 ranks (gloo): going on is bitwise the same, and another world size can go on too.

This file is also the program that the ranks run (see `launch`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tensordict import TensorDict
from tiny import adam, policy_section
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import PreTrainedTokenizerFast

from verl.checkpoints.state import BackgroundSaves, load_checkpoint, save_checkpoint, try_saving
from verl.models.fsdp import create_mesh, init_distributed, named_full_tensors, shard_model
from verl.models.joint_model import JointModel
from verl.models.loading import build_joint_model, load_tokenizer
from verl.optim.optimizers import JointOptimizer
from verl.workers.actor.dp_actor import DataParallelPPOActor
from xbai.errors import UserError
from xbai.model_files import ModelFiles
from xbai.sprm import load_sprm_config

ROWS, PROMPT, RESPONSE = 8, 3, 5
SCHEDULE = {"warmup_style": "cosine", "lr_warmup_steps": 1}
TOTAL_STEPS = 5
CONFIG = policy_section(
    {
        "actor.ppo_mini_batch_size": 2,
        "actor.ppo_micro_batch_size_per_gpu": 2,
        "actor.ppo_epochs": 2,
        "actor.shuffle": True,
        "rollout.n": 2,
        "rollout.log_prob_micro_batch_size_per_gpu": 4,
        "score.agreement_weighting": False,
    }
)


def build(model_folder: Path, fsdp_size: int = -1) -> tuple[JointModel, JointOptimizer]:
    tokenizer = load_tokenizer(model_folder)
    sprm_config = load_sprm_config(model_folder, tokenizer)
    model = build_joint_model(model_folder, sprm_config=sprm_config, gradient_checkpointing=True)
    shard_model(model, create_mesh(fsdp_size))
    return model, JointOptimizer(model, adam(**SCHEDULE), adam(**SCHEDULE), TOTAL_STEPS)


def random_batch() -> TensorDict:
    """Rows from the global random state, so that a batch also shows whether that was restored."""
    input_ids = torch.randint(0, 200, (ROWS, PROMPT + RESPONSE))
    features = torch.rand(ROWS, PROMPT + RESPONSE) < 0.4
    features[:, :PROMPT] = False
    return TensorDict(
        {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "position_ids": torch.arange(PROMPT + RESPONSE).expand(ROWS, -1),
            "responses": input_ids[:, PROMPT:],
            "response_mask": torch.ones(ROWS, RESPONSE),
            "step_feature_mask": features,
            "correct": torch.rand(ROWS).round(),
            "graded": torch.ones(ROWS, dtype=torch.bool),
            "advantages": torch.randn(ROWS, 1).expand(-1, RESPONSE),
        },
        batch_size=[ROWS],
    )


def train_step(model: JointModel, optimizer: JointOptimizer) -> dict[str, float]:
    actor = DataParallelPPOActor(CONFIG, model, optimizer)
    batch = random_batch()
    return actor.update_policy(batch.update(actor.compute_log_prob(batch)))


def weights_of(model: JointModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named_full_tensors(model)}


def moments_of(model: JointModel, optimizer: JointOptimizer) -> dict[str, Tensor]:
    """Every tensor of the optimisers' states, whole."""
    options = StateDictOptions(full_state_dict=True)
    states = {
        name: get_optimizer_state_dict(model, part, options=options) for name, part in optimizer.optimizers.items()
    }
    return {
        f"{part}.{name}.{key}": value.clone()
        for part, state in states.items()
        for name, entries in state["state"].items()
        for key, value in entries.items()
    }


def state_of(model: JointModel, optimizer: JointOptimizer) -> dict[str, Tensor]:
    return {**weights_of(model), **moments_of(model, optimizer)}


def run_saving(model_folder: Path, folder: Path) -> dict:
    model, optimizer = build(model_folder)
    torch.manual_seed(dist.get_rank())
    train_step(model, optimizer)
    sprm_config = load_sprm_config(model_folder, load_tokenizer(model_folder))
    save_checkpoint(folder / "actor", model, optimizer, ModelFiles.read(model_folder), sprm_config)
    saved = state_of(model, optimizer)
    return {"saved": saved, "metrics": train_step(model, optimizer), "weights": weights_of(model)}


def wait_for(saves: BackgroundSaves) -> None:
    while not saves.is_done():
        time.sleep(0.01)


def run_saving_in_the_background(model_folder: Path, folder: Path) -> dict:
    """HSDP: two copies of the model. The second save meets a full disk, on one rank only."""
    model, optimizer = build(model_folder, fsdp_size=1)
    saves, arguments = BackgroundSaves(), (model, optimizer, ModelFiles.read(model_folder))
    train_step(model, optimizer)
    saved = state_of(model, optimizer)
    saves.start(folder / "actor", *arguments)
    train_step(model, optimizer)
    wait_for(saves)
    full = folder / "full"
    if dist.get_rank() == 0:
        full.mkdir()
        (full / "__1_0.distcp").symlink_to("/dev/full")
    dist.barrier()
    saves.start(full, *arguments)
    try:
        wait_for(saves)
    except UserError as error:
        return {"saved": saved, "now": state_of(model, optimizer), "error": str(error)}
    raise AssertionError("a full disk went unnoticed")


def run_resuming(model_folder: Path, folder: Path) -> dict:
    model, optimizer = build(model_folder)
    torch.manual_seed(100)
    load_checkpoint(folder / "actor", model, optimizer)
    loaded = state_of(model, optimizer)
    steps = [int(schedule.last_epoch) for schedule in optimizer.schedules.values()]
    metrics = train_step(model, optimizer)
    return {"loaded": loaded, "metrics": metrics, "weights": weights_of(model), "schedule_steps": steps}


def run_resuming_with_another_learning_rate(model_folder: Path, folder: Path) -> dict:
    model, optimizer = build(model_folder)
    for part in optimizer.optimizers.values():
        part.param_groups[0].update(lr=1.0, initial_lr=1.0, weight_decay=0.5)
    for schedule in optimizer.schedules.values():
        schedule.base_lrs = [1.0]
    load_checkpoint(folder / "actor", model, optimizer)
    groups = [part.param_groups[0] for part in optimizer.optimizers.values()]
    return {"rates": [group["lr"] for group in groups], "decays": [group["weight_decay"] for group in groups]}


def run_resuming_from_a_damaged_file(model_folder: Path, folder: Path) -> dict:
    model, optimizer = build(model_folder)
    try:
        load_checkpoint(folder / "actor", model, optimizer)
    except UserError as error:
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, str(error))
        return {"errors": errors}
    raise AssertionError("a flipped bit went unnoticed")


RUNS = {
    "save": run_saving,
    "background": run_saving_in_the_background,
    "resume": run_resuming,
    "damaged": run_resuming_from_a_damaged_file,
    "other_rate": run_resuming_with_another_learning_rate,
}


def launch(mode: str, ranks: int, model_folder: Path, folder: Path) -> dict:
    """Run this file on `ranks` processes and read what rank 0 wrote."""
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(ranks), __file__]
    arguments = [mode, str(model_folder), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {**torch.load(folder / "result.pt", weights_only=False), "log": done.stderr}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def saved(tied_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """Tied embeddings, because a parameter under two names is what state dicts get wrong."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return tied_model_dir, folder, launch("save", 2, tied_model_dir, folder)


@pytest.mark.slow
def test_going_on_is_bitwise_the_uninterrupted_run(saved: tuple[Path, Path, dict]) -> None:
    model_folder, folder, uninterrupted = saved
    resumed = launch("resume", 2, model_folder, folder)
    assert_same(resumed["loaded"], uninterrupted["saved"])
    assert resumed["metrics"] == uninterrupted["metrics"]
    assert_same(resumed["weights"], uninterrupted["weights"])
    before = load_file(model_folder / "model.safetensors")
    assert not torch.equal(resumed["loaded"]["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.slow
def test_a_flipped_bit_is_the_same_line_on_every_rank(saved: tuple[Path, Path, dict], tmp_path: Path) -> None:
    model_folder, folder, _ = saved
    shard = shutil.copytree(folder / "actor", tmp_path / "actor") / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    first, second = launch("damaged", 2, model_folder, tmp_path)["errors"]
    assert first == second and first.startswith(f"{shard} is damaged: its bytes are not those that were written; take ")


@pytest.mark.slow
def test_another_world_size_goes_on(saved: tuple[Path, Path, dict]) -> None:
    model_folder, folder, uninterrupted = saved
    resumed = launch("resume", 1, model_folder, folder)
    assert_same(resumed["loaded"], uninterrupted["saved"])
    assert resumed["schedule_steps"] == [1, 1]
    assert resumed["metrics"]["actor/lr"] == uninterrupted["metrics"]["actor/lr"]
    assert "random states start anew" in resumed["log"]


@pytest.mark.long
def test_a_save_in_the_background_is_of_its_moment_whatever_the_sharding(tied_model_dir: Path, tmp_path: Path) -> None:
    done = launch("background", 2, tied_model_dir, tmp_path)
    assert not torch.equal(done["saved"]["model.norm.weight"], done["now"]["model.norm.weight"])
    for ranks in (1, 2):
        assert_same(launch("resume", ranks, tied_model_dir, tmp_path)["loaded"], done["saved"])
    assert "could not be written: rank 1: OSError: [Errno 28] No space left on device" in done["error"]


@pytest.mark.long
def test_two_ranks_go_on_from_one(tied_model_dir: Path, tmp_path: Path) -> None:
    saved = launch("save", 1, tied_model_dir, tmp_path)["saved"]
    assert_same(launch("resume", 2, tied_model_dir, tmp_path)["loaded"], saved)


@pytest.mark.slow
def test_settings_of_the_optimizer_are_the_configurations(saved: tuple[Path, Path, dict]) -> None:
    model_folder, folder, uninterrupted = saved
    resumed = launch("other_rate", 1, model_folder, folder)
    assert resumed["rates"] == pytest.approx([uninterrupted["metrics"]["actor/lr"] * 1e3] * 2)
    assert resumed["decays"] == [0.5] * 2


@pytest.mark.slow
def test_the_checkpoint_carries_config_tokenizer_and_step_rule(
    saved: tuple[Path, Path, dict], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = saved[1] / "actor" / "huggingface"
    assert load_tokenizer(folder).get_vocab() == tiny_tokenizer.get_vocab()
    assert load_sprm_config(folder, tiny_tokenizer).step_rule.step_ids == (tiny_tokenizer.encode(".\n\n")[0],)
    assert (folder / "config.json").exists()


def test_a_trial_writes_all_but_the_weights(process_group: None, tiny_model_dir: Path, tmp_path: Path) -> None:
    files = ModelFiles.read(tiny_model_dir)
    sprm_config = load_sprm_config(tiny_model_dir, load_tokenizer(tiny_model_dir))
    try_saving(tmp_path / "actor", files, sprm_config)
    written = {path.name for path in (tmp_path / "actor" / "huggingface").iterdir()}
    assert written == files.contents.keys() | {"sprm_config.json"} and (tmp_path / "actor" / ".metadata").is_file()


def disk_is_full(folder: Path) -> None:
    (folder / "__0_0.distcp").symlink_to("/dev/full")


def files_are_in_the_way(folder: Path) -> None:
    (folder / "huggingface").touch()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (disk_is_full, r"rank 0: OSError: \[Errno 28\] No space left on device.*; make room or choose another folder"),
        (files_are_in_the_way, r"rank 0: FileExistsError: .*huggingface'; choose another folder"),
    ],
)
def test_a_trial_says_why_it_failed(break_it, message, process_group, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "actor").mkdir()
    break_it(tmp_path / "actor")
    with pytest.raises(UserError, match=message) as caught:
        try_saving(tmp_path / "actor", ModelFiles.read(tiny_model_dir))
    assert "\n" not in str(caught.value)


def test_a_folder_without_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        load_checkpoint(tmp_path, None, None)


if __name__ == "__main__":
    init_distributed()
    run = RUNS[sys.argv[1]]
    result = run(Path(sys.argv[2]), Path(sys.argv[3]))
    if dist.get_rank() == 0:
        torch.save(result, Path(sys.argv[3]) / "result.pt")
    dist.destroy_process_group()
