"""The policy on this rank: log-probs before the update, and the joint update itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.utils.fsdp import all_reduce_last, local_device, reshard
from verl.utils.optim import JointOptimizer
from verl.utils.packing import Batch, TokenLayout, layout_maker
from verl.workers.actor.joint_loss import LossConfig, Totals, joint_loss, local_totals
from verl.workers.actor.joint_model import JointModel, JointOutput
from verl.workers.actor.micro_batches import MicroBatches, MicroBatching
from verl.workers.actor.reference import ReferencePolicy
from verl.workers.mini_batches import MiniBatching, means_over_steps, summed_over_ranks
from xbai.errors import UserError


class DataParallelPPOActor:
    """A rank of the policy (with an optimiser) or of the reference (without).

    Every rank runs the same number of micro-batches. Between the collectives that open and close a mini-batch, the only
    ones are FSDP2's and, where a group of ranks shares its rows' tokens, that group's.

    Args:
        config: the `actor_rollout_ref` tree.
        model: sharded by `shard_model`; with `model.use_remove_padding` its attention is the packed one.
        optimizer: None for a reference policy, which cannot be updated.
        log_prob_config: section with the `log_prob_*` keys; default `config["rollout"]` (the reference's is `ref`).
        sp_group: the ranks that compute the same rows together (sequence parallelism); needs packing.
        reference: for the full KL to it, in the loss (`kl_loss_type=full`) or as a column.

    Raises:
        UserError: a batch size that ranks cannot share evenly, or a temperature that gives no log-probs.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        model: JointModel,
        optimizer: JointOptimizer | None = None,
        log_prob_config: Mapping[str, Any] | None = None,
        sp_group: dist.ProcessGroup | None = None,
        reference: ReferencePolicy | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._reference = reference
        self._device = local_device()
        self._world_size = dist.get_world_size()
        self._sp_group = sp_group
        self._sp_size = 1 if sp_group is None else dist.get_world_size(sp_group)
        self._temperature = config["rollout"]["temperature"]
        if self._temperature <= 0:
            raise UserError("actor_rollout_ref.rollout.temperature must be above 0 in training")
        self._packed = config.get("model", {}).get("use_remove_padding", False)
        self._layout = layout_maker(self._packed, self._device, sp_group)
        log_prob_config = log_prob_config or config["rollout"]
        self._log_prob_batching = MicroBatching.for_log_prob(log_prob_config, self._packed, self._sp_size)
        if optimizer is not None:
            self._read_update_config(config)

    def _read_update_config(self, config: Mapping[str, Any]) -> None:
        actor = config["actor"]
        self._loss_config = LossConfig.from_config(config)
        self._update_batching = MicroBatching.for_update(actor, self._packed, self._sp_size, self._world_size)
        self._mini_batching = MiniBatching(actor, config["rollout"]["n"], self._sp_group, "actor")
        self._grad_clip = actor["grad_clip"]

    @torch.no_grad()
    def compute_log_prob(
        self, data: Batch, compute_entropy: bool = True, compute_kl: bool = False
    ) -> dict[str, Tensor]:
        """Log-probs, entropies and step logits in evaluation mode.

        Args:
            data: `input_ids attention_mask position_ids [B, P+R]`, `response_mask [B, R]`, and with a score head
                `step_feature_mask [B, P+R]`. The same on all ranks of a sequence-parallel group.
            compute_entropy: also compute entropies.
            compute_kl: also compute the KL to the reference, summed over the vocabulary.

        Returns:
            On the CPU: `old_log_probs [B, R]`, `entropys [B, R]` and `ref_kl [B, R]` when asked for, `old_step_logits
            [B, P+R]` with a score head; 0 on padding and off the step features.
        """
        self.model.eval()
        keys = ["input_ids", "attention_mask", "position_ids", "response_mask"]
        if self.model.score_head is not None:
            keys.append("step_feature_mask")
        data = {key: data[key] for key in keys}
        results: dict[str, Tensor] = {}
        for rows, batch in MicroBatches(data, self._log_prob_batching):
            layout = self._layout(batch)
            part = self._restored(self._forward(layout, compute_entropy, compute_kl), layout)
            for name, values in part.items():
                whole = results.setdefault(name, values.new_zeros(len(data["input_ids"]), values.shape[1]))
                whole[rows] = values[: len(rows)]
        reshard(self.model)
        if compute_kl:
            self._reference.release()
        return {name: values.cpu() for name, values in results.items()}

    def _restored(self, output: JointOutput, layout: TokenLayout) -> dict[str, Tensor]:
        restored = {"old_log_probs": layout.restore_tokens(output.log_probs)}
        if output.entropy is not None:
            restored["entropys"] = layout.restore_tokens(output.entropy)
        if output.kl is not None:
            restored["ref_kl"] = layout.restore_tokens(output.kl)
        if output.step_logits is not None:
            restored["old_step_logits"] = layout.restore_steps(output.step_logits)
        return restored

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
        self.model.train()
        given = set(data.keys())
        has_old_log_probs = "old_log_probs" in given
        keys = self._loss_config.batch_keys(has_old_log_probs)
        if "rollout_log_probs" in keys and "rollout_log_probs" not in given:
            raise UserError("actor.tis_imp_ratio_cap needs the rollout engine's log-probs; this batch has none")
        if not has_old_log_probs and (steps := self._mini_batching.optimiser_steps(data)) > 1:
            raise ValueError(f"{steps} optimiser steps on one batch need its old_log_probs")
        data = {key: data[key] for key in keys}
        metrics = means_over_steps(map(self._update, self._mini_batching.split(data)))
        return _prefixed(metrics | self.optimizer.advance_schedules())

    def _update(self, mini_batch: Batch) -> dict[str, float]:
        totals = local_totals(mini_batch, self._loss_config).to(self._device)
        dist.all_reduce(totals)
        # All ranks of a sequence-parallel group have counted the same rows.
        totals = Totals.from_tensor(totals / self._sp_size)
        micro_batches = MicroBatches(mini_batch, self._update_batching)
        shares = (self._forward_backward(batch, totals) for _, batch in all_reduce_last(self.model, micro_batches))
        metrics = summed_over_ranks(shares) | micro_batches.balance()
        if self._loss_config.uses_full_kl:
            self._reference.release()
        if self._loss_config.use_score:
            score = totals.score
            metrics |= {"counted_right": score.steps.positive, "counted_wrong": score.steps.negative}
            if self._loss_config.score.compares:
                metrics["counted_pairs"] = score.pairs
        return metrics | self.optimizer.step(self._grad_clip, metrics["loss"])

    def _forward_backward(self, batch: Batch, totals: Totals) -> dict[str, Tensor]:
        layout = self._layout(batch)
        output = self._forward(layout, self._loss_config.entropy_coeff != 0, self._loss_config.uses_full_kl)
        loss, metrics = joint_loss(output, layout, batch, totals, self._loss_config)
        # FSDP2 takes the mean over ranks where the shares are to be added up.
        (loss * self._world_size).backward()
        return metrics

    def _forward(self, layout: TokenLayout, compute_entropy: bool, compute_kl: bool) -> JointOutput:
        return self.model(
            layout,
            temperature=self._temperature,
            compute_entropy=compute_entropy,
            backbone_grad_scale=self._loss_config.backbone_grad_scale if self.model.training else 1.0,
            reference=self._reference.states(layout) if compute_kl else None,
        )


METRIC_NAMES = {
    "score_loss": "score/loss",
    "counted_right": "score/counted_right",
    "counted_wrong": "score/counted_wrong",
    "counted_pairs": "score/counted_pairs",
    "grad_norm/policy": "actor/grad_norm",
    "grad_norm/score": "score/grad_norm",
    "lr/policy": "actor/lr",
    "lr/score": "score/lr",
    "log_prob_diff_mean": "rollout/log_prob_diff_mean",
    "mismatch_kl": "rollout/mismatch_kl",
    "micro_batches": "perf/micro_batches",
    "tokens_per_micro_batch_max_over_mean": "perf/tokens_per_micro_batch_max_over_mean",
}


def _prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {METRIC_NAMES.get(name, f"actor/{name}"): value for name, value in metrics.items()}
