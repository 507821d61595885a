"""Tensor functions that keep [tokens, vocabulary] from ever being whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits held at once (512 MiB in float32): about 880 tokens of a 152k vocabulary.
LOGITS_PER_CHUNK = 2**27


class FinalStates:
    """What a model's distributions over the vocabulary follow from, at some tokens.

    No tuple: FSDP2 would cast a tuple's tensors on their way into a model.

    Attributes:
        hidden: [n, c] final hidden states.
        lm_head: maps rows of them to logits.
    """

    def __init__(self, hidden: Tensor, lm_head: Callable[[Tensor], Tensor]) -> None:
        self.hidden = hidden
        self.lm_head = lm_head


class TokenLogProbs(NamedTuple):
    """Of each token, in float32 (float64 for float64 inputs) and in the shape of the labels."""

    log_probs: Tensor
    """Log-probability of the label."""
    entropy: Tensor | None
    """Entropy of the distribution, in nats."""
    kl: Tensor | None
    """KL from the distribution to the reference's, summed over the vocabulary, in nats."""


def token_log_probs(
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    reference: FinalStates | None = None,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
    fused: bool = False,
) -> TokenLogProbs:
    """Log-probabilities of `labels`, and entropies and KL of the distributions they come from, by chunks of tokens.

    Each chunk's logits are computed again in the backward pass, so the peak memory is one chunk's logits.

    Args:
        hidden: [..., c] final hidden states, each at the position before its label.
        lm_head: maps [n, c] to logits [n, vocab_size].
        labels: [...] token ids.
        vocab_size: width of the logits, which sets the tokens a chunk holds.
        temperature: divides the logits.
        compute_entropy: also return the entropies.
        reference: of another model at the same tokens, which gets no gradient: also return the KL to it.
        logits_per_chunk: how many logits may exist at once.
        fused: have torch.compile make one kernel of what follows the logits, which then never exist in float32.
    """
    logits_per_token = vocab_size if reference is None else 2 * vocab_size
    tokens_per_chunk = max(1, logits_per_chunk // logits_per_token)
    from_logits = _fused_chunk_log_probs() if fused else _chunk_log_probs

    def run(hidden_chunk: Tensor, label_chunk: Tensor, reference_chunk: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            reference_logits = None if reference is None else reference.lm_head(reference_chunk)
        return from_logits(lm_head(hidden_chunk), label_chunk, temperature, compute_entropy, reference_logits)

    chunks = zip(
        hidden.flatten(0, -2).split(tokens_per_chunk),
        labels.flatten().split(tokens_per_chunk),
        repeat(None) if reference is None else reference.hidden.split(tokens_per_chunk),
    )
    if torch.is_grad_enabled():
        parts = [checkpoint(run, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        parts = [run(*chunk) for chunk in chunks]
    columns = (None if column[0] is None else torch.cat(column).view(labels.shape) for column in zip(*parts))
    return TokenLogProbs(*columns)


def _chunk_log_probs(
    logits: Tensor, labels: Tensor, temperature: float, compute_entropy: bool, reference_logits: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_partition = logits.logsumexp(-1)
    log_probs = logits.gather(-1, labels[:, None]).squeeze(-1) - log_partition
    if not compute_entropy and reference_logits is None:
        return log_probs, None, None
    probs = (logits - log_partition[:, None]).exp()
    entropy = log_partition - (probs * logits).sum(-1)
    if reference_logits is None:
        return log_probs, entropy, None
    reference_log_softmax = (reference_logits.to(logits.dtype) / temperature).log_softmax(-1)
    kl = -entropy - (probs * reference_log_softmax).sum(-1)
    return log_probs, entropy if compute_entropy else None, kl


@cache
def _fused_chunk_log_probs() -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]:
    # Not at import: torch's compiler takes a second to load, in every process.
    return torch.compile(_chunk_log_probs, dynamic=True)


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
