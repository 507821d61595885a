"""How far the candidates of a request are, told now and then to whoever asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xbai.aggregation import aggregate
from xbai.engine import Completion, Engine, Sample

INTERVAL_S = 1.0


@dataclass(frozen=True)
class CandidateProgress:
    """One that has begun: its tokens, the scores of its steps until now, and whether it has ended."""

    tokens: int
    step_scores: list[float]
    done: bool


@dataclass(frozen=True)
class Progress:
    """Of a request's candidates, in their order; those that have not begun are not there."""

    candidates: list[CandidateProgress]

    @property
    def done(self) -> int:
        """How many have ended."""
        return sum(candidate.done for candidate in self.candidates)

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(candidate.tokens for candidate in self.candidates)

    @property
    def best_score(self) -> float | None:
        """The highest running score; None before any candidate has one."""
        return max((aggregate(one.step_scores) for one in self.candidates if one.step_scores), default=None)


class ProgressWatch:
    """A `Watch` that calls `tell`, on the engine's thread, once a wave begins and then at most once a second."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self._samples: list[Sample] = []
        self._done: dict[Sample, CandidateProgress] = {}
        self._told_s = 0.0

    def begin(self, wave: Sequence[Sample]) -> None:
        """See `Watch`."""
        self._samples += wave
        self._told_s = 0.0

    def after_step(self, engine: Engine, finished: Mapping[Sample, Completion]) -> None:
        """See `Watch`."""
        for sample, completion in finished.items():
            if sample not in self._done:
                self._done[sample] = CandidateProgress(completion.generated, completion.step_scores or [], True)
        if time.monotonic() - self._told_s < INTERVAL_S:
            return
        running = [sample for sample in self._samples if sample not in self._done]
        now = {
            sample: CandidateProgress(len(one.token_ids), one.step_scores or [], False)
            for sample, one in zip(running, engine.so_far(running), strict=True)
        }
        self._tell(Progress([(self._done | now)[sample] for sample in self._samples]))
        # From here on: on a model that scores by a second pass, this one has taken a while.
        self._told_s = time.monotonic()
