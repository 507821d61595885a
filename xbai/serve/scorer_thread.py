"""The thread that owns a scorer. The texts of all connections meet there and share its batches."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xbai.engine import Scored, Scorer
from xbai.serve.model_thread import Model, ModelThread
from xbai.serve.score_queue import ScoreQueue, next_batch
from xbai.sprm import StepRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoreModel:
    """A scorer with the tokenizer and the length limit that texts need."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int

    @property
    def step_rule(self) -> StepRule:
        """Which tokens end a step."""
        return self.scorer.step_rule

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        size: int = self.scorer.backbone.config.vocab_size
        return size


class ScoringThread(ModelThread[Model]):
    """One that scores the sequences of concurrent requests together, in the order of a `ScoreQueue`."""

    def __init__(self, name: str, load: Callable[[], Model]) -> None:
        super().__init__(name, load)
        self.to_score = ScoreQueue()

    async def score(
        self, sequences: Sequence[list[int]], response_starts: Sequence[int], client: str = ""
    ) -> list[Scored]:
        """Score sequences of a client's token ids. Cancelling the awaiting task drops what has not begun.

        Raises:
            ServiceError: 503 when the model is not, or no longer, at work.
        """
        with self._changed:
            jobs = self.to_score.jobs(sequences, response_starts, client)
            for job in jobs:
                self._expect(job.future)
            self.to_score.put(jobs)
            self._changed.notify()
        with self.to_score.unfinished(client, len(jobs)):
            return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))

    @abstractmethod
    def _scorer(self, model: Model) -> Scorer:
        """What scores."""

    def _score(self, model: Model) -> None:
        """Run one batch."""
        with self._changed:
            waiting = self.to_score.waiting()
        scorer = self._scorer(model)
        running, batch = next_batch(waiting, scorer)
        with self._changed:
            self.to_score.remove(running)
        for job, scored in zip(running, scorer.run(batch), strict=True):
            self._answer(job.future, scored)


class ScorerThread(ScoringThread[ScoreModel]):
    """It does nothing else."""

    def __init__(self, load: Callable[[], ScoreModel]) -> None:
        super().__init__("scorer", load)

    def _has_work(self) -> bool:
        return len(self.to_score) > 0

    def _work(self, model: ScoreModel) -> None:
        self._score(model)

    def _scorer(self, model: ScoreModel) -> Scorer:
        return model.scorer
