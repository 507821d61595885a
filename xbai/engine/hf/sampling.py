"""Choosing the next token of each row of a batch from its logits."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from torch import Tensor

from xbai.engine.sample import Sample
from xbai.engine.seeded_draw import draw_tokens, uniforms

# As in vLLM: colder ones would overflow.
MIN_TEMPERATURE = 0.01


class BatchSampler:
    """Per-row temperature, top-k, top-p and repetition penalty; each row, a sample's, on its own random stream."""

    def __init__(self, samples: list[Sample], vocab_size: int, device: torch.device) -> None:
        params = [sample.params for sample in samples]
        self._temperature = torch.tensor([p.temperature for p in params], device=device)[:, None]
        self._top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
        self._top_k = torch.tensor([p.top_k if p.top_k > 0 else vocab_size for p in params], device=device)[:, None]
        self._penalty = torch.tensor([p.repetition_penalty for p in params], device=device)[:, None]
        self._seen = torch.zeros(len(samples), vocab_size, dtype=torch.bool, device=device)
        for row, sample in enumerate(samples):
            self._seen[row, torch.tensor(sample.prompt_ids, device=device)] = True
        seeds = [secrets.randbits(63) if sample.seed is None else sample.seed for sample in samples]
        self._seeds = np.array(seeds, np.uint64)
        # Rows start together.
        self._position = 0

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [rows, vocab] to the next tokens [rows] and their log-probs [rows] under logits / temperature."""
        logits = logits.float()
        greedy = self._temperature == 0
        temperature = torch.where(greedy, 1.0, self._temperature.clamp(min=MIN_TEMPERATURE))
        log_probs = (logits / temperature).log_softmax(-1)
        logits = self._penalize(logits)
        numbers = uniforms(self._seeds, np.full_like(self._seeds, self._position)).to(logits.device)
        sampled = draw_tokens(self._filter(logits / temperature), numbers)[:, None]
        tokens = torch.where(greedy, logits.argmax(-1, keepdim=True), sampled)
        self._seen.scatter_(1, tokens, True)
        self._position += 1
        return tokens[:, 0], log_probs.gather(1, tokens)[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        for name in ("_temperature", "_top_p", "_top_k", "_penalty", "_seen"):
            setattr(self, name, getattr(self, name)[rows])
        self._seeds = self._seeds[rows.cpu().numpy()]

    def _penalize(self, logits: Tensor) -> Tensor:
        penalized = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
        return torch.where(self._seen, penalized, logits)

    def _filter(self, logits: Tensor) -> Tensor:
        vocab_size = logits.shape[-1]
        if bool((self._top_p >= 1).all()) and bool((self._top_k >= vocab_size).all()):
            return logits
        ordered, order = logits.sort(-1, descending=True)
        ordered = ordered.masked_fill(torch.arange(vocab_size, device=logits.device) >= self._top_k, float("-inf"))
        probs = ordered.softmax(-1)
        # The likeliest token stays, even where a tiny top_p is 0 in float32.
        beyond = probs.cumsum(-1) - probs >= self._top_p
        beyond[:, 0] = False
        ordered = ordered.masked_fill(beyond, float("-inf"))
        return torch.full_like(logits, float("-inf")).scatter_(1, order, ordered)
