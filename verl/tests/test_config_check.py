"""Every mistake in the configuration is one clear line, before a model or Ray starts."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import ray
import torch

from verl.single_controller import WorkerLostError
from verl.trainer import main_ppo
from verl.trainer.config.check import check_config
from verl.trainer.config.compose import compose_config, leaves
from verl.trainer.config.schema import YAML, PPOConfig
from xbai.errors import UserError

TOKEN_BUDGETS = (
    ("actor_rollout_ref.actor", "use_dynamic_bsz", "ppo_max_token_len_per_gpu"),
    ("actor_rollout_ref.ref", "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu"),
    ("actor_rollout_ref.rollout", "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu"),
    ("critic", "use_dynamic_bsz", "ppo_max_token_len_per_gpu"),
    ("critic", "use_dynamic_bsz", "forward_max_token_len_per_gpu"),
)
RUN_SINGLE_NODE = Path(__file__).parents[2] / "scripts" / "run_single_node.sh"


def _check(overrides) -> PPOConfig:
    return check_config(compose_config(YAML, overrides))


@pytest.fixture
def fails(capsys, monkeypatch, small_run):
    """Run the trainer's main with further overrides; returns the one line that it must end with."""

    def run(*overrides, base=small_run):
        monkeypatch.setattr(sys, "argv", ["main_ppo", *base, *overrides])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            main_ppo.main()
        assert ending.value.code == 2
        assert not ray.is_initialized()
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return run


def test_a_valid_configuration_passes(small_run):
    assert _check(small_run).trainer.n_gpus_per_node == 2
    _check([*small_run, "actor_rollout_ref.actor.kl_loss_type=k3", "algorithm.kl_penalty=k1"])
    for kind in ("kl+", "k1+", "k3+", "low_var_kl+", "full"):
        _check([*small_run, f"actor_rollout_ref.actor.kl_loss_type={kind}", "algorithm.kl_penalty=kl"])
    _check([*small_run, "actor_rollout_ref.actor={use_kl_loss: false, kl_loss_type: kl}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train_batch=4", "unknown configuration key data.train_batch; did you mean data.train_batch_size?"),
        ("+trainer.colour=red", "trainer.colour is not a key"),
        ("data.train_files=nowhere.parquet", "data.train_files: nowhere.parquet does not exist"),
        ("data.prompt_key=question", "has no column 'question'; it has data_source, prompt"),
        ("actor_rollout_ref.model.path=nowhere", "actor_rollout_ref.model.path: nowhere/config.json: no such file"),
        ("data.train_batch_size=6", "data.train_batch_size=6 must be a multiple of"),
        ("actor_rollout_ref.rollout.n=1", "needs at least 2"),
        ("trainer.n_gpus_per_node=3", "4 * 4 = 16 must be a multiple of the 3 processes"),
        ("data.train_batch_size=many", "data.train_batch_size=many must be a whole number"),
        ("data.shuffle=1", "data.shuffle=1 must be true or false"),
        ("trainer.save_freq=null", "trainer.save_freq=null must be a whole number, like its default 20"),
        ("actor_rollout_ref.actor.clip_ratio_c=null", "clip_ratio_c=null must be a number, like its default 3.0"),
        ("trainer.logger=null", "trainer.logger=null must be a list"),
        ("data.dataloader_num_workers=null", "dataloader_num_workers=null must be a whole number"),
        ("trainer.experiment_name=null", "trainer.experiment_name=null must be text"),
        ("data.train_files=null", "data.train_files must be given, not null"),
        ("data.val_batch_size=-1", "data.val_batch_size=-1 must be a whole number above 0, or null"),
        ("trainer.total_training_steps=0", "total_training_steps=0 must be a whole number above 0, or null"),
        ("trainer.max_actor_ckpt_to_keep=some", "max_actor_ckpt_to_keep=some must be a whole number above 0, or null"),
        ("actor_rollout_ref.score.channel=32", "score.channel=32 must be null, or the model's hidden_size=64"),
        (
            "trainer={length_penalty: true, length_penalty_coeff: 2.5}",
            "above 2 a long right answer would be worth less than a wrong one",
        ),
        ("data.max_response_length=0", "data.max_response_length=0 must be above 0"),
        ("data.dataloader_num_workers=-1", "data.dataloader_num_workers=-1 must not be below 0"),
        ("trainer.default_hdfs_dir=s3://bucket/run", "trainer.default_hdfs_dir=s3://bucket/run: Install s3fs"),
        ("trainer.default_hdfs_dir=s3:/bucket/run", "must be a folder, or a URL such as s3://bucket/folder"),
        ("trainer.default_local_dir=/dev/null", "trainer.default_local_dir=/dev/null: /dev/null is no folder"),
        ("trainer.rollout_data_dir=/dev/null/samples", "rollout_data_dir=/dev/null/samples: /dev/null is no folder"),
        ("trainer.default_local_dir=s3://bucket/run", "must be a folder of this machine"),
        ("trainer.resume_from_path=somewhere", "acts with trainer.resume_mode=resume_path only"),
        ("reward_model.batch_timeout_s=5", "cannot act with reward_model.reward_manager=prime, only with batch"),
        ("reward_model.overlong_buffer.len=5", "cannot act with reward_model.reward_manager=prime, only with dapo"),
        ("reward_model.reward_manager=dapo", "overlong_buffer.len=0: reward_manager=dapo needs it between 1 and"),
        ("reward_model={reward_manager: dapo, overlong_buffer: {len: 25}}", "and data.max_response_length=24"),
        ("reward_model.max_ungraded_batches=0", "must be a whole number above 0, or null"),
        ("reward_model.memory_gib=0", "reward_model.memory_gib=0 must be above 0"),
        ("actor_rollout_ref.nccl_timeout=0", "actor_rollout_ref.nccl_timeout=0 must be above 0"),
        ("critic.nccl_timeout=0", "critic.nccl_timeout=0 must be a whole number above 0, or null"),
        ("ray_init.timeout_s=0", "ray_init.timeout_s=0 must be above 0"),
        ("trainer.logger=[console,neptune]", "trainer.logger: neptune is unknown"),
        (
            "trainer.log_samples_freq=5",
            "trainer.log_samples_freq=5 needs a logger with tables: add one of tensorboard, ",
        ),
        ("trainer.log_samples=0", "trainer.log_samples=0 must be above 0"),
        ("trainer={profile_steps: [2, 9], total_training_steps: 8}", "profile_steps: step 9 is after the last one, "),
        ("trainer.profile_steps=[0]", "trainer.profile_steps=[0] must be a list of steps, which count from 1"),
        ("actor_rollout_ref.actor.kl_loss_type=kl", "kl_loss_type=kl has no gradient as a loss"),
        ("actor_rollout_ref.actor.kl_loss_type=k1", "use low_var_kl, mse or full, or k1+"),
        ("actor_rollout_ref.actor.kl_loss_type=full+", "kl_loss_type=full+ is unknown"),
        ("algorithm.kl_penalty=low_var_kl+", "algorithm.kl_penalty=low_var_kl+ is unknown"),
        ("algorithm.adv_estimator=magic", "algorithm.adv_estimator=magic is unknown, use one of grpo, "),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", "set actor_rollout_ref.model.use_remove_padding="),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=3", "=3 must divide the 2 processes"),
        ("actor_rollout_ref.ref.ulysses_sequence_parallel_size=0", "=0 must be above 0"),
        ("critic.optim.lr=1", "critic.optim.lr=1 acts only with algorithm.adv_estimator=gae"),
        ("trainer.critic_warmup=2", "trainer.critic_warmup=2 acts only with algorithm.adv_estimator=gae"),
        ("trainer.critic_warmup=-1", "trainer.critic_warmup=-1 must be at least 0"),
        ("actor_rollout_ref.actor.loss=grpo", "actor.loss=grpo is unknown, use one of ppo, gspo, cispo, dr_grpo"),
        ("actor_rollout_ref.actor.loss=dr_grpo", "set algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo="),
        (
            "actor_rollout_ref.actor={loss: gspo, clip_ratio_c: 5.0}",
            "clip_ratio_c=5.0 acts only with actor_rollout_ref",
        ),
        (
            "actor_rollout_ref.actor.rollout_is_mode=mask",
            "acts only with actor_rollout_ref.actor.rollout_is=token or sequence",
        ),
        (
            "actor_rollout_ref.actor.rollout_is_threshold=3",
            "acts only with actor_rollout_ref.actor.rollout_is=token or sequence",
        ),
        (
            "actor_rollout_ref.actor={rollout_is: token, rollout_is_threshold_lower: 0.5}",
            "acts only with actor_rollout_ref.actor.rollout_is_mode=mask",
        ),
        (
            "actor_rollout_ref.actor={rollout_is: token, rollout_is_mode: mask, rollout_is_threshold: 0.9}",
            "rollout_is_threshold=0.9 must be above the lower bound 1.11111 of rollout_is_mode=mask",
        ),
        ("actor_rollout_ref.actor={rollout_is: token, tis_imp_ratio_cap: 2}", "leave it out beside rollout_is=token"),
        ("actor_rollout_ref.actor.rollout_rs_geo_threshold=1", "must be a number above 1, or null"),
        ("actor_rollout_ref.actor.tis_imp_ratio_cap=0", "tis_imp_ratio_cap=0 must be a number above 0, or null"),
        ("actor_rollout_ref.actor.fsdp_config.offload_policy=true", "cannot act on CPU"),
        ("actor_rollout_ref.rollout.gpu_memory_utilization=0.5", "cannot act on CPU"),
        ("actor_rollout_ref.rollout.enforce_eager=never", "enforce_eager=never must be true or false, or null"),
        ("trainer.rollout_data_dir=[samples]", "rollout_data_dir=['samples'] must be text, or null"),
        ("actor_rollout_ref.rollout.enforce_eager=false", "cannot act with rollout.name=hf"),
        ("actor_rollout_ref.rollout.max_num_batched_tokens=64", "cannot act with rollout.name=hf"),
        ("data.max_response_length=5000", "max_position_embeddings of "),
        ("actor_rollout_ref.actor.fsdp_config.compute_dtype=int8", "compute_dtype=int8 is unknown"),
        ("+actor_rollout_ref.actor.fsdp_config.model_dtype=int8", "model_dtype=int8 is unknown"),
        ("trainer.resume_mode=resume_path", "needs a folder or URL global_step_N"),
        ("data.train_files=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("actor_rollout_ref.rollout.max_model_len=50", "is less than data.max_prompt_length"),
    ],
)
def test_a_mistake_is_one_line(fails, override, said):
    assert said in fails(override)


def test_dr_grpo_has_its_own_aggregation(fails, small_run):
    dr_grpo = ["actor_rollout_ref.actor.loss=dr_grpo", "algorithm.norm_adv_by_std_in_grpo=false"]
    assert _check([*small_run, *dr_grpo]).actor_rollout_ref.actor.aggregation == "seq-mean-token-sum-norm"
    assert "take loss=ppo for" in fails(*dr_grpo, "actor_rollout_ref.actor.loss_agg_mode=token-mean")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("critic.ppo_mini_batch_size=3", "must be a multiple of critic.ppo_mini_batch_size=3"),
        ("critic.ppo_epochs=0", "critic.ppo_epochs=0 must be a whole number above 0, or null"),
        ("critic.cliprange_value=0", "critic.cliprange_value=0 must be above 0"),
        ("critic.ulysses_sequence_parallel_size=2", "set critic.model.use_remove_padding=true"),
        ("critic.model.path=nowhere", "critic.model.path: nowhere"),
        ("critic.optim.name=SGD", "critic.optim.name=SGD is unknown"),
        ("critic.model.fsdp_config.param_offload=true", "needs a GPU and cannot act on CPU"),
    ],
)
def test_a_mistake_in_the_critic_is_one_line(fails, override, said):
    assert said in fails("algorithm.adv_estimator=gae", override)


def test_the_critic_needs_the_policys_vocabulary(fails, tmp_path, tiny_model_dir):
    shape = json.loads((tiny_model_dir / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**shape, "vocab_size": 7}), encoding="utf-8")
    (tmp_path / "model.safetensors").symlink_to(tiny_model_dir / "model.safetensors")
    assert "vocab_size 7" in fails("algorithm.adv_estimator=gae", f"critic.model.path={tmp_path}")


def test_processes_that_share_rows_divide_the_critics_own_heads(small_run, tmp_path, tiny_model_dir):
    shape = json.loads((tiny_model_dir / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps({**shape, "num_attention_heads": 3, "num_key_value_heads": 3}), encoding="utf-8"
    )
    packed = ["algorithm.adv_estimator=gae", "actor_rollout_ref.model.use_remove_padding=true"]
    shared = [*small_run, *packed, f"critic.model.path={tmp_path}", "critic.ulysses_sequence_parallel_size=2"]
    with pytest.raises(UserError, match=r"critic: .*size=2 does not divide the model's 3 attention heads"):
        _check(shared)


def test_nulls_in_the_critic_are_the_actors_values(small_run):
    overrides = ["algorithm.adv_estimator=gae", "actor_rollout_ref.actor.ppo_epochs=3", "critic.ppo_mini_batch_size=2"]
    config = _check([*small_run, *overrides])
    critic = config.critic
    assert (critic.ppo_epochs, critic.ppo_mini_batch_size) == (3, 2)
    assert critic.ppo_micro_batch_size_per_gpu == critic.forward_micro_batch_size_per_gpu == 8
    assert critic.model.path == config.actor_rollout_ref.model.path
    assert None not in [value for key, value in leaves(asdict(critic)) if not key.endswith("_dtype")]


@pytest.mark.parametrize(("section", "switch", "budget"), TOKEN_BUDGETS)
def test_a_token_budget_below_one_sequence_is_refused(small_run, section, switch, budget):
    small = [*small_run, "algorithm.adv_estimator=gae", f"{section}.{budget}=87"]
    _check(small)
    with pytest.raises(UserError, match=rf"{section}\.{budget}=87 is less than .* = 88"):
        _check([*small, f"{section}.{switch}=true"])


@pytest.mark.parametrize("section", ["actor", "ref"])
def test_two_ways_to_offload_exclude_each_other(small_run, monkeypatch, section):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    key = f"actor_rollout_ref.{section}.fsdp_config"
    on_gpu = [*small_run, "trainer.device=cuda", f"{key}.param_offload=true"]
    _check(on_gpu)
    with pytest.raises(UserError, match=f"{key}: param_offload and offload_policy exclude each other"):
        _check([*on_gpu, f"{key}.offload_policy=true"])


def test_a_file_that_is_not_parquet(fails, tmp_path):
    (tmp_path / "rows.parquet").write_text("{}", encoding="utf-8")
    assert "rows.parquet is cut off, or not a parquet file" in fails(f"data.train_files={tmp_path}/rows.parquet")


def test_required_keys_are_named(small_run):
    rest = [override for override in small_run if not override.startswith("data.train_files")]
    with pytest.raises(UserError, match=r"data\.train_files is not set"):
        _check(rest)


def test_model_without_weights_or_tokenizer(fails, tmp_path, tiny_model_dir):
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    assert "has no weights (*.safetensors or pytorch_model*.bin)" in fails(f"actor_rollout_ref.model.path={tmp_path}")
    (tmp_path / "model.safetensors").symlink_to(tiny_model_dir / "model.safetensors")
    assert "no tokenizer" in fails(f"actor_rollout_ref.model.path={tmp_path}")


def test_shards_that_are_not_here_yet_are_said_after_the_report_of_a_dry_run(capsys, monkeypatch, small_run, tmp_path):
    model = next(override for override in small_run if override.startswith("actor_rollout_ref.model.path="))
    folder = shutil.copytree(model.partition("=")[2], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "another.safetensors").touch()
    command = ["main_ppo", "--dry-run", *small_run, f"actor_rollout_ref.model.path={folder}"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main_ppo.main()
    printed = capsys.readouterr()
    assert "Dry run:" in printed.out
    assert "model-00001-of-00001.safetensors: no such file, but model.safetensors.index.json names it" in printed.err


def test_row_without_prompt(fails, tmp_path):
    row = {"data_source": "make10", "reward_model": {"ground_truth": "1 2 3 4"}}
    rows = [{**row, "prompt": [{"role": "user", "content": "hi"}]}, {**row, "prompt": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert "rows.parquet: row 2: 'prompt' must be a non-empty list" in fails(
        f"data.train_files={tmp_path}/rows.parquet"
    )


@pytest.mark.parametrize("key", ["train_files", "val_files"])
def test_a_prompt_that_the_template_refuses(fails, training_files, tiny_model_dir, tmp_path, key):
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    template = "{% if messages|length > 1 %}{{ raise_exception('System role\nnot supported') }}{% endif %}?"
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    rows = datasets.Dataset.from_parquet(str(training_files / "train.parquet")).to_list()
    rows[5]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    line = fails(f"actor_rollout_ref.model.path={model}", f"data.{key}={tmp_path}/rows.parquet")
    assert line.endswith("rows.parquet: row 6: 'prompt': the chat template refuses it: System role not supported")


def test_data_source_without_grader(fails, tmp_path):
    row = {"data_source": "poetry", "reward_model": {"ground_truth": "?"}, "prompt": [{"role": "user", "content": "x"}]}
    datasets.Dataset.from_list([row] * 4).to_parquet(tmp_path / "rows.parquet")
    overrides = [f"data.train_files={tmp_path}/rows.parquet", "custom_reward_function.path=null"]
    assert "data_source 'poetry': no grader for it" in fails(*overrides)


def test_a_driver_without_gpus_cannot_guess_what_the_cluster_has(small_run, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "device=auto looks at this machine only" in fails("trainer.device=auto", "trainer.nnodes=2")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "device=auto looks at this machine only" in fails("trainer.device=auto")
    on_cluster = ["trainer.device=cuda", "actor_rollout_ref.rollout.dtype=float32"]
    assert _check([*small_run, *on_cluster]).trainer.device == "cuda"


def test_a_dead_worker_is_one_line_and_another_exit_status(small_run, monkeypatch, capsys, tmp_path):
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    def die(trainer):
        raise WorkerLostError("worker rank 1 of actor died in update_actor")

    monkeypatch.setattr(RayPPOTrainer, "init_workers", die)
    monkeypatch.setattr(sys, "argv", ["main_ppo", *small_run, f"trainer.default_local_dir={tmp_path}"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main_ppo.main()
    assert ending.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.partition(";")[0] for line in lines] == ["error: worker rank 1 of actor died in update_actor"]


def test_missing_gpus_are_explained_by_the_launch_script(tmp_path):
    ended = subprocess.run(
        ["bash", str(RUN_SINGLE_NODE), "trainer.n_gpus_per_node=4096"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert "needs 4096 GPUs; this machine has" in lines[0] and "trainer.device=cpu" in lines[0]


def test_sequence_parallel_sizes_fit_the_model_and_multiply_budgets(small_run):
    shared = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    packed = [*small_run, "actor_rollout_ref.model.use_remove_padding=true", "trainer.n_gpus_per_node=4"]
    config = _check([*packed, f"{shared}=2"])
    assert config.actor_rollout_ref.ref.ulysses_sequence_parallel_size == 2, "the actor's, unless it is set"
    with pytest.raises(UserError, match=r"=4 does not divide the model's 2 attention heads: choose one of 1, 2$"):
        _check([*packed, f"{shared}=4"])
    budget = [*packed, "actor_rollout_ref.actor.use_dynamic_bsz=true"]
    _check([*budget, f"{shared}=2", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=44"])
    with pytest.raises(UserError, match=r"ppo_max_token_len_per_gpu \* ulysses_sequence_parallel_size=86 is less than"):
        _check([*budget, f"{shared}=2", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=43"])
    with pytest.raises(UserError, match="= 4 must be a multiple of the 3 groups of 2 processes"):
        _check([*packed, f"{shared}=2", "trainer.n_gpus_per_node=6", "actor_rollout_ref.actor.ppo_mini_batch_size=1"])
