"""From final hidden states to log-probs, without [tokens, vocabulary] ever being whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xbai.engine.linear import matrix_product

# Logits held at once (512 MiB in float32): about 880 tokens of a 152k vocabulary. Compiled kernels keep no copies.
LOGITS_PER_CHUNK, LOGITS_PER_FUSED_CHUNK = 2**27, 2**28


class LMHead(NamedTuple):
    """Hidden states to logits: products that are summed in float32 where their operands have 16 bits.

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


class FinalStates:
    """What a model's distributions over the vocabulary follow from, at some tokens.

    No tuple: FSDP2 would cast a tuple's tensors on their way into a model.

    Attributes:
        hidden: [n, c] final hidden states.
        lm_head: maps rows of them to logits.
    """

    def __init__(self, hidden: Tensor, lm_head: LMHead) -> None:
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
    lm_head: LMHead,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    reference: FinalStates | None = None,
    logits_per_chunk: int | None = None,
    fused: bool = False,
) -> TokenLogProbs:
    """Log-probabilities of `labels`, and entropies and KL of the distributions they come from, by chunks of tokens.

    Each chunk's logits are computed again in the backward pass, so the peak memory is one chunk's logits, and of an LM
    head in 16 bits its weight's gradient in float32, in which the chunks are added up.

    Args:
        hidden: [..., c] final hidden states, each at the position before its label.
        lm_head: of the model.
        labels: [...] token ids.
        temperature: divides the logits.
        compute_entropy: also return the entropies.
        reference: of another model at the same tokens, which gets no gradient: also return the KL to it.
        logits_per_chunk: how many logits may exist at once; None: `LOGITS_PER_CHUNK`, or `LOGITS_PER_FUSED_CHUNK`.
        fused: have torch.compile make one kernel of what follows the logits.
    """
    if logits_per_chunk is None:
        logits_per_chunk = LOGITS_PER_FUSED_CHUNK if fused else LOGITS_PER_CHUNK
    logits_per_token = lm_head.vocab_size * (1 if reference is None else 2)
    chunks = _Chunks(
        max(1, logits_per_chunk // logits_per_token), lm_head.dtype, temperature, compute_entropy, reference, fused
    )
    rows = hidden.flatten(0, -2)
    log_probs, *others = _ChunkedLogProbs.apply(rows, lm_head.weight, lm_head.bias, labels.flatten(), chunks)
    entropy, kl = (None if column is None else column.view(labels.shape) for column in others)
    return TokenLogProbs(log_probs.view(labels.shape), entropy, kl)


@dataclass(frozen=True)
class _Chunks:
    """How logits are made, some tokens at a time, and what follows from them."""

    tokens: int
    logits_dtype: torch.dtype
    temperature: float
    compute_entropy: bool
    reference: FinalStates | None
    fused: bool

    def slices(self, count: int) -> Iterator[slice]:
        """Of `count` tokens; one, empty, where there are none: its gradients are zeros, not missing."""
        return (slice(start, start + self.tokens) for start in range(0, max(1, count), self.tokens))

    def log_probs(self, make_logits: Callable[[], Tensor], labels: Tensor, chunk: slice) -> tuple[Tensor | None, ...]:
        """Of a chunk's tokens the fields of `TokenLogProbs`. Nothing here holds on to its logits."""
        with torch.no_grad():
            reference = self.reference
            other_logits = None if reference is None else reference.lm_head.logits(reference.hidden[chunk])
        labels = labels[chunk]
        # For no row and for a single one torch.compile would make other kernels than for several.
        from_logits = _fused_chunk_log_probs() if self.fused and len(labels) > 1 else _chunk_log_probs
        return from_logits(make_logits(), labels, self.temperature, self.compute_entropy, other_logits)


class _ChunkedLogProbs(torch.autograd.Function):
    """A function of its own, so that the chunks' gradients of the LM head are added up in float32.

    Autograd would add them in the weight's dtype: of a bfloat16 sum over dozens of chunks the last bits are lost.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunks: _Chunks
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.chunks = chunks
        ctx.set_materialize_grads(False)
        lm_head = LMHead(weight, bias, chunks.logits_dtype)
        parts = [
            chunks.log_probs(partial(lm_head.logits, hidden[chunk]), labels, chunk)
            for chunk in chunks.slices(len(hidden))
        ]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        wide = torch.promote_types(weight.dtype, torch.float32)
        dtypes = (hidden.dtype, wide, wide)
        sums = [
            torch.zeros_like(tensor, dtype=dtype) if needed else None
            for tensor, dtype, needed in zip((hidden, weight, bias), dtypes, ctx.needs_input_grad[:3], strict=True)
        ]
        lm_head = LMHead(weight, bias, ctx.chunks.logits_dtype)
        for chunk in ctx.chunks.slices(len(hidden)):
            # Unnamed, so that they are gone before the next ones are made.
            _add_gradients(
                sums, _logit_gradients(ctx.chunks, lm_head, hidden, labels, chunk, gradients), hidden, weight, chunk
            )
        # Autograd casts to the inputs' dtypes: the one rounding of the sums.
        return *sums, None, None


def _add_gradients(sums: list[Tensor | None], of_logits: Tensor, hidden: Tensor, weight: Tensor, chunk: slice) -> None:
    """From the gradients [n, V] of a chunk's logits to those of hidden states, weight and bias; None: not wanted."""
    of_hidden, of_weight, of_bias = sums
    if of_bias is not None:
        of_bias += of_logits.sum(0, dtype=of_bias.dtype)
    of_logits = of_logits.to(weight.dtype)
    if of_hidden is not None:
        of_hidden[chunk] = of_logits @ weight
    if of_weight is not None:
        _add_weight_gradient(of_weight, of_logits, hidden[chunk].to(weight.dtype))


def _add_weight_gradient(total: Tensor, logit_gradients: Tensor, hidden: Tensor) -> None:
    """Add a chunk's share to `total` [V, c], in its dtype, from the gradients [n, V] and [n, c] hidden states."""
    if total.dtype == hidden.dtype or total.device.type == "cpu":
        total += matrix_product(logit_gradients.T, hidden, total.dtype)
    else:
        # In the product's own kernel: a temporary one of 152k x 5,120 would take 3 GB, and three more passes over it.
        torch.addmm(total, logit_gradients.T, hidden, out_dtype=total.dtype, out=total)


def _logit_gradients(
    chunks: _Chunks, lm_head: LMHead, hidden: Tensor, labels: Tensor, chunk: slice, gradients: tuple[Tensor | None, ...]
) -> Tensor:
    """[n, V] for the tokens of a chunk, whose logits are computed once more."""
    logits = lm_head.logits(hidden[chunk]).requires_grad_()
    with torch.enable_grad():
        outputs = chunks.log_probs(lambda: logits, labels, chunk)
    wanted = [
        (output, gradient[chunk])
        for output, gradient in zip(outputs, gradients, strict=True)
        if output is not None and gradient is not None
    ]
    return torch.autograd.grad([output for output, _ in wanted], logits, [gradient for _, gradient in wanted])[0]


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
