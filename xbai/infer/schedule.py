"""What is still to be generated, and in which order."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from xbai.results.lines import SampleKey, StoredQuestion


@dataclass(frozen=True)
class GenerationRequest:
    """Some samples of one question.

    Attributes:
        first_sample: the first that is asked for.
        missing: those that are not there yet, in order; the others that come with them are dropped.
    """

    question: StoredQuestion
    first_sample: int
    missing: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many responses to ask for."""
        return self.missing[-1] + 1 - self.first_sample

    @property
    def keys(self) -> list[SampleKey]:
        """The missing samples."""
        return [(self.question.index, sample) for sample in self.missing]


def missing_requests(
    questions: Sequence[StoredQuestion], present: Container[SampleKey], candidates: int, response_num: int
) -> Iterator[GenerationRequest]:
    """The requests that complete every question's samples.

    They begin at the same samples in every run, because a sample's seed follows from the request's and its place there:
    it is the same sample after a restart, and in a run of more or fewer.
    """
    for question in questions:
        for first in range(0, candidates, response_num):
            asked = range(first, min(first + response_num, candidates))
            missing = tuple(sample for sample in asked if (question.index, sample) not in present)
            if missing:
                yield GenerationRequest(question, first, missing)


class Schedule:
    """Hands out requests, those that will take long before the others: what ends last decides when the run ends.

    A question's time is the mean of its finished requests'. Questions of which none has finished come first, breadth
    first: those that are slow to finish their first are the slow ones.
    """

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self._waiting: defaultdict[int, deque[GenerationRequest]] = defaultdict(deque)
        self._begun: defaultdict[int, int] = defaultdict(int)
        self._seconds: defaultdict[int, list[float]] = defaultdict(list)
        for request in requests:
            self._waiting[request.question.index].append(request)
        self._length = len(requests)
        self._ranks: dict[int, tuple[bool, float]] = {}
        self._heap: list[tuple[tuple[bool, float], int]] = []
        for question in self._waiting:
            self._push(question)

    def __len__(self) -> int:
        return self._length

    def take(self) -> GenerationRequest:
        """The next request.

        Raises:
            IndexError: none is left.
        """
        rank, question = heapq.heappop(self._heap)
        while rank != self._ranks[question] or not self._waiting[question]:  # an older entry of the question
            rank, question = heapq.heappop(self._heap)
        request = self._waiting[question].popleft()
        self._begun[question] += 1
        self._length -= 1
        self._push(question)
        return request

    def finished(self, request: GenerationRequest, seconds: float) -> None:
        """Learn how long a request took."""
        self._seconds[request.question.index].append(seconds)
        self._push(request.question.index)

    def _push(self, question: int) -> None:
        seconds = self._seconds[question]
        rank = (True, -sum(seconds) / len(seconds)) if seconds else (False, self._begun[question])
        self._ranks[question] = rank
        heapq.heappush(self._heap, (rank, question))
