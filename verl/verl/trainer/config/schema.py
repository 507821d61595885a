"""The whole configuration of the RL trainer, typed: ppo_trainer.yaml has the same keys, and all defaults."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from verl.trainer.config.fields import (
    ON_GPU,
    WITH_CRITIC,
    WITH_LORA,
    WITH_VLLM,
    WITHOUT_LORA,
    ActsWith,
    Coefficient,
    Dtype,
    Field,
    Files,
    Flag,
    Language,
    NullMeans,
    Number,
    Positive,
    PositiveNumber,
    ResumeMode,
    Section,
    ServedDtype,
    Share,
    Switch,
    Text,
    Whole,
)
from verl.trainer.ppo.off_policy import ImportanceSampling
from xbai.sprm import ScoreObjective

YAML = "ppo_trainer"
ROOT = "actor_rollout_ref"
ACTOR = f"{ROOT}.actor"

PolicyLossName = Literal["ppo", "gspo", "cispo", "dr_grpo"]
LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
OWN_AGGREGATION: dict[PolicyLossName, LossAggMode] = {
    "ppo": "token-mean",
    "gspo": "seq-mean-token-mean",
    "cispo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
"""How each policy loss is aggregated where it was published (PPO's: in DAPO)."""
KLPenalty = Literal["kl", "abs", "mse", "low_var_kl", "k1", "k2", "k3", "full"]
KLLossType = KLPenalty | Literal["kl+", "abs+", "mse+", "low_var_kl+", "k1+", "k2+", "k3+"]
AdamName = Literal["AdamW", "AdamW8bit", "Adam8bit"]
Beta = Annotated[Number, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """What all have: an optimiser with its schedule; the learning rate of 0 leaves the weights as they are."""

    name: AdamName | Literal["Muon"]
    lr: Coefficient
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2, description="must be two numbers from 0 to below 1")]
    weight_decay: Coefficient
    lr_warmup_steps: Whole
    lr_warmup_steps_ratio: Share
    min_lr_ratio: Share
    num_cycles: Coefficient
    warmup_style: Literal["constant", "cosine"]


class AdamConfig(OptimConfig):
    """Of the critic, and of a score head that is trained with its backbone."""

    name: AdamName


class PolicyOptim(AdamConfig):
    """`actor_rollout_ref.actor.optim`."""

    no_load_optim: Flag


class SFTOptim(OptimConfig):
    """Of supervised fine-tuning."""

    adamw_lr: PositiveNumber | None
    grad_clip: PositiveNumber


class Sharding(Section):
    """The `fsdp_config` sections: how a model is sharded, and where it waits. What all models have."""

    offload_policy: Annotated[Flag, ON_GPU]
    reshard_after_forward: Flag
    fsdp_size: Whole


class FrozenPlacement(Sharding):
    """Of a model that is not trained: the reference policy."""

    param_offload: Annotated[Flag, ON_GPU]
    compute_dtype: Dtype | None


class TrainedPlacement(FrozenPlacement):
    """Of policy and critic."""

    optimizer_offload: Annotated[Flag, ON_GPU]
    model_dtype: Dtype | None


class ScoreLosses(Section):
    """By what a score head learns, with its backbone or alone."""

    loss: Literal["step_bce", "outcome_bce", "pairwise", "both"]
    aggregation: Literal["geometric", "mean_logit", "product", "soft_min"]
    agreement_weighting: Flag
    class_balance: Flag

    @property
    def objective(self) -> ScoreObjective:
        """The losses that are added up."""
        return ScoreObjective(self.loss, self.aggregation, self.agreement_weighting, self.class_balance)


class Curriculum(Section):
    """`data.curriculum`: prompts by their pass rates."""

    enable: Flag
    half_life: Annotated[
        PositiveNumber, ActsWith("data.curriculum.enable", (True,), "acts only with data.curriculum.enable=true")
    ]


class DataConfig(Section):
    """`data`: the prompts, and how long they and their responses may be."""

    train_files: Files
    val_files: Files | None
    prompt_key: Text
    reward_fn_key: Text
    train_batch_size: Positive
    val_batch_size: Positive | None
    max_prompt_length: Positive
    max_response_length: Positive
    filter_overlong_prompts: Flag
    truncation: Literal["error", "left", "right"]
    return_raw_chat: Flag
    shuffle: Flag
    dataloader_num_workers: Annotated[Whole, Field(ge=0, description="must not be below 0")]
    curriculum: Curriculum

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.max_prompt_length + self.max_response_length


class ModelConfig(Section):
    """The folder that policy and reference begin with, and the kernels that they run."""

    path: Text
    trust_remote_code: Flag
    enable_gradient_checkpointing: Switch
    use_remove_padding: Flag
    use_liger: Switch
    head_dtype: Literal["float32", "model"] | None
    use_fused_kernels: Switch
    use_torch_compile: Flag
    lora_rank: Annotated[Whole, Field(ge=0)]
    lora_alpha: Annotated[Positive, WITH_LORA]
    target_modules: Annotated[Files, WITH_LORA]


class ScoreConfig(ScoreLosses):
    """The score head that is trained with the policy."""

    model_path: Text | None
    channel: Positive | None
    lang: Language | None
    loss_coef: Coefficient
    backbone_grad_scale: Coefficient
    standardized_start: Flag
    standardized_updates: Flag
    optim: AdamConfig


class SharedRows(Section):
    """Processes that share the tokens of the same rows."""

    ulysses_sequence_parallel_size: Positive


class UpdateConfig(SharedRows):
    """The updates of a model that is trained."""

    ppo_mini_batch_size: Positive
    ppo_micro_batch_size_per_gpu: Positive
    use_dynamic_bsz: Flag
    ppo_max_token_len_per_gpu: Whole
    ppo_epochs: Positive
    shuffle: Flag
    grad_clip: PositiveNumber
    max_nonfinite_updates: Positive


def _acts_with(key: str, *values: str) -> ActsWith:
    """Of a key that needs another one of the actor."""
    return ActsWith(f"{ACTOR}.{key}", values, f"acts only with {ACTOR}.{key}={' or '.join(values)}")


class ActorConfig(UpdateConfig):
    """The policy's loss, its batches and its placement."""

    strategy: Literal["fsdp", "fsdp2"]
    ppo_micro_batch_size: Positive | None
    loss: PolicyLossName
    clip_ratio: PositiveNumber
    clip_ratio_low: PositiveNumber | None
    clip_ratio_high: PositiveNumber | None
    clip_ratio_c: Annotated[Number, Field(gt=1), _acts_with("loss", "ppo", "dr_grpo")]
    loss_agg_mode: LossAggMode | None
    mask_truncated_responses: Flag
    rollout_is: Literal["token", "sequence"] | None
    rollout_is_mode: Annotated[Literal["truncate", "mask"], _acts_with("rollout_is", "token", "sequence")]
    rollout_is_threshold: Annotated[PositiveNumber, _acts_with("rollout_is", "token", "sequence")]
    rollout_is_threshold_lower: Annotated[PositiveNumber | None, _acts_with("rollout_is_mode", "mask")]
    rollout_rs_geo_threshold: Annotated[Number, Field(gt=1)] | None
    tis_imp_ratio_cap: PositiveNumber | None
    entropy_coeff: Number
    use_kl_loss: Flag
    kl_loss_coef: Coefficient
    kl_loss_type: KLLossType
    optim: PolicyOptim
    fsdp_config: TrainedPlacement

    @property
    def aggregation(self) -> LossAggMode:
        """By what the losses of tokens are added up."""
        return self.loss_agg_mode or OWN_AGGREGATION[self.loss]

    @property
    def importance_sampling(self) -> ImportanceSampling | None:
        """How samples of the engine are weighed; `tis_imp_ratio_cap` is short for truncated weights of tokens."""
        if self.tis_imp_ratio_cap is not None:
            return ImportanceSampling("token", "truncate", self.tis_imp_ratio_cap)
        if self.rollout_is is None:
            return None
        bounds = self.rollout_is_threshold, self.rollout_is_threshold_lower
        return ImportanceSampling(self.rollout_is, self.rollout_is_mode, *bounds)

    @property
    def corrects_rollout(self) -> bool:
        """The engine's log-probs act in the loss."""
        return self.importance_sampling is not None or self.rollout_rs_geo_threshold is not None

    @property
    def leaves_responses_out(self) -> bool:
        """Some responses may take no part in the policy loss."""
        return self.mask_truncated_responses or self.rollout_rs_geo_threshold is not None


class RefConfig(SharedRows):
    """The frozen reference policy."""

    log_prob_micro_batch_size_per_gpu: Positive
    log_prob_use_dynamic_bsz: Flag
    log_prob_max_token_len_per_gpu: Whole
    fsdp_config: Annotated[FrozenPlacement, WITHOUT_LORA]


class Sampling(Section):
    """How responses are drawn."""

    n: Positive
    temperature: Number
    top_k: Whole
    top_p: Number


class ValidationSampling(Sampling):
    """`val_kwargs`."""

    do_sample: Flag


_WITH_PARTIAL = ActsWith(
    f"{ROOT}.rollout.mode", ("partial",), "cannot act with rollout.mode={}, only with partial; leave it at its default"
)
_WITH_STALENESS = ActsWith(
    "may_be_stale",
    (True,),
    "acts only with rollout.mode=partial or trainer.rollout_gpus above 0; leave it at its default",
)
_COLOCATED = ActsWith(
    "trainer.rollout_gpus",
    (0,),
    "cannot act with trainer.rollout_gpus={}, with which engines never sleep; leave it at its default",
)


class RolloutConfig(Sampling):
    """The engine, its memory, and the batches of the log-probs that the policy computes of its responses."""

    name: Literal["vllm", "hf"]
    mode: Literal["sync", "partial", "async"]
    over_sampling: Annotated[Coefficient, _WITH_PARTIAL]
    max_staleness: Annotated[Whole, Field(ge=0, description="must not be below 0"), _WITH_STALENESS]
    prompt_length: Positive
    response_length: Positive
    temperature: PositiveNumber
    tensor_model_parallel_size: Annotated[Positive, WITH_VLLM]
    gpu_memory_utilization: Annotated[Number, Field(gt=0, le=1), ON_GPU, WITH_VLLM]
    max_num_batched_tokens: Annotated[Positive, WITH_VLLM]
    max_num_seqs: Positive
    max_model_len: Positive | None
    dtype: ServedDtype
    enforce_eager: Annotated[Flag | None, WITH_VLLM]
    free_cache_engine: Annotated[Flag, ON_GPU, WITH_VLLM, _COLOCATED]
    sleep_level: Annotated[Literal[1, 2], ON_GPU, WITH_VLLM, _COLOCATED]
    check_weight_sync: Flag
    ignore_eos: Flag
    log_prob_micro_batch_size_per_gpu: Positive
    log_prob_use_dynamic_bsz: Flag
    log_prob_max_token_len_per_gpu: Whole
    val_kwargs: ValidationSampling

    @property
    def carries(self) -> bool:
        """Whether unfinished responses go on in the next step."""
        return self.mode == "partial" and self.max_staleness > 0


class ActorRolloutRefConfig(Section):
    """`actor_rollout_ref`: all that the processes of the policy hold."""

    nccl_timeout: Positive
    model: ModelConfig
    use_score: Flag
    score: ScoreConfig
    actor: ActorConfig
    ref: RefConfig
    rollout: RolloutConfig


class CriticModel(Section):
    """The folder whose backbone gets a value head."""

    path: Annotated[Text, NullMeans(f"{ROOT}.model.path")]
    enable_gradient_checkpointing: Annotated[Switch, NullMeans(f"{ROOT}.model.enable_gradient_checkpointing")]
    trust_remote_code: Annotated[Flag, NullMeans(f"{ROOT}.model.trust_remote_code")]
    use_remove_padding: Annotated[Flag, NullMeans(f"{ROOT}.model.use_remove_padding")]
    fsdp_config: TrainedPlacement


class CriticConfig(UpdateConfig):
    """The critic of `adv_estimator=gae`; a null in it stands for what the actor has there."""

    nccl_timeout: Annotated[Positive, NullMeans(f"{ROOT}.nccl_timeout")]
    strategy: Literal["fsdp", "fsdp2"]
    model: CriticModel
    optim: AdamConfig
    ppo_mini_batch_size: Annotated[Positive, NullMeans(f"{ACTOR}.ppo_mini_batch_size")]
    ppo_micro_batch_size_per_gpu: Annotated[Positive, NullMeans(f"{ACTOR}.ppo_micro_batch_size_per_gpu")]
    forward_micro_batch_size_per_gpu: Annotated[Positive, NullMeans("critic.ppo_micro_batch_size_per_gpu")]
    use_dynamic_bsz: Annotated[Flag, NullMeans(f"{ACTOR}.use_dynamic_bsz")]
    ppo_max_token_len_per_gpu: Annotated[Positive, NullMeans(f"{ACTOR}.ppo_max_token_len_per_gpu")]
    forward_max_token_len_per_gpu: Annotated[Positive, NullMeans("critic.ppo_max_token_len_per_gpu")]
    ulysses_sequence_parallel_size: Annotated[Positive, NullMeans(f"{ACTOR}.ulysses_sequence_parallel_size")]
    ppo_epochs: Annotated[Positive, NullMeans(f"{ACTOR}.ppo_epochs")]
    shuffle: Annotated[Flag, NullMeans(f"{ACTOR}.shuffle")]
    max_nonfinite_updates: Annotated[Positive, NullMeans(f"{ACTOR}.max_nonfinite_updates")]
    cliprange_value: PositiveNumber


def _of_managers(*names: str) -> ActsWith:
    only = f"only with {', '.join(names)}; leave it at its default"
    return ActsWith("reward_model.reward_manager", names, f"cannot act with reward_model.reward_manager={{}}, {only}")


class OverlongBuffer(Section):
    """DAPO's penalty of responses that come close to the limit."""

    len: Annotated[Whole, Field(ge=0)]
    penalty_factor: Coefficient


class RewardModelConfig(Section):
    """`reward_model`: the processes that grade."""

    reward_manager: Literal["naive", "prime", "dapo", "batch"]
    launch_reward_fn_async: Flag
    num_workers: Annotated[Positive | None, _of_managers("prime", "dapo")]
    timeout_s: Annotated[Positive, _of_managers("naive", "prime", "dapo")]
    batch_timeout_s: Annotated[Positive, _of_managers("batch")]
    memory_gib: PositiveNumber
    max_ungraded_batches: Positive | None
    overlong_buffer: Annotated[OverlongBuffer, _of_managers("dapo")]


class CustomRewardFunction(Section):
    """A grader of one's own."""

    path: Text | None
    name: Text


class KLControl(Section):
    """The coefficient of the KL penalty."""

    type: Literal["fixed", "adaptive"]
    kl_coef: Coefficient
    horizon: Positive
    target_kl: PositiveNumber


_WITH_FILTER = ActsWith("algorithm.filter_groups.enable", (True,), "acts only with algorithm.filter_groups.enable=true")


class FilterGroups(Section):
    """DAPO's dynamic sampling."""

    enable: Flag
    metric: Annotated[Literal["acc", "reward"], _WITH_FILTER]
    max_num_gen_batches: Annotated[Whole, Field(ge=0, description="must not be below 0"), _WITH_FILTER]


class AlgorithmConfig(Section):
    """How rewards become advantages, and the KL penalty in the reward."""

    adv_estimator: Literal["grpo", "gae", "rloo", "reinforce_plus_plus", "remax"]
    gamma: Share
    lam: Share
    norm_adv_by_std_in_grpo: Flag
    use_kl_in_reward: Flag
    kl_penalty: KLPenalty
    kl_ctrl: KLControl
    filter_groups: FilterGroups


class TrainerConfig(Section):
    """Where a run happens, how long, and what it leaves."""

    device: Literal["auto", "cuda", "cpu"]
    nnodes: Positive
    n_gpus_per_node: Positive
    rollout_gpus: Annotated[Whole, Field(ge=0, description="must not be below 0")]
    device_tflops: PositiveNumber | None
    seed: Whole
    total_epochs: Positive
    total_training_steps: Positive | None
    project_name: Text
    experiment_name: Text
    logger: list[Text]
    log_samples_freq: Whole
    log_samples: Positive
    profile_steps: Annotated[list[Positive], Field(description="must be a list of steps, which count from 1")]
    save_freq: Whole
    test_freq: Whole
    val_before_train: Flag
    resume_mode: ResumeMode
    resume_from_path: Text | None
    resume_with_new_data: Flag
    default_local_dir: Text
    default_hdfs_dir: Text | None
    max_actor_ckpt_to_keep: Positive | None
    async_save: Flag
    critic_warmup: Annotated[Whole, Field(ge=0), WITH_CRITIC]
    balance_batch: Flag
    rollout_data_dir: Text | None
    length_penalty: Flag
    length_penalty_coeff: Number

    @property
    def processes(self) -> int:
        """Of the whole job, that train."""
        return self.nnodes * self.n_gpus_per_node

    @property
    def rollout_gpus_per_node(self) -> int:
        """Of those with rollout engines alone."""
        return self.rollout_gpus // self.nnodes


class RayInit(Section):
    """How Ray starts."""

    num_cpus: Positive | None
    timeout_s: Positive


class ReferenceUse(NamedTuple):
    """What the reference policy is needed for; all false: there is none."""

    log_probs: bool
    """Its log-probs of the sampled tokens, a phase of its own."""
    full_kl_in_loss: bool
    """Its hidden states beside the policy's in the update, for `actor.kl_loss_type=full`."""
    full_kl_in_reward: bool
    """The same where the policy's log-probs are computed, for `algorithm.kl_penalty=full`."""


class PPOConfig(Section):
    """Frozen: what a run decides for itself is another one, made by `with_values`."""

    data: DataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    critic: Annotated[CriticConfig, WITH_CRITIC]
    reward_model: RewardModelConfig
    custom_reward_function: CustomRewardFunction
    algorithm: AlgorithmConfig
    trainer: TrainerConfig
    ray_init: RayInit

    @property
    def has_critic(self) -> bool:
        """GAE needs values."""
        return self.algorithm.adv_estimator == "gae"

    @property
    def may_be_stale(self) -> bool:
        """Whether `rollout.max_staleness` decides if steps train on rollouts of earlier policies."""
        return self.actor_rollout_ref.rollout.mode == "partial" or self.trainer.rollout_gpus > 0

    @property
    def one_step_off(self) -> bool:
        """Whether a step's rollouts are sampled while the step before it trains."""
        return self.trainer.rollout_gpus > 0 and self.actor_rollout_ref.rollout.max_staleness > 0

    @property
    def pools_rollouts(self) -> bool:
        """Whether a step's rollouts come out of a pool, not of one batch of prompts."""
        return self.actor_rollout_ref.rollout.carries or self.algorithm.filter_groups.enable or self.one_step_off

    @property
    def reference_use(self) -> ReferenceUse:
        """By the KL divergences that are asked for."""
        actor, algorithm = self.actor_rollout_ref.actor, self.algorithm
        full_in_loss, full_in_reward = actor.kl_loss_type == "full", algorithm.kl_penalty == "full"
        return ReferenceUse(
            (actor.use_kl_loss and not full_in_loss) or (algorithm.use_kl_in_reward and not full_in_reward),
            actor.use_kl_loss and full_in_loss,
            algorithm.use_kl_in_reward and full_in_reward,
        )

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the policy's log-probs of a rollout batch are computed before the update.

        Where a rollout batch is one optimiser step, the update's own forward pass has them, and ratios are 1 exactly. A
        pass of their own is needed all the same for a score head, whose step logits before the update decide which
        steps count and how much (see `joint_loss`), for what corrects the rollout, and for a KL in the reward.
        """
        root, actor = self.actor_rollout_ref, self.actor_rollout_ref.actor
        one_update = self.data.train_batch_size == actor.ppo_mini_batch_size and actor.ppo_epochs == 1
        used_before = root.use_score or actor.corrects_rollout or self.algorithm.use_kl_in_reward
        return used_before or not one_update
