"""When all engines of a run stop: as soon as together they have finished as many groups as a step still needs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from verl.models.ulysses import sequence_parallel_group

STEPS_BETWEEN_QUESTIONS = 8
"""Of an engine that finishes nothing. What it samples after the others have stopped is kept, so that nothing is lost by
asking seldom, and a question costs the network's latency."""


class Quota:
    """Counts the finished groups of all engines in the store of the process group; one engine counts for itself.

    To be made, started and asked by every rank.

    Args:
        ranks_per_engine: consecutive ranks that share an engine, and so must stop at the same of its steps: the first
            one asks, and tells the others.
    """

    def __init__(self, ranks_per_engine: int = 1) -> None:
        alone = not dist.is_initialized() or dist.get_world_size() == ranks_per_engine
        self._store = None if alone else dist.distributed_c10d._get_default_store()
        self._group = None if alone else sequence_parallel_group(ranks_per_engine)
        self._asks = self._group is None or dist.get_rank(self._group) == 0
        self._starts = self._wanted = self._steps = self._found = self._untold = 0

    def start(self, wanted: int) -> None:
        """Count from zero up to `wanted`, the same on every rank."""
        self._starts, self._wanted = self._starts + 1, wanted
        self._steps = self._found = self._untold = 0

    def is_met(self, finished: int) -> bool:
        """After a step of this rank's engine that finished so many groups."""
        self._steps, self._untold = self._steps + 1, self._untold + finished
        if finished or self._steps % STEPS_BETWEEN_QUESTIONS == 0:
            self._ask()
        return self._found >= self._wanted

    def _ask(self) -> None:
        if self._store is None:
            self._found += self._untold
        elif self._asks:
            self._found = self._store.add(f"finished_groups/{self._starts}", self._untold)
        if self._group is not None:
            found = torch.tensor(self._found)
            dist.broadcast(found, group=self._group, group_src=0)
            self._found = int(found)
        self._untold = 0
