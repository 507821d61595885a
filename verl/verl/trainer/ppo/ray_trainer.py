"""The training loop: GRPO and its relatives with a jointly trained score head, driven from one process."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from verl.protocol import DataProto, object_array
from verl.single_controller import GroupMethod, RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.critic_config import critic_config
from verl.trainer.old_log_prob_use import needs_old_log_probs
from verl.trainer.ppo.cluster import check_shared_folder, lost_head, start_ray, worker_env
from verl.trainer.ppo.core_algos import AdvantageInputs, compute_advantages, get_kl_controller, kl_penalty
from verl.trainer.ppo.head_start import HeadStart
from verl.trainer.ppo.metrics import ValidationResult, masked_mean, steps_by_class, train_metrics, validation_metrics
from verl.trainer.ppo.reward import check_gradable
from verl.trainer.ppo.run_state import RunState
from verl.trainer.ppo.utilisation import Utilisation
from verl.trainer.reference_use import ReferenceUse
from verl.trainer.score_watch import Classes, UncountedClassWatch
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn, create_dataloader
from verl.utils.identical_rows import DistinctRows, sum_over_kinds
from verl.utils.model import has_score_head, load_tokenizer
from verl.utils.seqlen_balancing import rows_by_rank
from verl.utils.tracking import Tracking
from verl.workers.actor.joint_loss import LossConfig
from verl.workers.critic.dp_critic import UPDATE_KEYS
from verl.workers.critic_worker import CriticWorker
from verl.workers.fsdp_workers import ActorRolloutRefWorker, group_sizes
from verl.workers.reward_manager import REWARD_MANAGERS, PendingReward, Reward
from xbai.engine.detokenizer import Detokenizer
from xbai.engine.end_tokens import end_token_ids
from xbai.engine.files import read_config
from xbai.engine.weight_files import check_weights
from xbai.errors import UserError
from xbai.files import atomic_write
from xbai.sprm import load_score_head, load_sprm_config, trajectory_scores

logger = logging.getLogger(__name__)

PROMPT_KEYS = ("input_ids", "attention_mask", "position_ids")
MODEL_INPUT_KEYS = (*PROMPT_KEYS, "prompts", "responses", "response_mask")


class RayPPOTrainer:
    """Data, workers and loop of one run.

    Building it reads the data and finds the checkpoint to go on from; `init_workers` starts Ray and the models.

    Args:
        config: composed and checked by `check_config`.
        fetches: copy a remote checkpoint to go on from to this machine; otherwise it is only looked for.

    Raises:
        UserError: data that cannot be used, a tokenizer without the score head's step token, weights or a head that
            are damaged or of another model, or a checkpoint that is not there.
    """

    def __init__(self, config: DictConfig, fetches: bool = True) -> None:
        self.config = config
        self._rollout, self._world_size = config.actor_rollout_ref.rollout, _world_size(config)
        model = config.actor_rollout_ref.model
        self.tokenizer = load_tokenizer(model.path, model.trust_remote_code)
        # What no worker could load is refused here.
        check_weights(model.path, model_config := read_config(model.path, model.trust_remote_code))
        self._end_token_ids = end_token_ids(model.path, self.tokenizer)
        if config.actor_rollout_ref.use_score:
            score = config.actor_rollout_ref.score
            sprm_config = load_sprm_config(model.path, self.tokenizer, score.lang)
            if has_score_head(model.path, score.model_path):
                load_score_head(score.model_path or model.path, model_config.hidden_size, sprm_config)
        self._load_data()
        self._estimator = config.algorithm.adv_estimator
        self._critic_config = critic_config(config) if self._estimator == "gae" else None
        self._tis_imp_ratio_cap: float | None = config.actor_rollout_ref.actor.tis_imp_ratio_cap
        self._reference_use = ReferenceUse.from_config(config)
        self._kl_controller = get_kl_controller(config.algorithm.kl_ctrl)
        self._run_state = RunState(config, self._train_data, self._loader, self._kl_controller, fetches)
        self.step = self._run_state.step
        self._head_start = HeadStart(config.actor_rollout_ref, is_new_run=self._run_state.checkpoint is None)
        self._score_watch = UncountedClassWatch("actor_rollout_ref.score")
        self._reward_manager = REWARD_MANAGERS[config.reward_model.reward_manager](self.tokenizer, config)
        self._needs_old_log_probs = needs_old_log_probs(config)
        self._loss = LossConfig.from_config(config.actor_rollout_ref)
        self._update_keys = self._loss.batch_keys(self._needs_old_log_probs)
        self._workers: RayWorkerGroup | None = None
        self._critic: RayWorkerGroup | None = None
        self._utilisation: Utilisation | None = None

    def _load_data(self) -> None:
        data, trainer = self.config.data, self.config.trainer
        self._train_data = RLHFDataset(data.train_files, self.tokenizer, data)
        self._val_data = RLHFDataset(data.val_files, self.tokenizer, data) if data.val_files else None
        for dataset in filter(None, (self._train_data, self._val_data)):
            columns = dataset.values(data.reward_fn_key), dataset.values("reward_model")
            check_gradable(zip(dataset.places(), *columns), self.config)
        self._loader = create_dataloader(
            self._train_data,
            data.train_batch_size,
            shuffle=data.shuffle,
            seed=trainer.seed,
            num_workers=data.dataloader_num_workers,
        )
        self.total_steps = trainer.total_training_steps or trainer.total_epochs * len(self._loader)

    @property
    def is_done(self) -> bool:
        """The checkpoint to resume from is already at the last step."""
        return self.step >= self.total_steps

    def end_without_training(self) -> None:
        """Say that nothing is left to do, and copy to the remote folder what an earlier run could not."""
        key = "total_epochs" if self.config.trainer.total_training_steps is None else "total_training_steps"
        value = self.config.trainer[key]
        done = f"step {self.step} of {self.total_steps} is done"
        logger.info("nothing left to do: %s; raise trainer.%s=%d to go on", done, key, value)
        self._run_state.catch_up()

    def init_workers(self) -> None:
        """Start Ray (or join the cluster) and one process a GPU, each with its part of the models."""
        trainer = self.config.trainer
        on_gpu = trainer.device == "cuda"
        # The driver's part, before the models are loaded, which may take minutes.
        self._run_state.try_saving({})
        start_ray(self.config)
        role = "actor_rollout_ref" if any(self._reference_use) else "actor_rollout"
        init = RayClassWithInitArgs(ActorRolloutRefWorker, self._worker_config(), role, trainer.seed)
        processes, groups = [trainer.n_gpus_per_node] * trainer.nnodes, 1 if self._critic_config is None else 2
        pool = RayResourcePool(
            processes, use_gpu=on_gpu, max_colocate_count=groups, timeout_s=self.config.ray_init.timeout_s
        )
        if trainer.nnodes > 1:
            check_shared_folder(trainer.default_local_dir, pool)
        logger.info("starting %d worker processes on %s", self._world_size, trainer.device)
        policy = self.config.actor_rollout_ref
        self._workers = RayWorkerGroup(
            pool, init, role, worker_env(on_gpu), group_sizes(policy), nccl_timeout_s=policy.nccl_timeout
        )
        self._workers.init_model()
        self._utilisation = Utilisation.from_config(self.config, self._workers.device_name()[0])
        if self._critic_config is not None:
            self._critic_config.optim.total_training_steps = self.total_steps
            init = RayClassWithInitArgs(CriticWorker, self._critic_config, trainer.seed)
            sizes = {"train": self._critic_config.ulysses_sequence_parallel_size}
            timeout_s = self._critic_config.nccl_timeout
            self._critic = RayWorkerGroup(pool, init, "critic", worker_env(on_gpu), sizes, nccl_timeout_s=timeout_s)
            self._critic.init_model()

    @property
    def _groups(self) -> dict[str, RayWorkerGroup]:
        """The worker groups that there are, by the name of their part of a checkpoint."""
        groups = {"actor": self._workers, "critic": self._critic}
        return {name: group for name, group in groups.items() if group is not None}

    def _worker_config(self) -> DictConfig:
        config = OmegaConf.create(OmegaConf.to_container(self.config.actor_rollout_ref, resolve=True))
        with open_dict(config):
            updates = max(1, self.total_steps - self.config.trainer.critic_warmup)
            config.actor.optim.total_training_steps = updates
            config.score.optim.total_training_steps = updates
        return config

    def fit(self) -> None:
        """Train from the resumed step to the last one, validating, logging and saving on the way."""
        trainer = self.config.trainer
        self._run_state.restore(self._groups)
        with self._tracking() as tracking, self._progress() as report:
            if self.step == 0 and trainer.val_before_train and self._val_data:
                tracking.log(self.validate(), step=0)
            for prompts in self._prompt_batches():
                self._run_state.check()
                metrics = self.train_step(prompts)
                if self._val_data and self._is_due(trainer.test_freq):
                    metrics |= self.validate()
                tracking.log(metrics, self.step)
                # After logging: what a checkpoint stands for is never missing from the logs.
                if self._is_due(trainer.save_freq):
                    self._run_state.save(self.step, self._groups)
                report(metrics)
        self._run_state.finish()
        logger.info("finished %d steps; everything lies in %s", self.step, self._run_state.folder)

    def train_step(self, prompts: DataProto) -> dict[str, float]:
        """One step of the algorithm on a batch of prompts; returns its metrics."""
        start, metrics = time.perf_counter(), {}
        needs_baseline = self._estimator == "remax"
        with _timed("rollout", metrics):
            batch = self._generate(prompts, self._rollout.n, metrics, stay_awake=needs_baseline)
        pending = self._launch_grading(batch)
        baseline = self._launch_baseline(prompts, metrics) if needs_baseline else None
        starts_head = self._head_start.is_due and self._head_start.standardize(
            self._workers, DataProto(batch.batch.select(*MODEL_INPUT_KEYS)), metrics
        )
        if self._needs_old_log_probs:
            self._compute(self._workers.compute_log_prob, batch, metrics, full_kl=self._reference_use.full_kl_in_reward)
        if self._reference_use.log_probs:
            self._compute(self._workers.compute_ref_log_prob, batch, metrics)
        if self._critic is not None:
            self._compute(self._critic.compute_values, batch, metrics)
        reward = pending.result()
        metrics |= reward.metrics
        self._add_reward(batch, reward, metrics)
        if baseline is not None:
            self._add_baseline(batch, baseline.result(), metrics)
        if starts_head:
            self._head_start.set_bias(self._workers, batch)
        self._add_advantages(batch)
        if "rival_scores" in self._update_keys:
            self._add_rivals(batch)
        metrics |= train_metrics(batch, self._end_token_ids, self._tis_imp_ratio_cap)
        self._dump(batch, reward)
        if self._critic is not None:
            rows = self._critic_config.ppo_mini_batch_size * self._rollout.n
            self._update(self._critic.update_critic, batch, UPDATE_KEYS, rows, metrics)
        if self.step > self.config.trainer.critic_warmup:
            rows = self.config.actor_rollout_ref.actor.ppo_mini_batch_size * self._rollout.n
            self._update(self._workers.update_actor, batch, self._update_keys, rows, metrics)
            if self._loss.use_score and self._loss.score.judges_steps:
                counted = Classes(metrics["score/counted_right"], metrics["score/counted_wrong"])
                self._score_watch.observe(counted, steps_by_class(batch))
        tokens, seconds = float(batch.batch["attention_mask"].sum()), time.perf_counter() - start
        metrics |= {"timing_s/step": seconds, "perf/tokens_per_s": tokens / seconds}
        return metrics | self._utilisation.metrics(batch, metrics)

    def validate(self) -> dict[str, float]:
        """Sample the validation set as `rollout.val_kwargs` say, with the same seeds every time."""
        n, size = self._rollout.val_kwargs.n, self.config.data.val_batch_size or len(self._val_data)
        results, timing = [], {}
        with _timed("validate", timing):
            for start in range(0, len(self._val_data), size):
                items = [self._val_data[row] for row in range(start, min(start + size, len(self._val_data)))]
                prompts = DataProto.from_single_dict(collate_fn(items, self.tokenizer.pad_token_id))
                results.append(self._validate_batch(self._seeded(prompts, "validation"), n))
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
        for group in self._groups.values():
            group.shutdown()
        ray.shutdown()

    # The parts of a step

    def _prompt_batches(self) -> Iterator[DataProto]:
        """Batches of prompts until the last step, epoch after epoch; `step` counts them."""
        batches = self._run_state.batches()
        while not self.is_done:
            columns = next(batches)
            self.step += 1
            yield self._seeded(DataProto.from_single_dict(columns), self.step)

    def _seeded(self, prompts: DataProto, occasion: int | str) -> DataProto:
        """Give each prompt its sampling seed: a run that is resumed samples what an uninterrupted one does."""
        rows = prompts.non_tensor_batch["row_index"]
        prompts.non_tensor_batch["seed"] = object_array(_seed(self.config.trainer.seed, occasion, row) for row in rows)
        prompts.non_tensor_batch["uid"] = object_array(str(row) for row in rows)
        return prompts

    def _generate(self, prompts: DataProto, n: int, metrics: dict[str, float], **meta_info: Any) -> DataProto:
        """Sample `n` responses a prompt; the rows of one prompt lie next to each other. `kinds` [B] tells which are the
        same (see `DistinctRows`)."""
        request = prompts.select(PROMPT_KEYS, ["seed"])
        request.meta_info |= {"n": n, **meta_info}
        responses = self._workers.generate_sequences(request)
        metrics |= responses.meta_info.pop("metrics")
        responses.batch["kinds"] = DistinctRows.of(responses.batch).kinds
        return DataProto(non_tensor_batch=prompts.non_tensor_batch).repeat(n).union(DataProto(responses.batch))

    def _launch_grading(self, batch: DataProto) -> PendingReward:
        pending = self._reward_manager.launch(batch)
        if not self.config.reward_model.launch_reward_fn_async:
            pending.wait()
        return pending

    def _launch_baseline(self, prompts: DataProto, metrics: dict[str, float]) -> PendingReward:
        """Sample each prompt's greedy response, whose reward is ReMax's baseline, and start grading it."""
        with _timed("generate_baseline", metrics):
            greedy = self._generate(prompts, 1, {}, do_sample=False)
        return self._launch_grading(greedy)

    def _compute(self, method: GroupMethod, batch: DataProto, metrics: dict[str, float], **meta_info: Any) -> None:
        """Run a model of the workers over `batch`, and add the tensors and metrics that it gives."""
        inputs = DataProto(batch.batch.select(*MODEL_INPUT_KEYS), meta_info=meta_info)
        order = self._order_for(method, batch, len(batch), metrics)
        output = method(inputs[order])
        metrics |= output.meta_info.pop("metrics")
        batch.union(output[order.argsort()])

    def _update(
        self,
        method: GroupMethod,
        batch: DataProto,
        keys: Sequence[str],
        mini_batch_rows: int,
        metrics: dict[str, float],
    ) -> None:
        """Train a model of the workers on the columns `keys` of `batch`."""
        order = self._order_for(method, batch, mini_batch_rows, metrics)
        try:
            metrics |= method(batch.select(keys, [])[order]).meta_info["metrics"]
        except UserError as error:
            raise UserError(f"step {self.step}: {error}") from error

    def _order_for(self, method: GroupMethod, batch: DataProto, block: int, metrics: dict[str, float]) -> Tensor:
        """The order of rows in which the ranks' parts of every `block` of rows have about as many tokens to compute.

        The metric is the worst of a step's phases.
        """
        shares, lengths = method.shares, batch.batch["attention_mask"].sum(-1)
        if len(batch) % shares:
            # As in validation: the parts are filled up with copies.
            return torch.arange(len(batch))
        kinds = batch.batch["kinds"]
        order = rows_by_rank(lengths, block, shares, self.config.trainer.balance_batch, kinds)
        of_rank = torch.stack([sum_over_kinds(lengths[rows], kinds[rows]) for rows in order.chunk(shares)]).float()
        name = "perf/rank_tokens_max_over_mean"
        metrics[name] = max(metrics.get(name, 1.0), float(of_rank.max() / of_rank.mean()))
        return order

    def _add_reward(self, batch: DataProto, reward: Reward, metrics: dict[str, float]) -> None:
        """Add scores, outcome and, with `use_kl_in_reward`, the KL penalty."""
        scores, graded = reward.reward_tensor, reward.graded
        batch.union(DataProto.from_dict({"token_level_scores": scores, "correct": reward.correct, "graded": graded}))
        batch.batch["token_level_rewards"] = scores
        if self.config.algorithm.use_kl_in_reward:
            columns, mask = batch.batch, batch.batch["response_mask"]
            if self._reference_use.full_kl_in_reward:
                kl = columns["ref_kl"]
            else:
                kind = self.config.algorithm.kl_penalty
                kl = kl_penalty(columns["old_log_probs"], columns["ref_log_prob"], kind) * mask
            metrics |= {"reward/kl": masked_mean(kl, mask), "reward/kl_coef": self._kl_controller.value}
            columns["token_level_rewards"] = scores - self._kl_controller.value * kl
            self._kl_controller.update(metrics["reward/kl"], n_steps=len(batch))

    def _add_baseline(self, batch: DataProto, baseline: Reward, metrics: dict[str, float]) -> None:
        """Give each response its prompt's greedy reward; one that could not be graded is no baseline, nor is it zero:
        it masks the prompt's responses."""
        rewards, graded = baseline.reward_tensor.sum(-1), baseline.graded
        columns, n = batch.batch, self._rollout.n
        columns["baselines"] = rewards.repeat_interleave(n)
        columns["graded"] = columns["graded"] & graded.repeat_interleave(n)
        metrics |= {
            "reward/baseline": masked_mean(rewards, graded),
            "reward/ungraded_baselines": float((~graded).sum()),
        }

    def _add_advantages(self, batch: DataProto) -> None:
        columns = batch.batch
        inputs = AdvantageInputs(
            columns["token_level_rewards"],
            columns["response_mask"],
            columns["graded"],
            batch.non_tensor_batch["uid"],
            columns.get("values"),
            columns.get("baselines"),
        )
        columns["advantages"], columns["returns"] = compute_advantages(inputs, self.config.algorithm)

    def _add_rivals(self, batch: DataProto) -> None:
        """Give each response its rivals' scores here, where the responses to a prompt are together."""
        names = ("old_step_logits", "step_feature_mask", "correct", "graded")
        columns = (batch.batch[name] for name in names)
        batch.batch["rival_scores"] = self._loss.score.rivals(*columns, batch.non_tensor_batch["uid"])

    def _validate_batch(self, prompts: DataProto, n: int) -> ValidationResult:
        batch = self._generate(prompts, n, {}, validate=True)
        pending = self._reward_manager.launch(batch)
        scores = None
        if self.config.actor_rollout_ref.use_score:
            self._compute(self._workers.compute_log_prob, batch, {})
            scores = trajectory_scores(batch.batch["old_step_logits"], batch.batch["step_feature_mask"])
        reward = pending.result()
        sources = batch.non_tensor_batch[self.config.data.reward_fn_key]
        return ValidationResult(sources, reward.correct, reward.graded, batch.batch["response_mask"].sum(-1), scores)

    # Files

    def _dump(self, batch: DataProto, reward: Reward) -> None:
        """Write the step's samples to `trainer.rollout_data_dir`."""
        folder = self.config.trainer.rollout_data_dir
        if folder is None:
            return
        columns = batch.batch
        is_prompt = columns["attention_mask"][:, : columns["prompts"].shape[1]].bool()
        texts = {
            # With the template's special tokens: whoever reads the samples gives a model the prompt that it had.
            "prompt": [self.tokenizer.decode(ids[mask]) for ids, mask in zip(columns["prompts"], is_prompt)],
            "response": list(map(Detokenizer(self.tokenizer), columns["responses"].tolist())),
        }
        values = {
            "reward": reward.reward_tensor.sum(-1),
            "correct": reward.correct,
            "graded": reward.graded,
            "tokens": columns["response_mask"].sum(-1),
        }
        if "baselines" in columns:
            values["baseline"] = columns["baselines"]
        if "old_step_logits" in columns:
            values["score"] = trajectory_scores(columns["old_step_logits"], columns["step_feature_mask"])
        values = reward.reward_extra_info | values
        table = {**texts, **{name: value.tolist() for name, value in values.items()}}
        with atomic_write(Path(folder) / f"{self.step}.jsonl", "w") as stream:
            for row in zip(*table.values()):
                stream.write(json.dumps({"step": self.step, **dict(zip(table, row))}, ensure_ascii=False) + "\n")

    def _tracking(self) -> Tracking:
        trainer = self.config.trainer
        return Tracking(
            trainer.project_name,
            trainer.experiment_name,
            trainer.logger,
            trainer.default_local_dir,
            OmegaConf.to_container(self.config, resolve=True),
            resume_step=self.step,
        )

    @contextmanager
    def _progress(self) -> Iterator[Callable[[dict[str, float]], None]]:
        """A progress bar; the function it yields moves it to the present step."""
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn(f"→ {self._run_state.folder}"),
        )
        with Progress(*columns) as progress:
            task = progress.add_task("", total=self.total_steps, completed=self.step)

            def report(metrics: dict[str, float]) -> None:
                text = f"reward {metrics['reward/mean']:.3f}  {metrics['timing_s/step']:.1f} s/step"
                if math.isfinite(value := metrics.get("score/within_prompt_auc", math.nan)):
                    text = f"within-prompt AUC {value:.2f}  {text}"
                progress.update(task, completed=self.step, description=text)

            yield report

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.is_done)


def _world_size(config: DictConfig) -> int:
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def _seed(*parts: int | str) -> int:
    """A number below 2^31 that is as good as random in `parts`."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@contextmanager
def _timed(phase: str, metrics: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    metrics[f"timing_s/{phase}"] = time.perf_counter() - start
