"""The steps whose phases are traced, for people to read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from verl.trainer.config.schema import TrainerConfig
from verl.workers.checkpointed_worker import CheckpointedWorkers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProfiledSteps:
    """Those of `trainer.profile_steps`."""

    steps: frozenset[int]
    folder: Path
    """On a disk of every node, with a folder for each step."""

    @classmethod
    def of(cls, trainer: TrainerConfig) -> ProfiledSteps:
        """As a configuration says."""
        return cls(frozenset(trainer.profile_steps), Path(trainer.default_local_dir).absolute() / "profile")

    @contextmanager
    def traced(self, step: int, groups: Iterable[CheckpointedWorkers]) -> Iterator[None]:
        """Inside is a step; where it is one of these, all ranks of the groups write traces of its phases."""
        if step not in self.steps:
            yield
            return
        folder = self.folder / f"step_{step}"
        for group in groups:
            group.trace_phases(str(folder))
        yield
        for group in groups:
            group.trace_phases(None)
        logger.info("traces of step %d, for ui.perfetto.dev or chrome://tracing: %s", step, folder)
