"""The worker that holds the critic of PPO with GAE."""

from __future__ import annotations

import torch

from verl import DataProto
from verl.models.fsdp import init_distributed
from verl.models.loading import loading_dtype
from verl.models.ulysses import sequence_parallel_group
from verl.models.value_model import ValueModel, build_value_model
from verl.optim.optimizers import Optimizers
from verl.single_controller import each, joined
from verl.trainer.config.schema import CriticConfig
from verl.workers.checkpointed_worker import CheckpointedWorker, CheckpointedWorkers
from verl.workers.critic import DataParallelPPOCritic
from verl.workers.phase_metrics import measure_phase, tokens_of_rank
from verl.workers.placed_model import Dtypes, PlacedModel
from xbai.model_files import ModelFiles


class CriticWorker(CheckpointedWorker):
    """The critic of one rank. Results carry `meta_info["metrics"]`, as those of `ActorRolloutRefWorker` do.

    Args:
        config: the `critic` section.
        responses_per_prompt: `rollout.n`.
        total_steps: of the optimiser's schedule.
        seed: of shuffling; each rank derives its own.
    """

    def __init__(self, config: CriticConfig, responses_per_prompt: int, total_steps: int, seed: int = 1) -> None:
        self.config, self._responses_per_prompt = config, responses_per_prompt
        self._total_steps, self._seed = total_steps, seed

    def init_model(self) -> None:
        """Join the critics' process group and load this rank's part of the model.

        Raises:
            UserError: a model folder or configuration that does not fit.
        """
        init_distributed(self.config.nccl_timeout)
        torch.manual_seed(self._seed + self.rank)
        path, config = self.config.model.path, self.config
        placed = PlacedModel(self._build_model(), config.model.fsdp_config, self._build_optimizer)
        sp_group = sequence_parallel_group(config.ulysses_sequence_parallel_size)
        self._critic = DataParallelPPOCritic(
            config, self._responses_per_prompt, placed.model, placed.optimizer, sp_group
        )
        self._keep_checkpoints_of(placed, ModelFiles.read(path), seed=self._seed)

    def compute_values(self, data: DataProto) -> DataProto:
        """`values` [B, R] of the states before each response token."""
        with measure_phase("values") as metrics, self._trained.on_device():
            metrics["tokens"] = self._tokens(data)
            values = self._critic.compute_values(data.batch)
        return DataProto.from_dict({"values": values}, meta_info={"metrics": metrics})

    def update_critic(self, data: DataProto) -> DataProto:
        """Move the values towards `returns`; the metrics are the same on every rank.

        Raises:
            UserError: the batch is not whole mini-batches.
        """
        with measure_phase("update_critic") as metrics, self._trained.on_device(with_optimizer=True):
            metrics["tokens"] = self._tokens(data) * self.config.ppo_epochs
            training_metrics = self._critic.update_critic(data.batch)
        return DataProto(meta_info={"metrics": training_metrics | metrics})

    def _tokens(self, data: DataProto) -> float:
        return tokens_of_rank(data, self.config.ulysses_sequence_parallel_size)

    def _build_model(self) -> ValueModel:
        model = self.config.model
        dtypes = Dtypes.from_config(model.fsdp_config)
        return build_value_model(
            model.path,
            loading_dtype(model.path, dtypes.stored),
            packed=model.use_remove_padding,
            trust_remote_code=model.trust_remote_code,
            gradient_checkpointing=model.enable_gradient_checkpointing is True,
            compute_dtype=dtypes.compute,
        )

    def _build_optimizer(self, model: ValueModel) -> Optimizers:
        parts = {"critic": (model, self.config.optim)}
        return Optimizers(parts, self._total_steps, self.config.max_nonfinite_updates)


class CriticWorkers(CheckpointedWorkers):
    """The critics of all ranks, as the driver calls them."""

    init_model = each(CriticWorker.init_model)
    compute_values = joined(CriticWorker.compute_values, group="train")
    update_critic = joined(CriticWorker.update_critic, group="train", pads=False)
