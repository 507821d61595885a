"""vLLM's sampler with what else an engine wants of each token; to be imported on demand, like vLLM."""

from __future__ import annotations

from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.worker_base import WorkerBase

from xbai.engine.fused_scores import LOG_PROB
from xbai.engine.seeded_draw import draw_tokens
from xbai.engine.vllm.fused_models import FusedScores
from xbai.engine.vllm.rows import BatchRows


class EngineSampler(Sampler):
    """Returns step logits, log-probs of logits / temperature, and the same tokens on all ranks of an engine.

    vLLM offers log-probs of the raw logits or of the logits after temperature *and* penalties, top-k and top-p; what
    an actor recomputes (and what importance ratios need) lies between the two.

    Of a `model` that is none of `FusedScores` all step logits are 0.
    """

    def __init__(self, model: nn.Module, use_fp64_gumbel: bool, rows: BatchRows) -> None:
        super().__init__("raw_logprobs", use_fp64_gumbel)
        self._rows = rows
        self.topk_topp_sampler = SeededSampler(self.topk_topp_sampler, rows)  # type: ignore[assignment]
        # Not as a submodule of this one, and not kept alive: vLLM drops the model on shutdown, but not its sampler.
        self._step_logits = WeakMethod(model.step_logits) if isinstance(model, FusedScores) else None

    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> Any:
        """Sample; see the class for what comes with the tokens."""
        self._metadata = sampling_metadata
        return super().forward(logits, sampling_metadata, *args, **kwargs)

    def compute_logprobs(self, logits: Tensor) -> Tensor:  # type: ignore[override]  # theirs is static
        """Log-probs [rows, vocab] in float32, where a request wants its own; at temperature 0 of the logits as is."""
        if (self._metadata.max_num_logprobs or 0) < LOG_PROB:
            return logits
        if (temperature := self._metadata.temperature) is not None:
            logits = logits.float() / torch.where(temperature < 1e-5, 1.0, temperature)[:, None]
        return logits.log_softmax(-1, dtype=torch.float32)

    def gather_logprobs(  # type: ignore[override]  # theirs is static
        self, logprobs: Tensor, num_logprobs: int, token_ids: Tensor
    ) -> LogprobsTensors:
        """The columns of the sampled tokens [rows], where a request wants any."""
        step_logits = self._step_logits() if self._step_logits else None
        columns = [step_logits() if step_logits else torch.zeros_like(logprobs[:, 0])]
        if num_logprobs >= LOG_PROB:
            columns.append(logprobs.gather(1, token_ids[:, None])[:, 0])
        values = torch.stack(columns, dim=1)
        # Nobody reads the ids of columns, nor the ranks of tokens, which would cost a pass over the logits.
        return LogprobsTensors(token_ids[:, None], values, token_ids)

    def sample(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Sampled token ids [rows]; ranks must not part ways over a rounding error or a random stream of their own."""
        sampled, log_probs = super().sample(*args, **kwargs)
        sampled = get_tp_group().broadcast(sampled)
        self._rows.append(sampled)
        return sampled, log_probs


class SeededSampler(nn.Module):
    """vLLM's choice among the tokens that top-k and top-p leave, but of batches with seeds, which draw by these."""

    def __init__(self, unseeded: TopKTopPSampler, rows: BatchRows) -> None:
        super().__init__()
        self._unseeded = unseeded
        self._rows = rows

    def forward(
        self, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids [rows] from logits [rows, vocab], and no log-probs."""
        if (uniforms := self._rows.uniforms()) is None:
            return self._unseeded(logits, generators, k, p)
        return draw_tokens(apply_top_k_top_p(logits, k, p), uniforms), None


class ColumnReader(LogprobsProcessor):
    """Gathers what `EngineSampler` returned for a request: `logprobs` has its columns, one token after the other.

    vLLM's own makes an entry with text and rank of each column, which takes longer than to sample a token of a small
    model.

    Args:
        columns: how many the request wants, of those that the widest request of a step makes the sampler return.
    """

    def __init__(self, columns: int) -> None:
        self._values: Any = []
        super().__init__(
            tokenizer=None,
            logprobs=self._values,
            prompt_logprobs=None,
            cumulative_logprob=None,
            num_logprobs=None,
            num_prompt_logprobs=None,
        )
        self._columns = columns

    def update_from_output(self, output: EngineCoreOutput) -> None:
        """Add the columns of the tokens that a step gave."""
        if output.new_logprobs is not None:
            self._values += output.new_logprobs.logprobs[:, : self._columns].ravel().tolist()


def use_engine_sampler(worker: WorkerBase) -> None:
    """Give a worker this sampler."""
    runner: Any = worker.model_runner
    rows = BatchRows(runner)
    # Not by vLLM's option, which would make it bring all output tokens to the host before each step.
    runner.input_batch.logitsprocs.non_argmax_invariant.append(rows)
    runner.sampler = EngineSampler(runner.get_model(), runner.sampler.use_fp64_gumbel, rows)
