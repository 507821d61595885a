"""The LM head's matrix products, summed in float32 where their operands have 16 bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from xbai.engine.float32_head import matrix_product


class LMHead(NamedTuple):
    """Hidden states to logits.

    Attributes:
        weight: [V, c] as it is multiplied.
        bias: [V], or None.
        dtype: of the logits. What a product of 16-bit numbers is rounded to when it leaves the matrix unit moves
            log-probabilities more than all layers before it: logits of about 20 are known to 0.06 in bfloat16.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype | None = None) -> LMHead:
        """The head of a causal LM, while its weight is whole; `dtype` None: logits as the weight is."""
        return cls(linear.weight, linear.bias, dtype or linear.weight.dtype)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] of final hidden states [n, c]."""
        product = matrix_product(hidden.to(self.weight.dtype), self.weight.T, self.dtype)
        return product if self.bias is None else product + self.bias


def add_weight_gradient(total: Tensor, logit_gradients: Tensor, hidden: Tensor) -> None:
    """Add a chunk's share to `total` [V, c], in its dtype, from the gradients [n, V] and [n, c] hidden states."""
    if total.dtype == hidden.dtype or total.device.type == "cpu":
        total += matrix_product(logit_gradients.T, hidden, total.dtype)
    else:
        # In the product's own kernel: a temporary one of 152k x 5,120 would take 3 GB, and three more passes over it.
        torch.addmm(total, logit_gradients.T, hidden, out_dtype=total.dtype, out=total)
