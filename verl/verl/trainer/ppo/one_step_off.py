"""The rollouts of the next step, sampled while the policy trains on those of this one."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from verl.single_controller import RayWorkerGroup, WorkerLostError
from verl.trainer.ppo.metrics import timed
from verl.trainer.ppo.pooled_rollouts import Batches, PooledRollouts, Rollouts
from verl.trainer.ppo.separate_engines import SeparateEngines

CHECK_S = 10.0
"""How often to see, while rollouts are waited for, whether those are alive that train on them."""


class OneStepOff:
    """Engines sample for a step with the weights that the step before it begins with (Noukhovitch et al., arXiv
    2410.18252).

    Between `next` and `settle` a thread of its own has the pool, the place in the data and the engines.

    Args:
        pooled: makes a step's rollouts.
        engines: sample them.
        training: the groups that train meanwhile; with a lost engine they end.
        last_step: after which nothing is sampled.
    """

    def __init__(
        self, pooled: PooledRollouts, engines: SeparateEngines, training: Iterable[RayWorkerGroup], last_step: int
    ) -> None:
        self._pooled, self._engines, self._training, self._last_step = pooled, engines, list(training), last_step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._under_way: Future[None] | None = None

    def next(self, batches: Batches, step: int, metrics: dict[str, float]) -> Rollouts:
        """Wait for the rollouts of `step`, and begin those of the next one; adds to `metrics`."""
        with timed("rollout_wait", metrics):
            self.settle()
            if not self._pooled.is_filled(step):
                self._engines.update(metrics)
                self._pooled.fill(batches, self._engines.workers, step, step)
        taken = self._pooled.take(step, metrics)
        if step < self._last_step:
            self._engines.update(metrics)
            self._under_way = self._thread.submit(self._fill, batches, step + 1)
        return taken

    def settle(self) -> None:
        """Wait for what is under way.

        Raises:
            WorkerLostError: a process died, of an engine or of those that have trained.
            UserError: as of `PooledRollouts.fill`.
        """
        if (under_way := self._under_way) is None:
            return
        while wait([under_way], timeout=CHECK_S).not_done:
            for group in self._training:
                group.check()
        self._under_way = None
        under_way.result()

    def close(self) -> None:
        """Begin nothing more, and give what is under way a little time to notice that its workers have ended."""
        if self._under_way is not None:
            wait([self._under_way], timeout=CHECK_S)
        self._thread.shutdown(wait=False)

    def _fill(self, batches: Batches, step: int) -> None:
        try:
            self._pooled.fill(batches, self._engines.workers, step, version=step - 1)
        except WorkerLostError as loss:
            # The driver may wait for a long update.
            for group in self._training:
                group.processes.abort(loss)
            raise
