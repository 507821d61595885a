"""What vLLM's sampler must know of the rows of its batch and vLLM tells it only slowly; to be imported on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm._custom_ops import apply_repetition_penalties
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from xbai.engine.seeded_draw import rows_at_once, uniforms

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


@dataclass
class _Row:
    """A request in the batch; `output_ids` is vLLM's own list, which grows with each token (async: by -1)."""

    penalty: float
    seed: int | None
    output_ids: list[int]


class BatchRows(LogitsProcessor):
    """Repetition penalties and random numbers of the rows of a batch, whose requests come, move and go.

    vLLM's own penalties copy all output tokens from Python lists at each step, and wait for those of the step before;
    its seeds launch a kernel a row. So vLLM hears of neither: they are among a request's `extra_args`.

    Here the tokens that a row has seen are marked on the device: once from lists when a request enters the batch (new,
    or resumed with what it had), then by the tokens that the sampler has just chosen. No later step needs their values
    on the host, so asynchronous scheduling may leave placeholders there; the runner's mask tells of rows whose token
    is dropped, because their prompt goes on. The position in a row's random stream is the length of its output.

    Args:
        runner: whose batch it is; the process is to be among its logits processors before the first request.
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        self._device = runner.device
        self._shape = (runner.max_num_reqs, runner.input_batch.vocab_size)
        self._discarded = runner.discard_request_mask
        self._rows: dict[int, _Row] = {}
        self._seen: Tensor | None = None
        self._penalties: Tensor | None = None
        self._seeds = np.empty(0, np.uint64)
        self._seedless: list[int] = []

    def is_argmax_invariant(self) -> bool:
        """A penalty changes which token is the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows, before a step."""
        if batch_update is None:
            return
        for row, params, prompt_ids, output_ids in batch_update.added:
            options = params.extra_args or {}
            self._rows[row] = _Row(options.get("repetition_penalty", 1.0), options.get("seed"), output_ids)
            if self._rows[row].penalty != 1:
                self._mark(row, [*(prompt_ids or ()), *output_ids])
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for source, target, direction in batch_update.moved:
            self._move(source, target, swap=direction is MoveDirectionality.SWAP)
        rows = [self._rows[row] for row in range(batch_update.batch_size)]
        penalties = [row.penalty for row in rows]
        penalized = any(penalty != 1 for penalty in penalties)
        self._penalties = async_tensor_h2d(penalties, self._device, torch.float32) if penalized else None
        self._seeds = np.array([row.seed or 0 for row in rows], np.uint64)
        self._seedless = [index for index, row in enumerate(rows) if row.seed is None]

    def apply(self, logits: Tensor) -> Tensor:
        """Penalize in place; logits [rows, vocab] float32."""
        if self._penalties is not None and self._seen is not None:
            rows = rows_at_once(logits)
            tensors = (logits, self._seen[: len(logits)], self._penalties)
            for part, seen, penalties in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
                apply_repetition_penalties(part, seen, seen, penalties)
        return logits

    def uniforms(self) -> Tensor | None:
        """The random number [rows] of each row's next token, float64 in [0, 1); None if no row has a seed."""
        if len(self._seedless) == len(self._seeds):
            return None
        lengths = [len(self._rows[row].output_ids) for row in range(len(self._seeds))]
        numbers = uniforms(self._seeds, np.array(lengths, np.uint64))
        numbers[self._seedless] = torch.rand(len(self._seedless), dtype=numbers.dtype)
        return async_tensor_h2d(numbers, self._device)

    def append(self, tokens: Tensor) -> None:
        """Mark the sampled tokens [rows], save those of rows whose prompt goes on in the next step."""
        if self._penalties is None or self._seen is None:
            return
        seen, column = self._seen[: len(tokens)], tokens.long()[:, None]
        kept = ~self._discarded.gpu[: len(tokens), None]
        seen.scatter_(1, column, seen.gather(1, column) | kept)

    def _mark(self, row: int, token_ids: list[int]) -> None:
        if self._seen is None:
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        ids = async_tensor_h2d(token_ids, self._device, torch.long)
        self._seen[row].zero_().index_fill_(0, ids, True)

    def _move(self, source: int, target: int, swap: bool) -> None:
        rows, seen = self._rows, self._seen
        moved = rows.pop(source)
        if swap:
            rows[source] = rows[target]
        rows[target] = moved
        if seen is None:
            return
        if not swap:
            seen[target] = seen[source]
            return
        before = seen[target].clone()
        seen[target] = seen[source]
        seen[source] = before
