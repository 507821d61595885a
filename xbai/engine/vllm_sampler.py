"""vLLM's sampler with the log-probs that a trainer needs; to be imported on demand, like vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.worker_base import WorkerBase


class TemperedLogProbSampler(Sampler):
    """Returns log-probs of logits / temperature, and the same tokens on all ranks of a tensor-parallel group.

    vLLM offers log-probs of the raw logits or of the logits after temperature *and* penalties, top-k and top-p; what
    an actor recomputes (and what importance ratios need) lies between the two.
    """

    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> Any:
        """Remember the temperatures for `compute_logprobs`."""
        self._temperature = sampling_metadata.temperature
        return super().forward(logits, sampling_metadata, *args, **kwargs)

    def compute_logprobs(self, logits: Tensor) -> Tensor:
        """Log-probs [rows, vocab] in float32; at temperature 0 those of the logits as they are."""
        if self._temperature is not None:
            greedy = self._temperature < 1e-5
            logits = logits.float() / torch.where(greedy, 1.0, self._temperature)[:, None]
        return logits.log_softmax(-1, dtype=torch.float32)

    def sample(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Sampled token ids [rows]; ranks must not part ways over a rounding error or a random stream of their own."""
        sampled, log_probs = super().sample(*args, **kwargs)
        return get_tp_group().broadcast(sampled), log_probs


def use_tempered_log_probs(worker: WorkerBase) -> None:
    """Give a worker this sampler."""
    runner = worker.model_runner
    runner.sampler = TemperedLogProbSampler("raw_logprobs", runner.sampler.use_fp64_gumbel)
