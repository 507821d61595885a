"""The training loop: GRPO and its relatives with a jointly trained score head, driven from one process."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import ray

from verl.models.identical_rows import DistinctRows
from verl.models.loading import load_tokenizer
from verl.protocol import DataProto
from verl.trainer.config.schema import AlgorithmConfig, PPOConfig
from verl.trainer.ppo.cluster import lost_head, start_ray
from verl.trainer.ppo.core_algos import KLController, compute_advantages, kl_penalty
from verl.trainer.ppo.data import PromptData
from verl.trainer.ppo.groups import (
    check_loadable,
    critic_workers,
    policy_workers,
    rollout_pool,
    rollout_workers,
    worker_pool,
)
from verl.trainer.ppo.head_start import HeadStart
from verl.trainer.ppo.metrics import (
    ValidationResult,
    masked_mean,
    steps_by_class,
    timed,
    train_metrics,
    validation_metrics,
)
from verl.trainer.ppo.one_step_off import OneStepOff
from verl.trainer.ppo.phases import PROMPT_KEYS, Phases
from verl.trainer.ppo.policy_columns import add_policy_columns
from verl.trainer.ppo.pooled_rollouts import Batches, PooledRollouts, Rollouts
from verl.trainer.ppo.profiled_steps import ProfiledSteps
from verl.trainer.ppo.progress import progress_bar
from verl.trainer.ppo.rollout_pool import RolloutPool
from verl.trainer.ppo.run_state import RunState
from verl.trainer.ppo.samples import Samples
from verl.trainer.ppo.separate_engines import SeparateEngines
from verl.trainer.ppo.utilisation import Utilisation
from verl.trainer.score_watch import UncountedClassWatch
from verl.utils.tracking import Tracking
from verl.workers.actor.joint_loss import JointLoss
from verl.workers.checkpointed_worker import CheckpointedWorkers
from verl.workers.critic import UPDATE_KEYS
from verl.workers.critic_worker import CriticWorkers
from verl.workers.fsdp_workers import PolicyWorkers
from verl.workers.reward_manager import REWARD_MANAGERS, PendingReward, Reward
from verl.workers.reward_manager.manager import Purpose
from verl.workers.rollout_worker import RolloutWorkers, SamplingWorkers
from xbai.engine.end_tokens import end_token_ids
from xbai.grading import Grade
from xbai.sprm import StepCounts, trajectory_scores

logger = logging.getLogger(__name__)


class RayPPOTrainer:
    """Data, workers and loop of one run.

    Building it reads the data and finds the checkpoint to go on from; `init_workers` starts Ray and the models.

    Args:
        config: from `check_config`, without `auto`.
        fetches: copy a remote checkpoint to go on from to this machine; otherwise it is only looked for.

    Raises:
        UserError: data that cannot be used, a tokenizer without the score head's step token, weights or a head that
            are damaged or of another model, or a checkpoint that is not there.
    """

    _workers: PolicyWorkers
    _samplers: SamplingWorkers
    """The same, or `_rollout_workers`."""
    _utilisation: Utilisation

    def __init__(self, config: PPOConfig, fetches: bool = True) -> None:
        self.config, self._rollout = config, config.actor_rollout_ref.rollout
        model = config.actor_rollout_ref.model
        tokenizer = load_tokenizer(model.path, model.trust_remote_code)
        check_loadable(config.actor_rollout_ref, tokenizer)
        self._end_token_ids = end_token_ids(model.path, tokenizer)
        self._data = PromptData(config, tokenizer)
        self._kl_controller = KLController(config.algorithm.kl_ctrl)
        pool = RolloutPool(config, self._data) if config.pools_rollouts else None
        self._run_state = RunState(config, self._data.train, self._data.loader, self._kl_controller, fetches, pool)
        self.step = self._run_state.step
        self._head_start = HeadStart(config.actor_rollout_ref, is_new_run=self._run_state.checkpoint is None)
        self._score_watch = UncountedClassWatch("actor_rollout_ref.score")
        self._reward_manager = REWARD_MANAGERS[config.reward_model.reward_manager](tokenizer, config)
        curriculum = self._curriculum = self._data.curriculum
        self._pooled = None if pool is None else PooledRollouts(config, pool, self._reward_manager, curriculum)
        self._samples = Samples(config.trainer, tokenizer)
        self._profiled_steps = ProfiledSteps.of(config.trainer)
        self._phases = Phases(config.trainer.balance_batch, self._rollout.n)
        loss = JointLoss(config.actor_rollout_ref)
        self._score_objective, self._update_keys = loss.score, loss.batch_keys(config.needs_old_log_probs)
        self._critic: CriticWorkers | None = None
        self._rollout_workers: RolloutWorkers | None = None
        self._engines: SeparateEngines | None = None
        self._one_step_off: OneStepOff | None = None
        # The groups that have started, by the name of their part of a checkpoint.
        self._groups: dict[str, CheckpointedWorkers] = {}

    @property
    def is_done(self) -> bool:
        """The checkpoint to resume from is already at the last step."""
        return self.step >= self._data.total_steps

    def end_without_training(self) -> None:
        """Say that nothing is left to do, and copy to the remote folder what an earlier run could not."""
        key = "total_epochs" if self.config.trainer.total_training_steps is None else "total_training_steps"
        value = getattr(self.config.trainer, key)
        done = f"step {self.step} of {self._data.total_steps} is done"
        logger.info("nothing left to do: %s; raise trainer.%s=%d to go on", done, key, value)
        self._run_state.catch_up()

    def init_workers(self) -> None:
        """Start Ray (or join the cluster) and one process a GPU, each with its part of the models."""
        # The driver's part, before the models are loaded, which may take minutes.
        self._run_state.try_saving({})
        start_ray(self.config)
        total_steps, has_critic = self._data.total_steps, self.config.has_critic
        pool = worker_pool(self.config, groups=2 if has_critic else 1)
        self._groups["actor"] = self._workers = policy_workers(self.config, pool, total_steps)
        if self.config.trainer.rollout_gpus:
            self._rollout_workers = rollout_workers(self.config, rollout_pool(self.config))
            self._engines = SeparateEngines(self._workers, self._rollout_workers)
        else:
            self._workers.init_model()
        self._samplers = self._rollout_workers or self._workers
        self._utilisation = Utilisation(self.config, self._workers.device_name()[0])
        if has_critic:
            self._groups["critic"] = self._critic = critic_workers(self.config, pool, total_steps)
            self._critic.init_model()
        if self.config.one_step_off and self._pooled is not None and self._engines is not None:
            self._one_step_off = OneStepOff(self._pooled, self._engines, self._groups.values(), total_steps)

    def fit(self) -> None:
        """Train from the resumed step to the last one, validating, logging and saving on the way."""
        trainer = self.config.trainer
        self._run_state.restore(self._groups)
        progress = progress_bar(self._data.total_steps, self.step, self._run_state.folder)
        names = trainer.project_name, trainer.experiment_name, trainer.logger, trainer.default_local_dir
        with Tracking(*names, asdict(self.config), self.step) as tracking, progress as report:
            if self.step == 0 and trainer.val_before_train and self._data.validation:
                tracking.log(self.validate(), step=0)
            batches = self._run_state.batches()
            while not self.is_done:
                self.step += 1
                self._run_state.check()
                with self._profiled_steps.traced(self.step, self._groups.values()):
                    metrics = self.train_step(batches)
                if self._data.validation and self._is_due(trainer.test_freq):
                    metrics |= self.validate()
                tracking.log(metrics, self.step)
                tracking.log_samples(self._samples.shown, self.step)
                # After logging: what a checkpoint stands for is never missing from the logs.
                if self._is_due(trainer.save_freq):
                    self._settle()
                    self._run_state.save(self.step, self._groups)
                report(self.step, metrics)
        self._run_state.finish()
        logger.info("finished %d steps; everything lies in %s", self.step, self._run_state.folder)

    def train_step(self, batches: Batches) -> dict[str, float]:
        """One step of the algorithm on the next prompts; returns its metrics."""
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        actor, reference_use = self.config.actor_rollout_ref.actor, self.config.reference_use
        baseline: PendingReward | None = None
        if self._pooled is not None:
            batch, grades = self._pooled_rollouts(self._pooled, batches, metrics)
            pending = self._launch_grading(batch, "training", grades)
        else:
            if self._curriculum is not None:
                metrics |= self._curriculum.advance(self.step)
            prompts = self._data.seeded(next(batches), self.step)
            needs_baseline = self.config.algorithm.adv_estimator == "remax"
            self._bring_weights(metrics)
            with timed("rollout", metrics):
                batch = self._generate(prompts, self._rollout.n, metrics, stay_awake=needs_baseline)
            pending = self._launch_grading(batch, "training")
            if needs_baseline:
                baseline = self._launch_baseline(prompts, metrics)
        starts_head = self._head_start.standardize(self._workers, batch, metrics)
        if self.config.needs_old_log_probs:
            full_kl = reference_use.full_kl_in_reward
            self._phases.compute(self._workers.compute_log_prob, batch, metrics, full_kl=full_kl)
        if reference_use.log_probs:
            self._phases.compute(self._workers.compute_ref_log_prob, batch, metrics)
        if self._critic is not None:
            self._phases.compute(self._critic.compute_values, batch, metrics)
        reward = pending.result()
        metrics |= reward.metrics
        metrics |= add_reward(batch, reward, self.config.algorithm, self._kl_controller)
        # Dynamic sampling has told it of these already, and of those that it left out.
        if self._curriculum is not None and not self.config.algorithm.filter_groups.enable:
            rows = batch.non_tensor_batch["row_index"]
            self._curriculum.observe(self.step, rows, reward.correct, reward.graded)
        if baseline is not None:
            metrics |= add_baseline(batch, baseline.result())
        if starts_head:
            self._head_start.set_bias(self._workers, batch)
        columns, uids = batch.batch, batch.non_tensor_batch["uid"]
        columns["advantages"], columns["returns"] = compute_advantages(columns, uids, self.config.algorithm)
        if (objective := self._score_objective) is not None and objective.compares:
            columns["rival_scores"] = objective.rivals(
                columns["old_step_logits"], columns["step_feature_mask"], columns["correct"], columns["graded"], uids
            )
        metrics |= add_policy_columns(columns, actor, self._end_token_ids)
        metrics |= train_metrics(batch, self._end_token_ids)
        self._samples.keep(self.step, batch, reward)
        if self._critic is not None:
            section = self.config.critic
            self._phases.update(self._critic.update_critic, batch, UPDATE_KEYS, section, self.step, metrics)
        if self.step > self.config.trainer.critic_warmup:
            self._phases.update(self._workers.update_actor, batch, self._update_keys, actor, self.step, metrics)
            if objective is not None and objective.judges_steps:
                counted = StepCounts(metrics["score/counted_right"], metrics["score/counted_wrong"])
                self._score_watch.observe(counted, steps_by_class(batch))
        tokens, seconds = float(batch.batch["attention_mask"].sum()), time.perf_counter() - start
        metrics |= {"timing_s/step": seconds, "perf/tokens_per_s": tokens / seconds}
        return metrics | self._utilisation.metrics(batch, metrics)

    def validate(self) -> dict[str, float]:
        """Sample the validation set as `rollout.val_kwargs` say, with the same seeds every time."""
        n = self._rollout.val_kwargs.n
        timing: dict[str, float] = {}
        self._settle()
        with timed("validate", timing):
            self._bring_weights({})
            batches = self._data.validation_batches(self.config.data.val_batch_size)
            results = [self._validate_batch(prompts, n) for prompts in batches]
        return validation_metrics(results, n) | timing

    def how_to_go_on(self) -> str:
        """What to start after a run that ended early, in words."""
        head = lost_head()
        restart = f"the Ray head at {head} does not answer either: start the cluster anew; " if head else ""
        return restart + self._run_state.how_to_go_on()

    def close(self) -> None:
        """End graders, workers and this run's part in Ray; a checkpoint being written gets a little time."""
        self._reward_manager.close()
        self._run_state.close()
        for group in filter(None, (*self._groups.values(), self._rollout_workers)):
            group.shutdown()
        if self._one_step_off is not None:
            self._one_step_off.close()
        ray.shutdown()

    def _pooled_rollouts(self, pooled: PooledRollouts, batches: Batches, metrics: dict[str, float]) -> Rollouts:
        if self._one_step_off is not None:
            return self._one_step_off.next(batches, self.step, metrics)
        self._bring_weights(metrics)
        return pooled.next(batches, self._samplers, self.step, metrics)

    def _bring_weights(self, metrics: dict[str, float]) -> None:
        """To engines in processes of their own; others fetch the weights themselves."""
        if self._engines is not None:
            self._engines.update(metrics)

    def _settle(self) -> None:
        """Have no rollouts under way."""
        if self._one_step_off is not None:
            self._one_step_off.settle()

    def _generate(self, prompts: DataProto, n: int, metrics: dict[str, float], **meta_info: Any) -> DataProto:
        """Sample `n` responses a prompt; the rows of one prompt lie next to each other. `kinds` [B] tells which are the
        same (see `DistinctRows`)."""
        request = prompts.select(PROMPT_KEYS, ["seed"])
        request.meta_info |= {"n": n, **meta_info}
        responses = self._samplers.generate_sequences(request)
        metrics |= responses.meta_info.pop("metrics")
        responses.batch["kinds"] = DistinctRows.of(responses.batch).kinds
        return DataProto(non_tensor_batch=prompts.non_tensor_batch).repeat(n).union(DataProto(responses.batch))

    def _launch_grading(self, batch: DataProto, purpose: Purpose, grades: list[Grade] | None = None) -> PendingReward:
        pending = self._reward_manager.launch(batch, purpose, grades)
        if not self.config.reward_model.launch_reward_fn_async:
            pending.wait()
        return pending

    def _launch_baseline(self, prompts: DataProto, metrics: dict[str, float]) -> PendingReward:
        """Sample each prompt's greedy response, whose reward is ReMax's baseline, and start grading it."""
        with timed("generate_baseline", metrics):
            greedy = self._generate(prompts, 1, {}, do_sample=False)
        return self._launch_grading(greedy, "baselines")

    def _validate_batch(self, prompts: DataProto, n: int) -> ValidationResult:
        batch = self._generate(prompts, n, {}, validate=True)
        pending = self._reward_manager.launch(batch, "validation")
        scores = None
        if self.config.actor_rollout_ref.use_score:
            self._phases.compute(self._workers.compute_log_prob, batch, {})
            scores = trajectory_scores(batch.batch["old_step_logits"], batch.batch["step_feature_mask"])
        reward = pending.result()
        sources = batch.non_tensor_batch[self.config.data.reward_fn_key]
        return ValidationResult(sources, reward.correct, reward.graded, batch.batch["response_mask"].sum(-1), scores)

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.is_done)


def add_reward(
    batch: DataProto, reward: Reward, algorithm: AlgorithmConfig, kl_controller: KLController
) -> dict[str, float]:
    """Add scores, outcome and `token_level_rewards`: the scores, less the KL penalty with `use_kl_in_reward` (by
    `ref_kl`, or by `old_log_probs` and `ref_log_prob`), whose coefficient `kl_controller` has."""
    columns, mask, scores = batch.batch, batch.batch["response_mask"], reward.reward_tensor
    columns["correct"], columns["graded"] = reward.correct, reward.graded
    columns["token_level_scores"] = columns["token_level_rewards"] = scores
    if not algorithm.use_kl_in_reward:
        return {}
    if algorithm.kl_penalty == "full":
        kl = columns["ref_kl"]
    else:
        kl = kl_penalty(columns["old_log_probs"], columns["ref_log_prob"], algorithm.kl_penalty) * mask
    metrics = {"reward/kl": masked_mean(kl, mask), "reward/kl_coef": kl_controller.value}
    columns["token_level_rewards"] = scores - kl_controller.value * kl
    kl_controller.update(metrics["reward/kl"], n_steps=len(batch))
    return metrics


def add_baseline(batch: DataProto, baseline: Reward) -> dict[str, float]:
    """Give each response its prompt's greedy reward; one that could not be graded is no baseline, nor is it zero: it
    masks the prompt's responses, which lie next to each other."""
    columns, rewards, graded = batch.batch, baseline.reward_tensor.sum(-1), baseline.graded
    n = len(batch) // len(rewards)
    columns["baselines"] = rewards.repeat_interleave(n)
    columns["graded"] = columns["graded"] & graded.repeat_interleave(n)
    return {"reward/baseline": masked_mean(rewards, graded), "reward/ungraded_baselines": float((~graded).sum())}
