"""Tensor functions that keep [tokens, vocabulary] from ever being whole in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits held at once (512 MiB in float32): about 880 tokens of a 152k vocabulary.
LOGITS_PER_CHUNK = 2**27


def token_log_probs(
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `labels`, and the entropy of the distributions they come from, by chunks of tokens.

    Each chunk's logits are computed again in the backward pass, so the peak memory is one chunk's logits.

    Args:
        hidden: [..., c] final hidden states, each at the position before its label.
        lm_head: maps [n, c] to logits [n, vocab_size].
        labels: [...] token ids.
        vocab_size: width of the logits, which sets the tokens a chunk holds.
        temperature: divides the logits.
        compute_entropy: also return the entropies (nats).
        logits_per_chunk: how many logits may exist at once.
        fused: have torch.compile make one kernel of what follows the logits, which then never exist in float32.

    Returns:
        Log-probabilities [...] in float32 (float64 for float64 inputs), and entropies [...] or None.
    """
    tokens_per_chunk = max(1, logits_per_chunk // vocab_size)

    from_logits = _fused_chunk_log_probs if fused else _chunk_log_probs

    def run(hidden_chunk: Tensor, label_chunk: Tensor) -> tuple[Tensor, Tensor | None]:
        return from_logits(lm_head(hidden_chunk), label_chunk, temperature, compute_entropy)

    chunks = zip(hidden.flatten(0, -2).split(tokens_per_chunk), labels.flatten().split(tokens_per_chunk))
    if torch.is_grad_enabled():
        parts = [checkpoint(run, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in chunks]
    else:
        parts = [run(h, t) for h, t in chunks]
    log_probs, entropy = zip(*parts)
    return (
        torch.cat(log_probs).view(labels.shape),
        torch.cat(entropy).view(labels.shape) if compute_entropy else None,
    )


def _chunk_log_probs(
    logits: Tensor, labels: Tensor, temperature: float, compute_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_partition = logits.logsumexp(-1)
    log_probs = logits.gather(-1, labels[:, None]).squeeze(-1) - log_partition
    if not compute_entropy:
        return log_probs, None
    probs = (logits - log_partition[:, None]).exp()
    return log_probs, log_partition - (probs * logits).sum(-1)


_fused_chunk_log_probs = torch.compile(_chunk_log_probs, dynamic=True)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask`; values off the mask may be anything, inf and nan included."""
    return values.masked_fill(~mask.bool(), 0.0).sum()


def trim_padding(attention_mask: Tensor, response_length: int) -> tuple[int, int]:
    """Columns of padding common to all rows of a batch laid out as left-padded prompt and right-padded response.

    Args:
        attention_mask: [batch, prompt + response].
        response_length: columns of the response.

    Returns:
        `(left, right)`: how many columns can be cut off at either side. At least one column of the prompt and one of
        the response remain.
    """
    used = attention_mask.bool().any(0)
    prompt_length = len(used) - response_length
    left = int(used[: prompt_length - 1].long().cumsum(0).eq(0).sum())
    right = int(used[prompt_length + 1 :].flip(0).long().cumsum(0).eq(0).sum())
    return left, right
