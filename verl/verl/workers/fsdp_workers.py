"""The workers of the trainer: what each process holds, and what the driver can ask of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from verl import DataProto
from verl.checkpoints.adapters import adapter_files
from verl.models.fsdp import init_distributed, named_full_tensors
from verl.models.head_start import head_of, standardize_features
from verl.models.joint_model import JointModel
from verl.models.loading import build_joint_model, load_tokenizer, loading_dtype
from verl.models.lora import adapters_off, lora_config
from verl.models.reference import ReferencePolicy
from verl.models.ulysses import sequence_parallel_group
from verl.optim.optimizers import JointOptimizer
from verl.single_controller import each, joined
from verl.trainer.config.schema import ActorRolloutRefConfig, FrozenPlacement
from verl.utils.first_rank import on_first_rank
from verl.workers.actor.dp_actor import DataParallelPPOActor, PolicyLogProbs
from verl.workers.checkpointed_worker import CheckpointedWorker, CheckpointedWorkers
from verl.workers.critic_worker import CriticWorker
from verl.workers.phase_metrics import measure_phase, tokens_of_rank
from verl.workers.placed_model import Dtypes, PlacedModel
from verl.workers.rollout import EngineRollout
from verl.workers.rollout_worker import SamplingWorker, SamplingWorkers
from verl.workers.weight_transfer import WeightSender
from xbai.engine.files import read_config, resolve_dtype, resolve_head_dtype
from xbai.model_files import ModelFiles
from xbai.sprm import SPRMConfig, load_sprm_config, shift_head, step_feature_mask

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["ActorRolloutRefWorker", "CriticWorker", "PolicyWorkers", "group_sizes"]

Role = Literal["actor", "actor_ref", "actor_rollout", "actor_rollout_ref"]
"""What there is beside the policy: an engine, a reference."""


def group_sizes(config: ActorRolloutRefConfig) -> dict[str, int]:
    """How many consecutive ranks share rows, by sequence in training and reference, by tensors in rollout."""
    return {
        "train": config.actor.ulysses_sequence_parallel_size,
        "reference": config.ref.ulysses_sequence_parallel_size,
        "rollout": config.rollout.tensor_model_parallel_size,
    }


class ActorRolloutRefWorker(CheckpointedWorker, SamplingWorker):
    """Policy and, by its role, rollout engine and frozen reference policy (a model of its own, or the base of a policy
    that has adapters) of one rank. Without an engine it sends its weights to `RolloutWorker`s.

    The result of every computing method has `meta_info["metrics"]`, the cost of the phase on rank 0 (and for
    `update_actor` the training metrics): pop it before uniting the result with a batch.

    Args:
        config: the `actor_rollout_ref` section.
        role: what there is.
        total_steps: of the optimisers' schedules.
        seed: of the dropout in the score head; each rank derives its own.
    """

    def __init__(self, config: ActorRolloutRefConfig, role: Role, total_steps: int, seed: int = 1) -> None:
        self.config, self.role, self._total_steps, self._seed = config, role, total_steps, seed

    def init_model(self) -> None:
        """Join the process group and load everything this rank holds.

        Raises:
            UserError: a model folder, score head or configuration that does not fit.
        """
        init_distributed(self.config.nccl_timeout)
        torch.manual_seed(self._seed + self.rank)
        config = self.config
        self.tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        self._sprm_config: SPRMConfig | None = None
        if config.use_score:
            self._sprm_config = load_sprm_config(config.model.path, self.tokenizer, config.score.lang)
        placement, lora = config.actor.fsdp_config, lora_config(config.model)
        policy = self._build_model(placement, self._sprm_config, lora)
        self._policy = PlacedModel(policy, placement, self._build_optimizer)
        sizes, reference_policy = group_sizes(config), None
        sp_group = ref_sp_group = sequence_parallel_group(sizes["train"])
        if "ref" in self.role:
            self._reference = self._policy if lora is not None else self._build_reference()
            if sizes["reference"] != sizes["train"]:
                ref_sp_group = sequence_parallel_group(sizes["reference"])
            self._reference_log_probs = PolicyLogProbs(config, self._reference.model, config.ref, ref_sp_group)
            reference_policy = ReferencePolicy(self._reference.model)
        self._reference_policy = reference_policy
        self._actor = DataParallelPPOActor(
            config, self._policy.model, self._policy.optimizer, sp_group=sp_group, reference=reference_policy
        )
        self._keep_checkpoints_of(
            self._policy,
            self._model_files(lora),
            self._sprm_config,
            load_optimizer=not config.actor.optim.no_load_optim,
            seed=self._seed,
        )
        model_config = read_config(config.model.path, config.model.trust_remote_code)
        self._engine_dtype, self._are_sent = resolve_dtype(config.rollout.dtype, model_config), False
        if self._has_engine:
            self._rollout = EngineRollout(config.rollout, config.model, self.tokenizer.pad_token_id, self._sprm_config)

    def listen(self) -> int:
        """Have rank 0 keep the store in which it meets the rollout workers; the port where they find it."""
        if self.rank:
            return 0
        self._store = dist.TCPStore(self.worker_info().address, 0, is_master=True, wait_for_workers=False)
        return self._store.port

    def connect(self, receivers: int) -> None:
        """Meet so many rollout workers, which connect meanwhile."""
        if self.rank == 0:
            self._sender = WeightSender(self._store, 1 + receivers, self.config.nccl_timeout)

    def weights_are_sent(self) -> bool:
        """Whether the rollout workers have the present weights."""
        return self._are_sent

    def send_weights(self) -> None:
        """Give them to all rollout workers, which receive meanwhile."""
        with self._policy_weights() as weights:
            if self.rank == 0:
                self._sender.send(weights, self.config.rollout.check_weight_sync)
            else:
                # Gathering them is a collective.
                deque(weights, maxlen=0)
        self._are_sent = True

    def compute_log_prob(self, data: DataProto) -> DataProto:
        """What the update compares with: `old_log_probs`, `entropys` [B, R] and, with a score head,
        `step_feature_mask` and `old_step_logits` [B, P+R].

        `meta_info["full_kl"]=True` adds `ref_kl` [B, R], the KL to the reference summed over the vocabulary.
        """
        columns = self._step_columns(data)
        full_kl = data.meta_info.get("full_kl", False)
        with measure_phase("old_log_prob") as metrics, self._policy.on_device(), self._reference_on_device(full_kl):
            metrics["tokens"] = tokens_of_rank(data, group_sizes(self.config)["train"])
            reference = self._reference_policy if full_kl else None
            columns |= self._actor.compute_log_prob({**data.batch.to_dict(), **columns}, reference=reference)
        return DataProto.from_dict(columns, meta_info={"metrics": metrics})

    def standardize_score_head(self, data: DataProto, is_fresh: bool) -> DataProto:
        """See `standardize_features`; `meta_info["metrics"]` has the number of steps of `data` as `steps`."""
        batch = {**data.batch.to_dict(), **self._step_columns(data)}
        with measure_phase("head_start") as metrics, self._policy.on_device():
            steps = standardize_features(
                self._policy.model, lambda: self._actor.compute_log_prob(batch, compute_entropy=False), is_fresh
            )
        self._mark_changed()
        return DataProto(meta_info={"metrics": {"steps": float(steps)} | metrics})

    def shift_step_logits(self, shift: float) -> None:
        """Add `shift` to every logit of the score head, by its bias."""
        with self._policy.on_device():
            shift_head(head_of(self._policy.model), shift)
        self._mark_changed()

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """`ref_log_prob` [B, R] under the reference policy."""
        # A policy's base comes with the policy's score head, whose view of the steps nobody asks for here.
        batch = {**data.batch.to_dict(), **self._step_columns(data)}
        with measure_phase("ref") as metrics, self._reference.on_device(), adapters_off(self._reference.model):
            metrics["tokens"] = tokens_of_rank(data, group_sizes(self.config)["reference"])
            log_probs = self._reference_log_probs.compute_log_prob(batch, compute_entropy=False)["old_log_probs"]
        return DataProto.from_dict({"ref_log_prob": log_probs}, meta_info={"metrics": metrics})

    def update_actor(self, data: DataProto) -> DataProto:
        """One joint update of policy and score head on the whole batch; the metrics are the same on every rank.

        Raises:
            UserError: the batch is not whole mini-batches.
        """
        with (
            measure_phase("update_actor") as metrics,
            self._reference_on_device(self._actor.loss.uses_full_kl),
            self._policy.on_device(with_optimizer=True),
        ):
            metrics["tokens"] = tokens_of_rank(data, group_sizes(self.config)["train"]) * self.config.actor.ppo_epochs
            training_metrics = self._actor.update_policy(data.batch)
        self._mark_changed()
        return DataProto(meta_info={"metrics": training_metrics | metrics})

    def load_checkpoint(self, folder: str) -> None:
        """Go on from what `save_checkpoint` wrote; the next generation uses the loaded weights.

        Raises:
            UserError: no checkpoint in the folder.
        """
        super().load_checkpoint(folder)
        self._mark_changed()

    def _step_columns(self, data: DataProto) -> dict[str, Tensor]:
        """Where the steps end; nothing without a score head."""
        if self._sprm_config is None:
            return {}
        prompt_columns = torch.zeros_like(data.batch["prompts"], dtype=torch.bool)
        in_response = torch.cat([prompt_columns, data.batch["response_mask"].bool()], dim=1)
        mask = step_feature_mask(data.batch["input_ids"], in_response, self._sprm_config.step_rule)
        return {"step_feature_mask": mask}

    def _build_reference(self) -> PlacedModel[JointModel, None]:
        placement = self.config.ref.fsdp_config
        return PlacedModel(self._build_model(placement, None).requires_grad_(False), placement)

    def _build_model(
        self, fsdp_config: FrozenPlacement, sprm_config: SPRMConfig | None, lora: LoraConfig | None = None
    ) -> JointModel:
        config, dtypes = self.config, Dtypes.from_config(fsdp_config)
        return build_joint_model(
            config.model.path,
            # A frozen base is kept as its checkpoint is, like a reference.
            loading_dtype(config.model.path, dtypes.stored if lora is None else torch.float32),
            sprm_config=sprm_config,
            score_model_path=config.score.model_path if sprm_config is not None else None,
            channel=config.score.channel if sprm_config is not None else None,
            trust_remote_code=config.model.trust_remote_code,
            gradient_checkpointing=config.model.enable_gradient_checkpointing is True,
            compute_dtype=dtypes.compute,
            use_liger=config.model.use_liger is True,
            fused_kernels=config.model.use_fused_kernels is True,
            logits_dtype=resolve_head_dtype(config.model.head_dtype, dtypes.compute),
            lora=lora,
            lora_dtype=dtypes.stored,
            compile_layers=config.model.use_torch_compile,
            packed=config.model.use_remove_padding,
        )

    def _build_optimizer(self, model: JointModel) -> JointOptimizer:
        actor, of_score = self.config.actor, self.config.score.optim
        return JointOptimizer(model, actor.optim, of_score, self._total_steps, actor.max_nonfinite_updates)

    def _reference_on_device(self, wanted: bool) -> AbstractContextManager[None]:
        return self._reference.on_device() if wanted else nullcontext()

    @property
    def _has_engine(self) -> bool:
        return "rollout" in self.role

    def _mark_changed(self) -> None:
        self._are_sent = False
        if self._has_engine:
            self._rollout.mark_stale()

    def _wake_up(self) -> dict[str, float]:
        with measure_phase("weight_sync") as metrics:
            metrics |= self._rollout.wake_up(self._policy_weights)
        return metrics

    @contextmanager
    def _policy_weights(self) -> Iterator[Iterator[tuple[str, Tensor]]]:
        with self._policy.on_device():
            yield named_full_tensors(self._policy.model, self._engine_dtype)

    def _model_files(self, lora: LoraConfig | None) -> ModelFiles:
        """What travels with the weights: where adapters are on, too."""
        files, path = ModelFiles.read(self.config.model.path), self.config.model.path
        if lora is None:
            return files
        return replace(files, contents=files.contents | on_first_rank(lambda: adapter_files(lora, path)))


class PolicyWorkers(CheckpointedWorkers, SamplingWorkers):
    """The `ActorRolloutRefWorker`s of all ranks, as the driver calls them."""

    init_model = each(ActorRolloutRefWorker.init_model)
    listen = each(ActorRolloutRefWorker.listen)
    connect = each(ActorRolloutRefWorker.connect)
    weights_are_sent = each(ActorRolloutRefWorker.weights_are_sent)
    send_weights = each(ActorRolloutRefWorker.send_weights)
    compute_log_prob = joined(ActorRolloutRefWorker.compute_log_prob, group="train")
    compute_ref_log_prob = joined(ActorRolloutRefWorker.compute_ref_log_prob, group="reference")
    standardize_score_head = joined(ActorRolloutRefWorker.standardize_score_head, group="train", pads=False)
    shift_step_logits = each(ActorRolloutRefWorker.shift_step_logits)
    update_actor = joined(ActorRolloutRefWorker.update_actor, group="train", pads=False)
