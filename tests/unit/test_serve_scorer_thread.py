"""The scorer's thread: whose turn it is, and that nobody waits for an answer that will not come."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from clocks import PATIENCE_S

from xbai.engine import Scored
from xbai.serve.errors import ServiceError
from xbai.serve.scorer_thread import ScoreModel, ScorerThread


class GatedBatch(list):
    """Takes sequences up to `tokens`, counting each whole."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def add(self, ids: list[int], response_start: int) -> bool:
        if self and sum(map(len, self)) + len(ids) > self.tokens:
            return False
        self.append(ids)
        return True


class GatedScorer:
    """Runs a batch once `gate` is open; `batches` are the first tokens of each one's sequences."""

    def __init__(self, tokens: int = 1) -> None:
        self.gate, self.begun = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []
        self.tokens = tokens

    def new_batch(self) -> GatedBatch:
        return GatedBatch(self.tokens)

    def run(self, batch: GatedBatch) -> list[Scored]:
        if batch:
            self.batches.append([ids[0] for ids in batch])
            self.begun.set()
            assert self.gate.wait(PATIENCE_S)
        return [Scored(0.5, [], ids, []) for ids in batch]


async def begun(scorer: GatedScorer) -> None:
    """Return once it has a batch."""
    assert await asyncio.to_thread(scorer.begun.wait, PATIENCE_S)


@asynccontextmanager
async def at_work(scorer: GatedScorer) -> AsyncIterator[ScorerThread]:
    """A thread that computes sequence 0 while the gate is shut."""
    thread = ScorerThread(lambda: ScoreModel(scorer, None, 8))
    thread.start()
    while not thread.ready:
        await asyncio.sleep(0.01)
    first = asyncio.create_task(thread.score([[0]], [0]))
    await begun(scorer)
    yield thread
    await first
    assert await asyncio.to_thread(thread.stop, PATIENCE_S)


def order_of(requests: list[tuple[str, list[list[int]]]], tokens: int = 1) -> list[list[int]]:
    """The batches that requests of clients form which come, in this order, while another batch runs."""

    async def run() -> list[list[int]]:
        scorer = GatedScorer(tokens)
        async with at_work(scorer) as thread:
            waiting = []
            for client, sequences in requests:
                waiting.append(asyncio.create_task(thread.score(sequences, [0] * len(sequences), client)))
                await asyncio.sleep(0)
            scorer.gate.set()
            async with asyncio.timeout(PATIENCE_S):
                answers = await asyncio.gather(*waiting)
        for (_, sequences), scored in zip(requests, answers, strict=True):
            assert [item.token_ids for item in scored] == sequences
        return scorer.batches[1:]

    return asyncio.run(run())


def test_what_waits_runs_together_up_to_a_full_batch() -> None:
    assert order_of([("", [[n, n]]) for n in range(1, 6)], tokens=4) == [[1, 2], [3, 4], [5]]


def test_a_short_sequence_passes_by_longer_ones_of_others() -> None:
    assert order_of([("a", [[1] * 9]), ("b", [[2] * 7]), ("c", [[3]])]) == [[3], [2], [1]]


def test_a_client_with_one_sequence_passes_by_a_long_list() -> None:
    many = [[n] * 4 for n in range(1, 9)]
    assert order_of([("a", many), ("b", [[9] * 4])]) == [[1], [9], *([n] for n in range(2, 9))]
    assert order_of([*(("a", [ids]) for ids in many), ("b", [[9] * 4])])[:2] == [[1], [9]]


def test_a_long_sequence_is_not_passed_by_for_ever() -> None:
    async def run() -> int:
        scorer = GatedScorer()
        async with at_work(scorer) as thread:
            scorer.gate.set()
            long = asyncio.create_task(thread.score([[1] * 50], [0], "long"))
            passed = 0
            while not long.done():
                await asyncio.gather(*(thread.score([[2] * 5], [0], f"client {n}") for n in range(3)))
                passed += 15
            await long
            return passed

    assert asyncio.run(run()) <= 50 + 15


def test_what_is_cancelled_is_not_computed() -> None:
    async def run() -> list[list[int]]:
        scorer = GatedScorer()
        async with at_work(scorer) as thread:
            leaving = asyncio.create_task(thread.score([[1], [2]], [0, 0]))
            staying = asyncio.create_task(thread.score([[3]], [0]))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.sleep(0)
            scorer.gate.set()
            assert [item.token_ids for item in await staying] == [[3]]
            with pytest.raises(asyncio.CancelledError):
                await leaving
        return scorer.batches

    assert asyncio.run(run()) == [[0], [3]]


def test_a_stop_fails_what_has_not_begun() -> None:
    async def run() -> list[object]:
        scorer = GatedScorer()
        async with at_work(scorer) as thread:
            waiting = [asyncio.create_task(thread.score([[number]], [0])) for number in range(1, 4)]
            await asyncio.sleep(0)
            stopping = asyncio.create_task(asyncio.to_thread(thread.stop, PATIENCE_S))
            while not thread._stopping:
                await asyncio.sleep(0.01)
            scorer.gate.set()
            async with asyncio.timeout(PATIENCE_S):
                answers = await asyncio.gather(*waiting, return_exceptions=True)
            assert await stopping
        return answers

    with pytest.raises(ServiceError, match="the engine stopped"):
        raise asyncio.run(run())[-1]


def test_a_scorer_that_raises_fails_all_that_wait() -> None:
    class Broken(GatedScorer):
        def run(self, batch: GatedBatch) -> list[Scored]:
            super().run(batch)
            raise RuntimeError("out of memory")

    async def run() -> list[object]:
        scorer = Broken()
        thread = ScorerThread(lambda: ScoreModel(scorer, None, 8))
        thread.start()
        while not thread.ready:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(thread.score([[number]], [0])) for number in range(3)]
        await begun(scorer)
        scorer.gate.set()
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.gather(*waiting, return_exceptions=True)

    answers = asyncio.run(run())
    assert [type(answer) for answer in answers] == [ServiceError] * 3
    assert all(answer.status == 503 for answer in answers)
