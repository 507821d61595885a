"""Keys of the public trainers (verl 0.3, MetaStone-S1, XBai o4) that are none here; what to write instead."""

from __future__ import annotations

from typing import Any, NamedTuple


class UpstreamKey(NamedTuple):
    """What to write or do in place of a key that is none here. Values that ask for what is so here anyway (`holds`),
    nothing and null are accepted."""

    instead: str
    holds: tuple[Any, ...] = ()


ROOT = "actor_rollout_ref"
OPTIMS = (f"{ROOT}.actor.optim", f"{ROOT}.score.optim", "critic.optim")
FSDP_CONFIGS = (f"{ROOT}.actor.fsdp_config", f"{ROOT}.ref.fsdp_config", "critic.model.fsdp_config")

_MULTIMODAL = "images and videos are not trained on here; leave it out"
_DATA_PLACE = (
    "a run goes on in its data where its checkpoint was, without being told; leave out data.resume and "
    "data.resume_global_steps"
)
_COMPILED = f"write {ROOT}.model.use_fused_kernels=true, false or auto, which compiles softmax, log-prob and entropy"
_CHECKPOINT = (
    "a checkpoint always holds model, optimiser and the rest of the state, and verl/scripts/model_merger.sh makes a "
    "Hugging Face folder of it; leave it out"
)
_MODEL_CODE = f"a model's own code is in its folder: write {ROOT}.model.trust_remote_code=true"
_MODEL_CONFIG = "change config.json in the model's folder"
_SWAP = "vLLM swaps no more, it computes what it has preempted again; leave it out"
_AGENT_LOOPS = "it belongs to verl's agent loops, which this trainer does not have; leave it out"
_SAMPLES = "write trainer.rollout_data_dir=FOLDER, which gets all samples of every training step"
_REWARD_MODEL = (
    "there are no reward models of another backbone here; grade by rules, or by a function of your own with "
    "custom_reward_function.path=FILE.py"
)


def _per_gpu(key: str) -> UpstreamKey:
    return UpstreamKey(f"write {key}_per_gpu=..., the responses that one process takes in one pass")


UPSTREAM_KEYS: dict[str, UpstreamKey] = {
    "data.tokenizer": UpstreamKey(f"the tokenizer is the one in the folder of {ROOT}.model.path; leave it out"),
    "data.return_raw_input_ids": UpstreamKey(_REWARD_MODEL, (False,)),
    "data.return_full_prompt": UpstreamKey(
        "write data.return_raw_chat=true, which gives reward functions the messages", (False,)
    ),
    "data.filter_overlong_prompts_workers": UpstreamKey("the driver measures the prompts itself; leave it out", (1,)),
    "data.image_key": UpstreamKey(_MULTIMODAL, ("images",)),
    "data.video_key": UpstreamKey(_MULTIMODAL, ("videos",)),
    "data.custom_cls": UpstreamKey("write the rows into a parquet file, as docs/formats.md says"),
    "data.resume": UpstreamKey(_DATA_PLACE, (False,)),
    "data.resume_global_steps": UpstreamKey(_DATA_PLACE, (1,)),
    "data.additional_prompt": UpstreamKey("write it into the prompts of the data; MetaStone-S1 itself never used it"),
    f"{ROOT}.hybrid_engine": UpstreamKey("trainer and engine always share their processes; leave it out", (True,)),
    f"{ROOT}.model.external_lib": UpstreamKey(_MODEL_CODE),
    f"{ROOT}.model.override_config": UpstreamKey(_MODEL_CONFIG, ({},)),
    f"{ROOT}.actor.use_torch_compile": UpstreamKey(_COMPILED),
    f"{ROOT}.actor.checkpoint": UpstreamKey(_CHECKPOINT, (["model", "optimizer", "extra"],)),
    f"{ROOT}.ref.strategy": UpstreamKey("the reference is sharded by FSDP2; leave it out", ("fsdp", "fsdp2")),
    f"{ROOT}.ref.use_torch_compile": UpstreamKey(_COMPILED),
    f"{ROOT}.ref.log_prob_micro_batch_size": _per_gpu(f"{ROOT}.ref.log_prob_micro_batch_size"),
    f"{ROOT}.rollout.log_prob_micro_batch_size": _per_gpu(f"{ROOT}.rollout.log_prob_micro_batch_size"),
    f"{ROOT}.rollout.chat_scheduler": UpstreamKey(_AGENT_LOOPS),
    f"{ROOT}.rollout.multi_turn": UpstreamKey(_AGENT_LOOPS, (False,)),
    f"{ROOT}.rollout.swap_space": UpstreamKey(_SWAP, (0,)),
    f"{ROOT}.rollout.engine_kwargs.swap_space": UpstreamKey(_SWAP, (0,)),
    f"{ROOT}.rollout.engine_kwargs": UpstreamKey(
        f"what acts of vLLM's options are keys under {ROOT}.rollout; leave it out", ({},)
    ),
    f"{ROOT}.rollout.use_fire_sampling": UpstreamKey("there is no FIRE sampling here; leave it out", (False,)),
    f"{ROOT}.rollout.load_format": UpstreamKey(
        "the engine gets the policy's weights before it samples, however it was loaded; leave it out",
        ("dummy_dtensor", "dummy_hf", "dtensor", "hf", "dummy", "auto", "safetensors"),
    ),
    f"{ROOT}.rollout.disable_log_stats": UpstreamKey(
        "the rollout's speed is in the metrics perf/*; leave it out", (True,)
    ),
    f"{ROOT}.rollout.enable_chunked_prefill": UpstreamKey(
        f"vLLM always reads prompts in chunks, of up to {ROOT}.rollout.max_num_batched_tokens; leave it out", (True,)
    ),
    f"{ROOT}.rollout.do_sample": UpstreamKey(
        f"training needs samples; for greedy validation write {ROOT}.rollout.val_kwargs.do_sample=false", (True,)
    ),
    "critic.rollout_n": UpstreamKey(f"write {ROOT}.rollout.n, which counts for the critic, too"),
    "critic.model.tokenizer_path": UpstreamKey("the critic reads the policy's tokens; leave it out"),
    "critic.model.external_lib": UpstreamKey(_MODEL_CODE),
    "critic.model.override_config": UpstreamKey(_MODEL_CONFIG, ({},)),
    "critic.checkpoint": UpstreamKey(_CHECKPOINT, (["model", "optimizer", "extra"],)),
    "critic.loss_agg_mode": UpstreamKey("the critic's loss is the mean over tokens; leave it out", ("token-mean",)),
    "critic.ppo_micro_batch_size": _per_gpu("critic.ppo_micro_batch_size"),
    "critic.forward_micro_batch_size": _per_gpu("critic.forward_micro_batch_size"),
    "reward_model.enable": UpstreamKey(_REWARD_MODEL, (False,)),
    "reward_model.reward_kwargs": UpstreamKey("write what the function needs into its file; leave it out"),
    "reward_model.sandbox_fusion": UpstreamKey("programs are graded in a sandbox of this machine; leave it out"),
    "custom_reward_function.reward_kwargs": UpstreamKey("write what the function needs into its file; leave it out"),
    "trainer.log_val_generations": UpstreamKey(_SAMPLES, (0,)),
    "trainer.val_generations_to_log_to_wandb": UpstreamKey(_SAMPLES, (0,)),
    "trainer.validation_data_dir": UpstreamKey(_SAMPLES),
    "trainer.val_only": UpstreamKey("measure a model with test/inference.py and test/compute_metric.py", (False,)),
    "trainer.remove_previous_ckpt_in_save": UpstreamKey("write trainer.max_actor_ckpt_to_keep=1", (False,)),
    "trainer.del_local_ckpt_after_load": UpstreamKey("write trainer.max_actor_ckpt_to_keep=1", (False,)),
    "trainer.max_critic_ckpt_to_keep": UpstreamKey(
        "write trainer.max_actor_ckpt_to_keep: a checkpoint holds policy and critic"
    ),
    "trainer.ray_wait_register_center_timeout": UpstreamKey(
        "write ray_init.timeout_s=..., the seconds to wait for CPUs and GPUs of the cluster", (300,)
    ),
    "trainer.use_model_reward": UpstreamKey(_REWARD_MODEL, (False,)),
}
"""Each stands for itself and for what is below it."""

UPSTREAM_KEYS |= {
    f"reward_model.{name}": UpstreamKey(_REWARD_MODEL)
    for name in (
        *("strategy", "model", "micro_batch_size", "micro_batch_size_per_gpu", "max_length"),
        *("ulysses_sequence_parallel_size", "use_dynamic_bsz", "forward_max_token_len_per_gpu"),
    )
}
UPSTREAM_KEYS |= {
    f"{optim}.total_training_steps": UpstreamKey("write trainer.total_training_steps=...", (-1,)) for optim in OPTIMS
}
for _config in FSDP_CONFIGS:
    UPSTREAM_KEYS |= {
        f"{_config}.wrap_policy": UpstreamKey("every decoder layer is a unit of FSDP2; leave it out", (0, {})),
        f"{_config}.mixed_precision": UpstreamKey(f"write {_config}.compute_dtype=bfloat16 or float32"),
        f"{_config}.forward_prefetch": UpstreamKey("FSDP2 fetches ahead by itself; leave it out"),
    }

RENAMED = {f"{optim}.num_warmup_steps": f"{optim}.lr_warmup_steps" for optim in OPTIMS}
"""Keys that act under another name."""

SAME_VALUES: dict[str, tuple[Any, Any]] = {
    "trainer.resume_from_path": (False, None),
    **{f"{optim}.min_lr_ratio": (None, 0.0) for optim in OPTIMS},
    **{f"{optim}.lr_warmup_steps": (None, -1) for optim in OPTIMS},
}
"""Values that the public trainers write otherwise: theirs, and the same here."""


def upstream_key(key: str) -> UpstreamKey | None:
    """The entry of the key itself, or the nearest one above it."""
    while key:
        if key in UPSTREAM_KEYS:
            return UPSTREAM_KEYS[key]
        key = key.rpartition(".")[0]
    return None
