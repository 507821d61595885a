"""Continuing paths to their next step, within the limits of one question."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from xbai.errors import first_error
from xbai.search.path import SearchPath
from xbai.seeds import sample_seed

T = TypeVar("T")

SMALLEST_SHARE = 8
"""Fewer tokens than this are not worth a request."""


@dataclass(frozen=True)
class Continuation:
    """A path after some more tokens, and how many were generated for it."""

    path: SearchPath
    spent: int


class StepSource(Protocol):
    """A model that writes on at the responses to one prompt and scores their steps."""

    async def write_on(self, path: SearchPath, max_tokens: int, to_end: bool, seed: int | None) -> Continuation:
        """Continue an open path, to its end if `to_end`, else to the end of a step.

        Returns:
            The path up to its next step (one more step score), to its end (a finish reason), or to where `max_tokens`
            or a token that only resembles the end of a step cut it (neither).
        """
        ...


@dataclass(frozen=True)
class SearchLimits:
    """How far one search may go.

    Attributes:
        max_tokens: of one response.
        token_budget: generated tokens of the whole search.
        max_steps: from so many steps on a response is written to its end in one go.
        reserve: part of the budget that only `Expander.ending` spends.
    """

    max_tokens: int
    token_budget: int = sys.maxsize
    max_steps: int = sys.maxsize
    reserve: int = 0


class Expander:
    """What a search algorithm sees of the model: `extend`.

    The budget is never exceeded: every request is limited to its share of what is left. Seeds follow from the order in
    which an algorithm asks, not from when the answers come.

    Attributes:
        spent: tokens generated so far.
    """

    def __init__(self, source: StepSource, limits: SearchLimits, seed: int | None) -> None:
        self._source = source
        self._limits = limits
        self._seed = seed
        self._requests = itertools.count()
        self._spent = 0
        self._parts: list[Expander] = []

    @property
    def spent(self) -> int:
        """Generated tokens, also of the parts."""
        return self._spent + sum(part.spent for part in self._parts)

    def split(self, count: int) -> list[Expander]:
        """Independent expanders, each with its share of the budget and random numbers of its own."""
        share = self._left // count
        return [self._part(token_budget=share, reserve=0) for _ in range(count)]

    def ending(self) -> Expander:
        """An expander that writes to the end in one go, with all that is left and the reserve."""
        return self._part(token_budget=self._limits.token_budget - self.spent, reserve=0, max_steps=0)

    async def extend(self, paths: Sequence[SearchPath]) -> list[SearchPath]:
        """Every path one step further, all at once: name a path several times for several samples of its next step.

        Returns:
            For each path one with more steps, or a finished one: `stop`, or `length` where a limit ended it.
        """
        extended = list(paths)
        pending = [i for i, path in enumerate(paths) if path.open]
        while pending and (share := self._left // len(pending)) >= SMALLEST_SHARE:
            written = await together(self._write_on(extended[i], share) for i in pending)
            for i, continuation in zip(pending, written, strict=True):
                self._spent += continuation.spent
                extended[i] = continuation.path
            # What some did not use of their shares goes to those that were cut within a step.
            pending = [i for i in pending if self._is_within_step(paths[i], extended[i])]
        return [self._ended(before, after) for before, after in zip(paths, extended, strict=True)]

    @property
    def _left(self) -> int:
        return self._limits.token_budget - self._limits.reserve - self.spent

    def _part(self, **limits: int) -> Expander:
        self._parts.append(Expander(self._source, replace(self._limits, **limits), self._next_seed()))
        return self._parts[-1]

    async def _write_on(self, path: SearchPath, share: int) -> Continuation:
        max_tokens = min(share, self._limits.max_tokens - path.token_count)
        to_end = len(path.step_scores) >= self._limits.max_steps
        return await self._source.write_on(path, max_tokens, to_end, self._next_seed())

    def _is_within_step(self, before: SearchPath, after: SearchPath) -> bool:
        room = after.token_count < self._limits.max_tokens
        return room and after.open and len(after.step_scores) <= len(before.step_scores)

    def _ended(self, before: SearchPath, after: SearchPath) -> SearchPath:
        full = after.token_count >= self._limits.max_tokens
        if after.open and (full or len(after.step_scores) <= len(before.step_scores)):
            return replace(after, finish_reason="length")
        return after

    def _next_seed(self) -> int | None:
        number = next(self._requests)
        return None if self._seed is None else sample_seed(self._seed, number)


async def together(parts: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """`asyncio.gather`, but where one fails the others are cancelled: nobody would use what they generate."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in parts]
    except ExceptionGroup as failures:
        raise first_error(failures) from None
    return [task.result() for task in tasks]
