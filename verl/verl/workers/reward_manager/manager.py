"""Reward managers: they grade the responses of a batch and place the reward on each one's last token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto
from verl.trainer.config.schema import PPOConfig
from verl.workers.reward_manager.reward import PendingReward, Reward, make_reward
from xbai.engine.detokenizer import Detokenizer
from xbai.errors import UserError
from xbai.grading import CustomBatchGrader, CustomGrader, Grade, GradeRequest, GraderPool, grade
from xbai.grading.dispatch import Grader
from xbai.grading.pool import GIBIBYTE

Purpose = Literal["training", "validation", "baselines"]
"""What a batch is graded for."""


class NaiveRewardManager:
    """Grades one response after another, in one process.

    Args:
        tokenizer: decodes responses.
        config: the trainer's whole configuration; reads `custom_reward_function`, `reward_model`,
            `data.{reward_fn_key,max_response_length}`, `trainer.{length_penalty,length_penalty_coeff}`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PPOConfig) -> None:
        self._detokenize, self._config, self._section = Detokenizer(tokenizer), config, config.reward_model
        self._ungraded_batches: Counter[Purpose] = Counter()
        memory = int(self._section.memory_gib * GIBIBYTE)
        self._pool = GraderPool(self._workers(), self._timeout_s(), self._grader(), memory)

    def launch(self, data: DataProto, purpose: Purpose, grades: list[Grade] | None = None) -> PendingReward:
        """Start grading; reads `responses` and `response_mask` [B, R], the prompt's `uid`, the data source,
        `reward_model` and, where there are, `extra_info` and `raw_prompt`, which a function of one's own finds in its
        `extra_info`. `grades` that are known are not asked for again."""
        mask, prompts = data.batch["response_mask"], data.non_tensor_batch["uid"]

        def finish(found: list[Grade]) -> Reward:
            self._check_any_graded(found, purpose)
            return make_reward(found, mask, partial(self.penalty, prompts=prompts))

        if grades is None:
            return PendingReward(self._submit(self._requests(data)), finish)
        known: Future[list[Grade]] = Future()
        known.set_result(grades)
        return PendingReward([known], finish)

    def penalty(self, lengths: Tensor, correct: Tensor, prompts: np.ndarray) -> Tensor:
        """[B] what to subtract from each reward, by the response's length in tokens [B], whether it is right [B], and
        its prompt's name [B]: 0 without `trainer.length_penalty`."""
        trainer = self._config.trainer
        if not trainer.length_penalty:
            return torch.zeros(len(lengths))
        return -trainer.length_penalty_coeff * length_reward(lengths, correct, prompts)

    def close(self) -> None:
        """End the grading processes, at once: what is under way is of a run that fails."""
        self._pool.kill()

    def _workers(self) -> int | None:
        """Grading processes; None for as many as the machine has cores."""
        return 1

    def _timeout_s(self) -> float:
        return self._section.timeout_s

    def _grader(self) -> Grader | CustomBatchGrader:
        custom = self._config.custom_reward_function
        return grade if custom.path is None else CustomGrader(custom.path, custom.name)

    def _submit(self, requests: Sequence[GradeRequest]) -> Sequence[Future[Grade] | Future[list[Grade]]]:
        return [self._pool.submit(request) for request in requests]

    def _check_any_graded(self, grades: Sequence[Grade], purpose: Purpose) -> None:
        """One batch without grades may be bad luck; when nothing is ever graded the run trains on nothing."""
        if any(grade.value is not None for grade in grades):
            self._ungraded_batches[purpose] = 0
            return
        self._ungraded_batches[purpose] += 1
        limit = self._section.max_ungraded_batches
        if limit is not None and self._ungraded_batches[purpose] >= limit:
            reason, count = Counter(g.failure for g in grades).most_common(1)[0]
            detail = next(g.detail for g in grades if g.failure == reason)
            raise UserError(
                f"no response of the last {limit} batches of {purpose} could be graded (last: {count} of {len(grades)} "
                f"{reason}, {detail}); correct the reward function, or raise reward_model.max_ungraded_batches"
            )

    def _requests(self, data: DataProto) -> list[GradeRequest]:
        columns, mask = data.non_tensor_batch, data.batch["response_mask"].bool()
        sources, truths = columns[self._config.data.reward_fn_key], columns["reward_model"]
        extra: Sequence[dict[str, Any] | None] | np.ndarray = columns.get("extra_info", [None] * len(data))
        if "raw_prompt" in columns:
            extra = [
                {**(info or {}), "raw_prompt": messages}
                for info, messages in zip(extra, columns["raw_prompt"], strict=True)
            ]
        texts = [self._detokenize(ids[kept].tolist()) for ids, kept in zip(data.batch["responses"], mask, strict=True)]
        return [
            GradeRequest(source, text, truth.get("ground_truth"), info)
            for source, text, truth, info in zip(sources, texts, truths, extra, strict=True)
        ]


class PrimeRewardManager(NaiveRewardManager):
    """Grades in parallel."""

    def _workers(self) -> int | None:
        return self._section.num_workers


class BatchRewardManager(NaiveRewardManager):
    """Hands all responses of a batch to one call of `custom_reward_function`, in one process.

    The call has `reward_model.batch_timeout_s`; where it hangs, dies or raises, no response of the batch has a grade,
    so the step learns nothing from it. For a single response that it cannot grade the function returns None.
    """

    def _timeout_s(self) -> float:
        return self._section.batch_timeout_s

    def _grader(self) -> Grader | CustomBatchGrader:
        custom = self._config.custom_reward_function
        if custom.path is None:
            raise ValueError("reward_model.reward_manager=batch needs custom_reward_function.path")
        return CustomBatchGrader(custom.path, custom.name)

    def _submit(self, requests: Sequence[GradeRequest]) -> Sequence[Future[list[Grade]]]:
        return [self._pool.submit_batch(requests)]


class DAPORewardManager(PrimeRewardManager):
    """Grades in parallel and punishes responses that come close to the length limit (DAPO, arXiv 2503.14476, eq. 13).

    The penalty grows linearly from 0 to `penalty_factor` over the last `reward_model.overlong_buffer.len` tokens before
    `data.max_response_length`.
    """

    def penalty(self, lengths: Tensor, correct: Tensor, prompts: np.ndarray) -> Tensor:
        """[B] the length penalty, and the one for coming close to the limit."""
        buffer = self._section.overlong_buffer
        excess = lengths - (self._config.data.max_response_length - buffer.len)
        return super().penalty(lengths, correct, prompts) + buffer.penalty_factor * (excess / buffer.len).clamp(0, 1)


REWARD_MANAGERS: dict[str, type[NaiveRewardManager]] = {
    "naive": NaiveRewardManager,
    "prime": PrimeRewardManager,
    "dapo": DAPORewardManager,
    "batch": BatchRewardManager,
}


def length_reward(lengths: Tensor, correct: Tensor, prompts: np.ndarray) -> Tensor:
    """[B] between -0.5 and 0.5: how short a response is among those to its prompt (Kimi k1.5, arXiv 2501.12599).

    A response as short as the shortest to its prompt gets 0.5, one as long as the longest -0.5, and the others in
    proportion; wrong ones no more than 0. All get 0 where their lengths are equal.

    Args:
        lengths: [B] tokens.
        correct: [B] 1 for a right response, 0 for a wrong one.
        prompts: [B] names of the prompts.
    """
    names, rows = np.unique(prompts, return_inverse=True)
    group, lengths = torch.from_numpy(rows), lengths.float()
    shortest, longest = (
        torch.zeros(len(names)).scatter_reduce(0, group, lengths, how, include_self=False)[group]
        for how in ("amin", "amax")
    )
    spread = longest - shortest
    value = torch.where(spread > 0, 0.5 - (lengths - shortest) / spread.clamp(min=1), 0.0)
    return torch.where(correct > 0, value, value.clamp(max=0.0))
