"""A score head that learns on standardised features, and is saved as one for features as they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xbai.sprm import ScoreHead, SPRMConfig
from xbai.sprm.standardize import FeatureMoments, standardize_head


class StandardizedHead(nn.Module):
    """The published head behind a fixed affine map of its features, which `folded` makes part of its first layer.

    A few coordinates of a language model's hidden states are hundreds of times as large as all others. They do not only
    decide what a fresh head thinks: along them a step of the optimiser changes the logits hundreds of times as much.

    Args:
        hidden_size: c.
        config: the head's form.
    """

    def __init__(self, hidden_size: int, config: SPRMConfig) -> None:
        super().__init__()
        self.head = ScoreHead(hidden_size, config.dropout)
        self._config = config
        self._moments: FeatureMoments | None = None
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("deviation", torch.ones(hidden_size))

    @torch.no_grad()
    def standardize(self, features: Iterable[Tensor]) -> None:
        """Take mean and deviation from features [K, c] that come in parts."""
        moments = FeatureMoments(self.head.hidden_size)
        for part in features:
            moments.add(self._normalized(part))
        self._moments = moments
        self.mean.copy_(moments.mean)
        self.deviation.copy_(moments.deviation)

    def forward(self, features: Tensor) -> Tensor:
        """Features [..., c] to step logits [...]."""
        return self.head((self._normalized(features) - self.mean) / self.deviation)

    @torch.no_grad()
    def folded(self) -> ScoreHead:
        """The head alone, which gives the same logits, in evaluation mode on the CPU."""
        head = ScoreHead(self.head.hidden_size, self._config.dropout, self._config.normalize_features)
        head.load_state_dict(self.head.state_dict())
        if self._moments is not None:
            standardize_head(head, self._moments)
        return head.eval()

    def _normalized(self, features: Tensor) -> Tensor:
        if not self._config.normalize_features:
            return features
        return F.rms_norm(features, (self.head.hidden_size,), eps=1e-6)
