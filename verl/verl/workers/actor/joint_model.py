"""The reflective generative model as the trainer sees it: backbone, LM head and score head in one forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.utils.torch_functional import token_log_probs
from xbai.sprm import HiddenStateTap, ScoreHead, scale_gradient


class JointOutput(NamedTuple):
    """What one forward pass yields. A tuple, because FSDP2 finds the tensors that need gradients through pytree."""

    log_probs: Tensor
    """[batch, response] float32 log-probability of each response token."""
    entropy: Tensor | None
    """[batch, response] float32 entropy before each response token."""
    step_logits: Tensor | None
    """[batch, time] float32 raw head output at the feature positions, 0 elsewhere."""


class JointModel(nn.Module):
    """A causal LM and the score head on its second last layer.

    The LM head is applied inside this module's forward, not by the caller: under FSDP2 its weight exists whole only
    while the root's all-gather covers it.

    Args:
        lm: a transformers causal LM with `.model` (its `.layers` are decoder layers) and `.lm_head`.
        score_head: None for a plain policy or reference model.
    """

    def __init__(self, lm: PreTrainedModel, score_head: ScoreHead | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.score_head = score_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        *,
        response_length: int,
        feature_mask: Tensor | None = None,
        temperature: float = 1.0,
        compute_entropy: bool = False,
        backbone_grad_scale: float = 1.0,
    ) -> JointOutput:
        """Score the last `response_length` columns of a batch.

        Args:
            input_ids, attention_mask, position_ids: [batch, time]; the response is the last `response_length` columns,
                with at least one column before it.
            response_length: columns whose log-probabilities are wanted.
            feature_mask: [batch, time] bool, the step features; needed when there is a score head.
            temperature: divides the logits, as the rollout engine did.
            compute_entropy: also return entropies.
            backbone_grad_scale: how much of the step logits' gradient reaches the backbone.
        """
        with HiddenStateTap(self.lm) as tap:
            hidden = self.lm.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state
            features = None if self.score_head is None else tap.take()
        log_probs, entropy = token_log_probs(
            hidden[:, -response_length - 1 : -1],
            self.lm.lm_head,
            input_ids[:, -response_length:],
            self.lm.config.vocab_size,
            temperature=temperature,
            compute_entropy=compute_entropy,
        )
        return JointOutput(log_probs, entropy, self._step_logits(features, feature_mask, backbone_grad_scale))

    def _step_logits(
        self, features: Tensor | None, feature_mask: Tensor | None, backbone_grad_scale: float
    ) -> Tensor | None:
        if features is None:
            return None
        # Without a single step the head still runs, on zero rows: its gradients are then zero rather than missing, and
        # every rank reduces them alike.
        selected = scale_gradient(features[feature_mask], backbone_grad_scale)
        logits = self.score_head(selected).float()
        return torch.zeros(feature_mask.shape, device=logits.device).masked_scatter(feature_mask, logits)
