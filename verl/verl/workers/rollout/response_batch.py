"""The columns of a batch of responses, of what an engine gave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from verl.protocol import DataProto


def response_batch(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    token_ids: Sequence[Sequence[int] | np.ndarray],
    log_probs: Sequence[Sequence[float] | np.ndarray],
    response_length: int,
    pad_token_id: int,
) -> DataProto:
    """Pad responses on the right, and put them behind their prompts.

    Args:
        prompt_ids, prompt_mask: [B, P], padded on the left.
        token_ids, log_probs: of n responses a prompt, those of one prompt next to each other, of up to R tokens.
        response_length: R.

    Returns:
        `prompts` [B*n, P], `responses` [B*n, R], `input_ids attention_mask position_ids` [B*n, P+R], `response_mask`
        [B*n, R], and `rollout_log_probs` [B*n, R] in float32, 0 on padding.
    """
    n = len(token_ids) // len(prompt_ids)
    response_mask = torch.arange(response_length) < torch.tensor([len(ids) for ids in token_ids])[:, None]
    responses = padded(token_ids, response_mask, np.int64, pad_token_id)
    prompts = prompt_ids.repeat_interleave(n, dim=0)
    attention_mask = torch.cat([prompt_mask.repeat_interleave(n, dim=0), response_mask.to(prompt_mask.dtype)], dim=1)
    return DataProto.from_dict(
        {
            "prompts": prompts,
            "responses": responses,
            "input_ids": torch.cat([prompts, responses], dim=1),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
            "response_mask": response_mask,
            "rollout_log_probs": padded(log_probs, response_mask, np.float32, 0.0),
        }
    )


def padded(rows: Sequence[Sequence[float] | np.ndarray], mask: Tensor, dtype: type, fill: float) -> Tensor:
    """Ragged rows as a tensor of the shape of `mask`, which is true where they are, and `fill` elsewhere."""
    values = torch.from_numpy(np.concatenate([np.asarray(row, dtype) for row in rows]))
    return torch.full(mask.shape, fill, dtype=values.dtype).masked_scatter_(mask, values)
