"""The policy as it began, where its whole distributions are needed and not only its log-probs of the sampled tokens."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from verl.models.fsdp import reshard
from verl.models.joint_model import JointModel
from verl.models.log_probs import FinalStates
from verl.models.lora import adapters_off
from verl.models.packing import TokenLayout


class ReferencePolicy:
    """Gives the reference's final states, from which its logits are made chunk by chunk where they are compared.

    The model is a frozen one of its own, or a policy whose base it is, which has adapters. It is sharded by
    `shard_model`, which keeps the LM head with the root: one of its own stays gathered from the first `states` to
    `release`, and so over all micro-batches of a mini-batch.
    """

    def __init__(self, model: JointModel) -> None:
        self._model = model
        register_fsdp_forward_method(model, "final_states")

    @torch.no_grad()
    def states(self, layout: TokenLayout) -> FinalStates:
        """At `layout.predictors`, in evaluation mode. Every rank must call it as often."""
        was_training = self._model.training
        self._model.eval()
        with adapters_off(self._model):
            hidden = self._model.final_states(layout)
        self._model.train(was_training)
        return FinalStates(hidden, self._model.gathered_lm_head())

    def release(self) -> None:
        """Free what `states` left gathered."""
        reshard(self._model)
