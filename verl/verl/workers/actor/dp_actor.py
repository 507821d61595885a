"""The policy on this rank: what it, or the frozen reference, says of given responses, and its joint update."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.fsdp import local_device, reshard
from verl.models.joint_model import JointModel, JointOutput
from verl.models.packing import Batch, TokenLayout, layout_maker
from verl.models.reference import ReferencePolicy
from verl.models.ulysses import group_size
from verl.optim.optimizers import JointOptimizer
from verl.trainer.config.schema import ActorRolloutRefConfig, RefConfig, RolloutConfig
from verl.workers.actor.joint_loss import JointLoss
from verl.workers.batching.micro_batches import MicroBatches, MicroBatching
from verl.workers.update import RolloutUpdate, Update

INPUT_KEYS = ("input_ids", "attention_mask", "position_ids", "response_mask")


class PolicyLogProbs:
    """A policy on this rank in evaluation mode.

    Args:
        config: the `actor_rollout_ref` tree.
        model: sharded by `shard_model`; with `model.use_remove_padding` its attention is the packed one.
        log_prob_config: section with the `log_prob_*` keys.
        sp_group: the ranks that compute the same rows together (sequence parallelism); needs packing.
    """

    def __init__(
        self,
        config: ActorRolloutRefConfig,
        model: JointModel,
        log_prob_config: RolloutConfig | RefConfig,
        sp_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self._temperature = config.rollout.temperature
        self._packed = config.model.use_remove_padding
        self._layout = layout_maker(self._packed, local_device(), sp_group)
        self._batching = MicroBatching.for_log_prob(log_prob_config, self._packed, group_size(sp_group))

    @torch.no_grad()
    def compute_log_prob(
        self, data: Batch, compute_entropy: bool = True, reference: ReferencePolicy | None = None
    ) -> dict[str, Tensor]:
        """Log-probs, entropies and step logits.

        Args:
            data: `input_ids attention_mask position_ids [B, P+R]`, `response_mask [B, R]`, and with a score head
                `step_feature_mask [B, P+R]`. The same on all ranks of a sequence-parallel group.
            compute_entropy: also compute entropies.
            reference: also compute the KL to it, summed over the vocabulary.

        Returns:
            On the CPU: `old_log_probs [B, R]`, `entropys [B, R]` and `ref_kl [B, R]` when asked for, `old_step_logits
            [B, P+R]` with a score head; 0 on padding and off the step features.
        """
        self.model.eval()
        keys = INPUT_KEYS if self.model.score_head is None else (*INPUT_KEYS, "step_feature_mask")
        micro_batches = MicroBatches({key: data[key] for key in keys}, self._batching)
        results = micro_batches.map(partial(self._columns, compute_entropy=compute_entropy, reference=reference))
        reshard(self.model)
        if reference is not None:
            reference.release()
        return results

    def _columns(self, batch: Batch, compute_entropy: bool, reference: ReferencePolicy | None) -> dict[str, Tensor]:
        layout = self._layout(batch)
        output = self.model(
            layout,
            temperature=self._temperature,
            compute_entropy=compute_entropy,
            reference=None if reference is None else reference.states(layout),
        )
        of_tokens = {"old_log_probs": output.log_probs, "entropys": output.entropy, "ref_kl": output.kl}
        restored = {name: layout.restore_tokens(values) for name, values in of_tokens.items() if values is not None}
        if output.step_logits is not None:
            restored["old_step_logits"] = layout.restore_steps(output.step_logits)
        return restored


class DataParallelPPOActor(PolicyLogProbs):
    """A policy that is trained: the joint update of backbone, LM head and score head.

    Args:
        config, model, sp_group: as of `PolicyLogProbs`.
        optimizer: of its parts.
        reference: for the full KL to it in the loss (`kl_loss_type=full`).

    Raises:
        ValueError: the loss needs a reference, and there is none.
    """

    def __init__(
        self,
        config: ActorRolloutRefConfig,
        model: JointModel,
        optimizer: JointOptimizer,
        sp_group: dist.ProcessGroup | None = None,
        reference: ReferencePolicy | None = None,
    ) -> None:
        super().__init__(config, model, config.rollout, sp_group)
        self.config, self.optimizer, self.loss = config, optimizer, JointLoss(config)
        if self.loss.uses_full_kl and reference is None:
            raise ValueError("actor.kl_loss_type=full needs the reference policy")
        self._reference = reference if self.loss.uses_full_kl else None
        update = Update(model, self._forward, self.loss, self._layout, sp_group)
        self._update = RolloutUpdate(update, optimizer, config.actor, config.rollout.n, self._packed, "actor", "perf")

    def _forward(self, layout: TokenLayout) -> JointOutput:
        return self.model(
            layout,
            temperature=self._temperature,
            compute_entropy=self.config.actor.entropy_coeff != 0,
            backbone_grad_scale=self.config.score.backbone_grad_scale,
            reference=None if self._reference is None else self._reference.states(layout),
        )

    def update_policy(self, data: Batch) -> dict[str, float]:
        """Run `ppo_epochs` passes of joint updates over this rank's rows, one optimiser step a mini-batch.

        Args:
            data: the keys of `JointLoss.batch_keys`, as many rows on every rank; the same rows on all ranks of a
                sequence-parallel group. `old_log_probs` may be missing where all rows are one optimiser step.

        Returns:
            Means over the optimiser steps, the same on every rank: `actor/*`, with a score head `score/*`, without
            `old_log_probs` also `rollout/*`, and how even the micro-batches were, `perf/*`. `actor/skipped_updates`
            counts those whose gradient was not finite.

        Raises:
            UserError: the batch is not whole mini-batches.
        """
        has_old_log_probs = "old_log_probs" in set(data.keys())
        if not has_old_log_probs and (steps := self._update.optimiser_steps(data)) > 1:
            raise ValueError(f"{steps} optimiser steps on one batch need its old_log_probs")
        columns = {key: data[key] for key in self.loss.batch_keys(has_old_log_probs)}
        return self._update.run(columns, None if self._reference is None else self._reference.release)
