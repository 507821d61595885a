"""Sequences that wait to be scored, of all connections: what comes while a batch runs forms the next ones."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from xbai.engine import Scored, Scorer
from xbai.engine.scorer import ScoreBatch


@dataclass(frozen=True, eq=False)
class ScoreJob:
    """A sequence, and where its response begins. Jobs begin in the order of their turns."""

    ids: list[int]
    response_start: int
    turn: int
    future: Future[Scored] = field(default_factory=Future)


class ScoreQueue:
    """A sequence lets later work pass by, up to its own tokens times those of its client that are unfinished.

    So short sequences need not wait for long ones, nor those of one client for the many of another, and none starves.
    For whoever holds the lock of a `ModelThread`.
    """

    def __init__(self) -> None:
        self._jobs: list[ScoreJob] = []
        self._unfinished: Counter[str] = Counter()
        self._tokens_begun = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def jobs(self, sequences: Sequence[list[int]], response_starts: Sequence[int], client: str) -> list[ScoreJob]:
        """Jobs for a client's sequences, to be `put`."""
        others = itertools.count(self._unfinished[client] + 1)
        return [
            ScoreJob(ids, start, self._tokens_begun + len(ids) * number)
            for ids, start, number in zip(sequences, response_starts, others, strict=False)
        ]

    def put(self, jobs: Sequence[ScoreJob]) -> None:
        """Have them wait."""
        self._jobs += jobs

    @contextmanager
    def unfinished(self, client: str, count: int) -> Iterator[None]:
        """So many more of the client's are unfinished while the block runs."""
        self._unfinished[client] += count
        try:
            yield
        finally:
            self._unfinished -= Counter({client: count})

    def waiting(self) -> list[ScoreJob]:
        """By their turns; nobody waits for what was cancelled, or has failed."""
        self._jobs = sorted((job for job in self._jobs if not job.future.done()), key=lambda job: job.turn)
        return list(self._jobs)

    def remove(self, jobs: Sequence[ScoreJob]) -> None:
        """They have begun."""
        begun = set(jobs)
        self._tokens_begun += sum(len(job.ids) for job in jobs)
        self._jobs = [job for job in self._jobs if job not in begun]


def next_batch(waiting: Sequence[ScoreJob], scorer: Scorer) -> tuple[list[ScoreJob], ScoreBatch]:
    """The first of the jobs, as many as one forward pass takes, and its batch."""
    batch = scorer.new_batch()
    return list(itertools.takewhile(lambda job: batch.add(job.ids, job.response_start), waiting)), batch
