"""The thread that owns a scorer. The texts of all connections meet there and share its batches."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xbai.engine import Scored, Scorer
from xbai.serve.model_thread import ModelThread
from xbai.sprm import StepRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class _ScoreJob:
    ids: list[int]
    response_start: int
    turn: int
    """Jobs begin in the order of this."""
    future: Future[Scored] = field(default_factory=Future)


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


class ScorerThread(ModelThread[ScoreModel]):
    """Scores the sequences of concurrent requests together: what comes while a batch runs forms the next ones.

    A sequence lets work that comes later pass by, up to its own tokens times those of its client that are unfinished.
    So short sequences need not wait for long ones, nor those of one client for the many of another, and none starves.
    """

    def __init__(self, load: Callable[[], ScoreModel]) -> None:
        super().__init__("scorer", load)
        self._jobs: list[_ScoreJob] = []
        self._unfinished: Counter[str] = Counter()
        self._tokens_begun = 0

    async def score(
        self, sequences: Sequence[list[int]], response_starts: Sequence[int], client: str = ""
    ) -> list[Scored]:
        """Score sequences of a client's token ids. Cancelling the awaiting task drops what has not begun.

        Raises:
            ServiceError: 503 when the scorer is not, or no longer, at work.
        """
        others = itertools.count(self._unfinished[client] + 1)
        jobs = [
            _ScoreJob(ids, start, self._tokens_begun + len(ids) * number)
            for ids, start, number in zip(sequences, response_starts, others, strict=False)
        ]
        with self._changed:
            for job in jobs:
                self._expect(job.future)
            self._jobs += jobs
            self._changed.notify()
        self._unfinished[client] += len(jobs)
        try:
            return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        finally:
            self._unfinished -= Counter({client: len(jobs)})

    def _has_work(self) -> bool:
        return bool(self._jobs)

    def _work(self, model: ScoreModel) -> None:
        with self._changed:
            # Nobody waits for what was cancelled, or has failed.
            self._jobs = [job for job in self._jobs if not job.future.done()]
            waiting = sorted(self._jobs, key=lambda job: job.turn)
        batch = model.scorer.new_batch()
        running = list(itertools.takewhile(lambda job: batch.add(job.ids, job.response_start), waiting))
        self._tokens_begun += sum(len(job.ids) for job in running)
        results = dict(zip(running, model.scorer.run(batch), strict=True))
        with self._changed:
            self._jobs = [job for job in self._jobs if job not in results]
        for job, scored in results.items():
            self._answer(job.future, scored)
