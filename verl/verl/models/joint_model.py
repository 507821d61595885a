"""The reflective generative model as the trainer sees it: backbone, LM head and score head in one forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.models.log_probs import FinalStates, LMHead, token_log_probs
from verl.models.packing import TokenLayout
from xbai.sprm import HiddenStateTap, ScoreHead, scale_gradient


class JointOutput(NamedTuple):
    """What one forward pass yields, flat: M response tokens and K step features of this rank, as in the `TokenLayout`.

    A tuple, because FSDP2 finds the tensors that need gradients through pytree.
    """

    log_probs: Tensor
    """[M] float32 log-probability of each response token."""
    entropy: Tensor | None
    """[M] float32 entropy before each response token."""
    step_logits: Tensor | None
    """[K] float32 raw head output at the step features."""
    kl: Tensor | None = None
    """[M] float32 KL to the reference before each response token, summed over the vocabulary."""


def computed(part: Tensor | None) -> Tensor:
    """A part of a `JointOutput`; a `ValueError` where the forward pass was not asked for it, or there is no head."""
    if part is None:
        raise ValueError("the loss needs what the forward pass was not asked for")
    return part


class JointModel(nn.Module):
    """A causal LM and the score head on its second last layer.

    The LM head is applied inside this module's forward, not by the caller: under FSDP2 its weight exists whole only
    while the root's all-gather covers it.

    Args:
        lm: a transformers causal LM with `.model` (its `.layers` are decoder layers) and `.lm_head`.
        score_head: None for a plain policy or reference model.
        fused_kernels: compile what follows the logits, see `token_log_probs`.
        logits_dtype: what the LM head's products are summed and kept in; None: what it is multiplied in.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        score_head: ScoreHead | None = None,
        *,
        fused_kernels: bool = False,
        logits_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.score_head = score_head
        self.fused_kernels = fused_kernels
        self.logits_dtype = logits_dtype

    def forward(
        self,
        layout: TokenLayout,
        *,
        temperature: float = 1.0,
        compute_entropy: bool = False,
        backbone_grad_scale: float = 1.0,
        reference: FinalStates | None = None,
    ) -> JointOutput:
        """Log-probabilities of response tokens, and the score head's view of the steps.

        Without a single token or step of its own a rank still runs both heads, on zero rows: their gradients are then
        zero rather than missing, and every rank reduces them alike.

        Args:
            layout: of a micro-batch; with step features when there is a score head.
            temperature: divides the logits, as the rollout engine did.
            compute_entropy: also return entropies.
            backbone_grad_scale: how much of the step logits' gradient reaches the backbone.
            reference: of another model on this layout: also return the KL to it.
        """
        with HiddenStateTap(self.lm) as tap:
            hidden = _predictor_states(self.lm, layout)
            features = None if self.score_head is None else tap.take()
        found = token_log_probs(
            hidden,
            self.gathered_lm_head(),
            layout.labels,
            temperature=temperature,
            compute_entropy=compute_entropy,
            reference=reference,
            fused=self.fused_kernels,
        )
        log_probs = layout.each_token(found.log_probs)
        entropy, kl = (x if x is None else layout.each_token(x) for x in (found.entropy, found.kl))
        if self.score_head is None or features is None:
            return JointOutput(log_probs, entropy, None, kl)
        selected = scale_gradient(features.flatten(0, 1)[layout.features], backbone_grad_scale)
        return JointOutput(log_probs, entropy, self.score_head(selected).float(), kl)

    def final_states(self, layout: TokenLayout) -> Tensor:
        """[U, c] final hidden states at `layout.predictors`.

        For callers alone, who make it a forward method of FSDP2's: it gathers weights and casts its result as `forward`
        does, which therefore must not go through it.
        """
        return _predictor_states(self.lm, layout)

    def gathered_lm_head(self) -> LMHead:
        """The LM head, while its weight is whole: during a forward pass, and after it until the root is resharded."""
        return LMHead.of(self.lm.lm_head, self.logits_dtype)


def _predictor_states(lm: PreTrainedModel, layout: TokenLayout) -> Tensor:
    hidden = lm.model(**layout.backbone_inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[layout.predictors]
