"""Engines in processes of their own, so that one with and one without a score head take turns on one machine."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from xbai.engine import Completion, Engine, SamplingParams, Scorer, load_engine

_engine: Engine
_scorer: Scorer | None = None


@dataclass(frozen=True)
class Generated:
    """One call of `generate`, and of the scorer where it was to follow."""

    seconds: float
    completions: list[Completion]
    values: list[float]
    """Trajectory scores of the second pass."""


class EngineProcess:
    """A process with an engine, and with a scorer beside it where the engine has no head; it starts at once."""

    def __init__(self, engine: str, folder: Path, with_head: bool, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        arguments = (engine, folder, with_head, options)
        self._executor = ProcessPoolExecutor(1, mp_context=context, initializer=_load, initargs=arguments)
        self._executor.submit(_load_is_done)

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, fused_scores: bool = False, second_pass: bool = False
    ) -> Generated:
        """Complete the prompts in that process, and measure it there."""
        return self._executor.submit(_generate, prompts, params, fused_scores, second_pass).result()

    def score(self, sequences: list[list[int]], response_starts: list[int]) -> list[float]:
        """Trajectory scores by the scorer."""
        return self._executor.submit(_score, sequences, response_starts).result()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.submit(_close)
        self._executor.shutdown()


def _load(engine: str, folder: Path, with_head: bool, options: dict[str, Any]) -> None:
    global _engine, _scorer
    if not with_head:
        _scorer = Scorer.from_folder(folder)
    _engine = load_engine(engine, folder, with_scores=with_head, **options)


def _load_is_done() -> None:
    """A process starts with its first task."""


def _generate(prompts: list[list[int]], params: SamplingParams, fused_scores: bool, second_pass: bool) -> Generated:
    started = time.perf_counter()
    completions = [one for (one,) in _engine.generate(prompts, params, return_scores=fused_scores)]
    values = []
    if second_pass:
        sequences = [prompt + one.token_ids for prompt, one in zip(prompts, completions, strict=True)]
        values = _score(sequences, list(map(len, prompts)))
    return Generated(time.perf_counter() - started, completions, values)


def _score(sequences: list[list[int]], response_starts: list[int]) -> list[float]:
    return [scored.value for scored in _scorer.score(sequences, response_starts)]


def _close() -> None:
    _engine.close()
