"""The frozen policy, where its whole distributions are needed and not only its log-probs of the sampled tokens."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from verl.models.fsdp import reshard
from verl.models.joint_model import JointModel
from verl.models.log_probs import FinalStates
from verl.models.packing import TokenLayout


class ReferencePolicy:
    """Gives the reference's final states, from which its logits are made chunk by chunk where they are compared.

    The model, without score head, is sharded by `shard_model`, which keeps the LM head with the root: it stays gathered
    from the first `states` to `release`, and so over all micro-batches of a mini-batch.
    """

    def __init__(self, model: JointModel) -> None:
        self._model = model.eval()
        register_fsdp_forward_method(model, "final_states")

    @torch.no_grad()
    def states(self, layout: TokenLayout) -> FinalStates:
        """At `layout.predictors`. Every rank must call it as often."""
        return FinalStates(self._model.final_states(layout), self._model.gathered_lm_head())

    def release(self) -> None:
        """Free what `states` left gathered."""
        reshard(self._model)
