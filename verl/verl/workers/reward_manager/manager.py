"""Reward managers: they grade the responses of a batch and place the reward on each one's last token."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto
from xbai.errors import UserError
from xbai.grading import CustomGrader, GradeRequest, GraderPool, grade

RIGHT_ABOVE = 0.5
"""A grade above this counts as a right answer: the label of the score head and of the pass rate."""


@dataclass(frozen=True)
class Reward:
    """What grading a batch of B responses gave."""

    reward_tensor: Tensor
    """[B, R] float32: the reward on the last response token, 0 elsewhere and for responses without a grade."""
    correct: Tensor
    """[B] float32: 1 for a right answer, 0 for a wrong one or none."""
    graded: Tensor
    """[B] bool: False where the grader timed out, crashed or raised."""
    reward_extra_info: dict[str, np.ndarray]
    """Per response: `grade` as the grader gave it (nan without one) and `penalty` subtracted from it."""


class PendingReward:
    """Grades that may still be under way."""

    def __init__(self, manager: RewardManager, response_mask: Tensor, futures: list[Future[float | None]]) -> None:
        self._manager, self._response_mask, self._futures = manager, response_mask, futures

    def result(self) -> Reward:
        """Wait for the grades.

        Raises:
            UserError: of a grader that cannot grade this data at all (unknown data source, bad custom function).
        """
        grades = [future.result() for future in self._futures]
        graded = torch.tensor([g is not None for g in grades])
        values = torch.tensor([0.0 if g is None else g for g in grades])
        lengths = self._response_mask.sum(-1)
        correct = (values > RIGHT_ABOVE).float()
        penalty = self._manager.penalty(lengths, correct).masked_fill(~graded, 0.0)
        reward_tensor = torch.zeros(self._response_mask.shape)
        reward_tensor[torch.arange(len(grades)), (lengths - 1).clamp(min=0)] = values - penalty
        extra = {"grade": values.masked_fill(~graded, torch.nan).numpy(), "penalty": penalty.numpy()}
        return Reward(reward_tensor, correct, graded, extra)


class RewardManager:
    """Grades every response on its own, in `workers` processes at once.

    Args:
        tokenizer: decodes responses.
        config: the trainer's whole configuration; reads `custom_reward_function`, `reward_model`,
            `data.{reward_fn_key,max_response_length}`, `trainer.{length_penalty,length_penalty_coeff}`.
        workers: grading processes; None for as many as the machine has cores.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DictConfig, workers: int | None) -> None:
        custom = config.custom_reward_function
        grader = grade if custom.path is None else CustomGrader(custom.path, custom.name)
        self._tokenizer, self._config = tokenizer, config
        self._pool = GraderPool(workers, config.reward_model.timeout_s, grader)

    def launch(self, data: DataProto) -> PendingReward:
        """Start grading; reads `responses` and `response_mask` [B, R], the data source and `reward_model`."""
        return PendingReward(
            self, data.batch["response_mask"], [self._pool.submit(request) for request in self._requests(data)]
        )

    def __call__(self, data: DataProto) -> Reward:
        """Grade and wait."""
        return self.launch(data).result()

    def penalty(self, lengths: Tensor, correct: Tensor) -> Tensor:
        """[B] what to subtract from each reward, by the response's length in tokens [B] and whether it is right [B].

        With `trainer.length_penalty`, right answers lose up to `length_penalty_coeff` in proportion to their length,
        so that of two right answers the shorter one is worth more, and no right one less than a wrong one.
        """
        trainer = self._config.trainer
        if not trainer.length_penalty:
            return torch.zeros(len(lengths))
        return trainer.length_penalty_coeff * correct * lengths / self._config.data.max_response_length

    def close(self) -> None:
        """End the grading processes."""
        self._pool.close()

    def _requests(self, data: DataProto) -> list[GradeRequest]:
        columns, mask = data.non_tensor_batch, data.batch["response_mask"].bool()
        sources, truths = columns[self._config.data.reward_fn_key], columns["reward_model"]
        extra = columns.get("extra_info", [None] * len(data))
        texts = self._tokenizer.batch_decode(
            [ids[kept].tolist() for ids, kept in zip(data.batch["responses"], mask)], skip_special_tokens=True
        )
        return [
            GradeRequest(source, text, truth.get("ground_truth"), info)
            for source, text, truth, info in zip(sources, texts, truths, extra)
        ]


class PrimeRewardManager(RewardManager):
    """Grades in parallel."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DictConfig) -> None:
        super().__init__(tokenizer, config, config.reward_model.num_workers)


class NaiveRewardManager(RewardManager):
    """Grades one response after another, in one process."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DictConfig) -> None:
        super().__init__(tokenizer, config, workers=1)


class DAPORewardManager(PrimeRewardManager):
    """Grades in parallel and punishes responses that come close to the length limit (DAPO, arXiv 2503.14476, eq. 13).

    The penalty grows linearly from 0 to `penalty_factor` over the last `reward_model.overlong_buffer.len` tokens before
    `data.max_response_length`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DictConfig) -> None:
        super().__init__(tokenizer, config)
        if not 0 < config.reward_model.overlong_buffer.len <= config.data.max_response_length:
            raise UserError(
                "reward_model.overlong_buffer.len: reward_manager=dapo needs it between 1 and data.max_response_length"
            )

    def penalty(self, lengths: Tensor, correct: Tensor) -> Tensor:
        """[B] the length penalty, and the one for coming close to the limit."""
        buffer = self._config.reward_model.overlong_buffer
        excess = lengths - (self._config.data.max_response_length - buffer.len)
        return super().penalty(lengths, correct) + buffer.penalty_factor * (excess / buffer.len).clamp(0, 1)


REWARD_MANAGERS: dict[str, type[RewardManager]] = {
    "naive": NaiveRewardManager,
    "prime": PrimeRewardManager,
    "dapo": DAPORewardManager,
}
