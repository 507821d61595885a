"""Log-probs of the tokens, and their gradients, by the trainer's LM head in bfloat16 against float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from verl.bringup.step import Context, require, step
from verl.models.lm_head import LMHead
from verl.models.log_probs import token_log_probs

LOG_PROB_ERROR, GRADIENT_ERROR = 1e-3, 0.006


@step(
    means="The LM head's products of bfloat16 numbers, which are summed and kept in float32 (torch.mm and torch.addmm "
    "with out_dtype), are wrong or not there: every training step depends on them. See verl/models/lm_head.py; "
    "model.head_dtype=model does without the first of them.",
    quick=True,
)
def lm_head(context: Context) -> str:
    """The LM head of 1.5B on tokens of both signs of advantage, in chunks the last of which is shorter."""
    vocabulary, width, tokens = (151_936, 1536, 2000) if context.on_gpu else (5000, 64, 200)
    generator = torch.Generator(context.device).manual_seed(0)
    linear = nn.Linear(width, vocabulary, bias=False, device=context.device, dtype=torch.bfloat16)
    hidden = torch.randn(tokens, width, generator=generator, device=context.device).bfloat16()
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=context.device)
    advantages = torch.randn(tokens, generator=generator, device=context.device)

    def results(head: nn.Linear, hidden: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden.requires_grad_()
        lm_head = LMHead.of(head, torch.float32)
        log_probs = token_log_probs(hidden, lm_head, labels, logits_per_chunk=chunk * vocabulary).log_probs
        of_hidden, of_weight = torch.autograd.grad((log_probs * advantages).sum(), (hidden, head.weight))
        return log_probs.detach(), of_hidden, of_weight

    found = results(linear, hidden, chunk=tokens // 3)
    wanted = results(linear.float(), hidden.detach().float(), chunk=tokens)
    off = float((found[0] - wanted[0]).abs().max())
    require(off < LOG_PROB_ERROR, f"log-probs are up to {off:.3g} off; at most {LOG_PROB_ERROR}")
    errors = [
        float((one.float() - other).norm() / other.norm()) for one, other in zip(found[1:], wanted[1:], strict=True)
    ]
    require(max(errors) < GRADIENT_ERROR, f"gradients are {max(errors):.3g} off; at most {GRADIENT_ERROR}")
    return f"log-probs within {off:.2g} of float32, gradients within {max(errors):.2%}"
