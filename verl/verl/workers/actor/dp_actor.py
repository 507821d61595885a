"""The policy in training on this rank: the joint update of backbone, LM head and score head."""

from __future__ import annotations

import torch.distributed as dist

from verl.models.joint_model import JointModel, JointOutput
from verl.models.packing import Batch, TokenLayout
from verl.models.reference import ReferencePolicy
from verl.optim.optimizers import JointOptimizer
from verl.trainer.config.policy import ActorRolloutRefConfig
from verl.workers.actor.joint_loss import JointLoss, LossConfig
from verl.workers.actor.log_probs import PolicyLogProbs
from verl.workers.update import MetricGroups, RolloutUpdate, Update
from xbai.errors import UserError

GROUPS = MetricGroups(update="actor", balance="perf", parts={"policy": "actor", "score": "score"})


class DataParallelPPOActor(PolicyLogProbs):
    """A policy that is trained.

    Args:
        config: the `actor_rollout_ref` tree.
        model: sharded by `shard_model`; with `model.use_remove_padding` its attention is the packed one.
        optimizer: of its parts.
        sp_group: the ranks that compute the same rows together (sequence parallelism); needs packing.
        reference: for the full KL to it in the loss (`kl_loss_type=full`).

    Raises:
        UserError: a batch size that ranks cannot share evenly.
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
        self.optimizer = optimizer
        self.loss_config = LossConfig.from_config(config)
        if self.loss_config.uses_full_kl and reference is None:
            raise ValueError("actor.kl_loss_type=full needs the reference policy")
        self._reference = reference if self.loss_config.uses_full_kl else None
        update = Update(model, self._forward, JointLoss(self.loss_config), self._layout, sp_group)
        self._update = RolloutUpdate(update, optimizer, config.actor, config.rollout.n, self._packed, GROUPS)

    def _forward(self, layout: TokenLayout) -> JointOutput:
        return self.model(
            layout,
            temperature=self._temperature,
            compute_entropy=self.loss_config.entropy_coeff != 0,
            backbone_grad_scale=self.loss_config.backbone_grad_scale,
            reference=None if self._reference is None else self._reference.states(layout),
        )

    def update_policy(self, data: Batch) -> dict[str, float]:
        """Run `ppo_epochs` passes of joint updates over this rank's rows, one optimiser step a mini-batch.

        Args:
            data: the keys of `LossConfig.batch_keys`, as many rows on every rank; the same rows on all ranks of a
                sequence-parallel group. `old_log_probs` may be missing where all rows are one optimiser step.

        Returns:
            Means over the optimiser steps, the same on every rank: `actor/*`, with a score head `score/*`, without
            `old_log_probs` also `rollout/*`, and how even the micro-batches were, `perf/*`. `actor/skipped_updates`
            counts those whose gradient was not finite.

        Raises:
            UserError: `actor.tis_imp_ratio_cap` without the engine's log-probs, or a batch that is not whole
                mini-batches.
        """
        given = set(data.keys())
        has_old_log_probs = "old_log_probs" in given
        keys = self.loss_config.batch_keys(has_old_log_probs)
        if "rollout_log_probs" in keys and "rollout_log_probs" not in given:
            raise UserError("actor.tis_imp_ratio_cap needs the rollout engine's log-probs; this batch has none")
        if not has_old_log_probs and (steps := self._update.optimiser_steps(data)) > 1:
            raise ValueError(f"{steps} optimiser steps on one batch need its old_log_probs")
        release = None if self._reference is None else self._reference.release
        return self._update.run({key: data[key] for key in keys}, release)
