"""The scorer's thread: whatever ends it, nobody waits for an answer that will not come."""

from __future__ import annotations

import asyncio
import threading

import pytest

from xbai.engine import Scored
from xbai.serve.engine_thread import ScoreModel, ScorerThread
from xbai.serve.errors import ServiceError


class GatedScorer:
    """Scores one sequence at a time, once `gate` is open."""

    max_batch_tokens = 1

    def __init__(self) -> None:
        self.gate, self.begun = threading.Event(), threading.Event()

    def score(self, sequences: list[list[int]], response_starts: list[int]) -> list[Scored]:
        self.begun.set()
        self.gate.wait(5)
        return [Scored(0.5, [], ids, []) for ids in sequences]


def test_a_stop_fails_what_has_not_begun() -> None:
    async def run() -> list[object]:
        scorer = GatedScorer()
        thread = ScorerThread(lambda: ScoreModel(scorer, None, 8))
        thread.start()
        while not thread.ready:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(thread.score([[number]], [0])) for number in range(3)]
        await asyncio.to_thread(scorer.begun.wait, 5)
        stopping = asyncio.create_task(asyncio.to_thread(thread.stop, 5))
        await asyncio.sleep(0.05)
        scorer.gate.set()
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert await stopping
        return answers

    first, *_, last = asyncio.run(run())
    assert first == [Scored(0.5, [], [0], [])]
    with pytest.raises(ServiceError, match="the engine stopped"):
        raise last
