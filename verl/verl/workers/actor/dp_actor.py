"""The policy on this rank: log-probs before the update, and the joint update itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor

from verl.utils.fsdp import local_device, reshard
from verl.utils.optim import JointOptimizer
from verl.workers.actor.joint_loss import LossConfig, Totals, joint_loss, local_totals
from verl.workers.actor.joint_model import JointModel, JointOutput
from verl.workers.actor.micro_batches import MicroBatching, agreed_count, trim
from xbai.errors import UserError


class DataParallelPPOActor:
    """A data-parallel rank of the policy (with an optimiser) or of the reference (without).

    Every rank runs the same number of micro-batches: what a rank lacks it makes up with one row whose masks are empty.
    Between the collectives that open and close a mini-batch, the only ones are FSDP2's.

    Args:
        config: the `actor_rollout_ref` tree.
        model: sharded by `shard_model`.
        optimizer: None for a reference policy, which cannot be updated.
        log_prob_config: section with the `log_prob_*` keys; default `config.rollout` (the reference's is `config.ref`).

    Raises:
        UserError: a batch size that ranks cannot share evenly, or a temperature that gives no log-probs.
    """

    def __init__(
        self,
        config: DictConfig,
        model: JointModel,
        optimizer: JointOptimizer | None = None,
        log_prob_config: DictConfig | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._device = local_device()
        self._world_size = dist.get_world_size()
        self._temperature = config.rollout.temperature
        if self._temperature <= 0:
            raise UserError("actor_rollout_ref.rollout.temperature must be above 0 in training")
        self._log_prob_batching = MicroBatching.for_log_prob(log_prob_config or config.rollout)
        if optimizer is not None:
            self._read_update_config(config)

    def _read_update_config(self, config: DictConfig) -> None:
        actor = config.actor
        self._loss_config = LossConfig.from_config(config)
        self._update_batching = MicroBatching.for_update(actor)
        self._epochs, self._shuffle, self._grad_clip = actor.ppo_epochs, actor.shuffle, actor.grad_clip
        responses = actor.ppo_mini_batch_size * config.rollout.n
        if responses % self._world_size:
            raise UserError(
                f"actor.ppo_mini_batch_size * rollout.n = {responses} must be a multiple of the number of ranks, "
                f"{self._world_size}"
            )
        self._mini_batch_rows = responses // self._world_size

    @torch.no_grad()
    def compute_log_prob(self, data: TensorDict, compute_entropy: bool = True) -> TensorDict:
        """Log-probs, entropies and step logits in evaluation mode.

        Args:
            data: `input_ids attention_mask position_ids [B, P+R]`, `responses [B, R]`, and with a score head
                `step_feature_mask [B, P+R]`.
            compute_entropy: also compute entropies.

        Returns:
            On the CPU: `old_log_probs [B, R]`, `entropys [B, R]` when asked for, `old_step_logits [B, P+R]` with a
            score head; 0 on padding and off the step features.
        """
        self.model.eval()
        response_length = data["responses"].shape[1]
        keys = ["input_ids", "attention_mask", "position_ids"]
        if self.model.score_head is not None:
            keys.append("step_feature_mask")
        inputs = data.select(*keys)
        results: dict[str, Tensor] = {}
        for rows, is_dummy in self._micro_batches(inputs, self._log_prob_batching, response_length):
            part = self._log_prob_of(inputs[rows].to(self._device), response_length, compute_entropy)
            for name, value in {} if is_dummy else part.items():
                results.setdefault(name, torch.zeros(len(data), *value.shape[1:]))[rows] = value.cpu()
        reshard(self.model)
        return TensorDict(results, batch_size=[len(data)])

    def _log_prob_of(self, batch: TensorDict, response_length: int, compute_entropy: bool) -> dict[str, Tensor]:
        narrow, left, right = trim(batch, response_length)
        output = self._forward(narrow, response_length - right, compute_entropy)
        is_token = narrow["attention_mask"][:, -(response_length - right) :].bool()
        part = {"old_log_probs": F.pad(output.log_probs.masked_fill(~is_token, 0.0), (0, right))}
        if output.entropy is not None:
            part["entropys"] = F.pad(output.entropy.masked_fill(~is_token, 0.0), (0, right))
        if output.step_logits is not None:
            part["old_step_logits"] = F.pad(output.step_logits, (left, right))
        return part

    def update_policy(self, data: TensorDict) -> dict[str, float]:
        """Run `ppo_epochs` passes of joint updates over this rank's rows, one optimiser step a mini-batch.

        Args:
            data: the keys of `LossConfig.batch_keys`, as many rows on every rank.

        Returns:
            Means over the optimiser steps, the same on every rank: `actor/*` and, with a score head, `score/*`.
            `actor/skipped_updates` counts those whose gradient was not finite.
        """
        self.model.train()
        data = data.select(*self._loss_config.batch_keys())
        history: dict[str, list[float]] = defaultdict(list)
        for mini_batch in self._mini_batches(data):
            for name, value in self._update(mini_batch).items():
                history[name].append(value)
        metrics = {name: sum(values) / len(values) for name, values in history.items()}
        metrics |= self.optimizer.advance_schedules()
        skipped = sum(history["skipped"])
        return _prefixed({**metrics, "skipped_updates": skipped})

    def _mini_batches(self, data: TensorDict) -> Iterator[TensorDict]:
        for _ in range(self._epochs):
            order = torch.randperm(len(data)) if self._shuffle else torch.arange(len(data))
            for rows in order.split(self._mini_batch_rows):
                yield data[rows]

    def _update(self, mini_batch: TensorDict) -> dict[str, float]:
        totals = local_totals(mini_batch, self._loss_config).to(self._device)
        dist.all_reduce(totals)
        totals = Totals.from_tensor(totals)
        response_length = mini_batch["response_mask"].shape[1]
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self._device))
        for rows, is_dummy in self._micro_batches(mini_batch, self._update_batching, response_length):
            batch = mini_batch[rows].to(self._device)
            if is_dummy:
                batch["graded"] = torch.zeros_like(batch["graded"])
            for name, value in self._forward_backward(batch, response_length, totals).items():
                sums[name] = sums[name] + value
        metrics = self._summed_over_ranks(sums)
        if self._loss_config.use_score:
            metrics |= {"counted_right": totals.steps.positive, "counted_wrong": totals.steps.negative}
        return metrics | self.optimizer.step(self._grad_clip)

    def _forward_backward(self, batch: TensorDict, response_length: int, totals: Totals) -> dict[str, Tensor]:
        batch, _, right = trim(batch, response_length)
        output = self._forward(batch, response_length - right, self._loss_config.entropy_coeff != 0)
        loss, metrics = joint_loss(output, batch, totals, self._loss_config)
        # FSDP2 takes the mean over ranks where the shares are to be added up.
        (loss * self._world_size).backward()
        return metrics

    def _forward(self, batch: TensorDict, response_length: int, compute_entropy: bool) -> JointOutput:
        has_head = self.model.score_head is not None
        return self.model(
            batch["input_ids"],
            batch["attention_mask"],
            batch["position_ids"],
            response_length=response_length,
            feature_mask=batch["step_feature_mask"].bool() if has_head else None,
            temperature=self._temperature,
            compute_entropy=compute_entropy,
            backbone_grad_scale=self._loss_config.backbone_grad_scale if self.model.training else 1.0,
        )

    def _micro_batches(
        self, data: TensorDict, batching: MicroBatching, response_length: int
    ) -> Iterator[tuple[Tensor, bool]]:
        """Rows of each micro-batch and whether it is a dummy, equally many on every rank."""
        local = batching.split(data["attention_mask"], response_length)
        for index in range(agreed_count(len(local))):
            is_dummy = index >= len(local)
            yield (torch.zeros(1, dtype=torch.long) if is_dummy else local[index]), is_dummy

    def _summed_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        stacked = torch.stack(list(sums.values())).double()
        dist.all_reduce(stacked)
        return dict(zip(sums, stacked.tolist()))


METRIC_NAMES = {
    "score_loss": "score/loss",
    "counted_right": "score/counted_right",
    "counted_wrong": "score/counted_wrong",
    "grad_norm/policy": "actor/grad_norm",
    "grad_norm/score": "score/grad_norm",
    "lr/policy": "actor/lr",
    "lr/score": "score/lr",
}


def _prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {METRIC_NAMES.get(name, f"actor/{name}"): value for name, value in metrics.items() if name != "skipped"}
