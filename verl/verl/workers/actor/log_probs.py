"""What a policy, or the reference, says of given responses: log-probs, entropies, step logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.fsdp import local_device, reshard
from verl.models.joint_model import JointModel, JointOutput
from verl.models.packing import Batch, TokenLayout, layout_maker
from verl.models.reference import ReferencePolicy
from verl.models.ulysses import group_size
from verl.trainer.config.policy import ActorRolloutRefConfig, RefConfig
from verl.trainer.config.rollout import RolloutConfig
from verl.workers.batching.micro_batches import MicroBatches, MicroBatching

INPUT_KEYS = ("input_ids", "attention_mask", "position_ids", "response_mask")


class PolicyLogProbs:
    """A policy on this rank in evaluation mode.

    Every rank runs the same number of micro-batches.

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
        results: dict[str, Tensor] = {}
        for rows, batch in zip(micro_batches.rows, micro_batches, strict=True):
            layout = self._layout(batch)
            output = self.model(
                layout,
                temperature=self._temperature,
                compute_entropy=compute_entropy,
                reference=None if reference is None else reference.states(layout),
            )
            for name, values in _restored(output, layout).items():
                whole = results.setdefault(name, values.new_zeros(len(data["input_ids"]), values.shape[1]))
                whole[rows] = values[: len(rows)]
        reshard(self.model)
        if reference is not None:
            reference.release()
        return {name: values.cpu() for name, values in results.items()}


def _restored(output: JointOutput, layout: TokenLayout) -> dict[str, Tensor]:
    restored = {"old_log_probs": layout.restore_tokens(output.log_probs)}
    if output.entropy is not None:
        restored["entropys"] = layout.restore_tokens(output.entropy)
    if output.kl is not None:
        restored["ref_kl"] = layout.restore_tokens(output.kl)
    if output.step_logits is not None:
        restored["old_step_logits"] = layout.restore_steps(output.step_logits)
    return restored
