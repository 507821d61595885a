"""The result of a call that runs on the workers, or the worker for which there is none."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from verl.single_controller.worker_processes import WorkerProcesses
from xbai.errors import UserError

logger = logging.getLogger(__name__)

LOST = (RayActorError, ObjectLostError)
LOST_PEER_GRACE_S = 5.0
HUNG_PEER_GRACE_S = 60.0

Result = TypeVar("Result")


class WorkerFuture(Generic[Result]):
    """The result of a call that may still run on the workers.

    Attributes:
        refs: Ray's of the results of all ranks.
    """

    def __init__(
        self,
        processes: WorkerProcesses,
        method: str,
        refs: list[ray.ObjectRef],
        collect: Callable[[list[Any]], Result],
    ) -> None:
        self._processes, self._method, self.refs, self._collect = processes, method, refs, collect
        self._start = time.monotonic()

    def get(self) -> Result:
        """Wait for all ranks and return the collected result.

        Raises:
            WorkerLostError: a worker died or its node is gone; raised as soon as that is known, and the others ended.
                Or others have waited for it in a collective until their time-out.
            Exception: whatever the method raised on a rank.
        """
        waiting = {ref: rank for rank, ref in enumerate(self.refs)}
        results: list[Any] = [None] * len(self.refs)
        while waiting:
            for ref in ray.wait(list(waiting), num_returns=1)[0]:
                rank = waiting.pop(ref)
                results[rank] = self._result(ref, rank, waiting)
        return self._collect(results)

    def _result(self, ref: ray.ObjectRef, rank: int, waiting: Mapping[ray.ObjectRef, int]) -> Any:
        try:
            return ray.get(ref)
        except LOST as error:
            raise self._processes.abort_lost(
                rank, self._method, f"Ray says: {error}{self._suspects(waiting)}"
            ) from None
        except RayTaskError as error:
            errors = [error, *self._errors_of_peers(waiting, self._grace(_is_timeout(error)))]
            if isinstance(error.cause, UserError):
                raise error.cause from None
            running = self._running(waiting)
            if running and any(map(_is_timeout, errors)):
                raise self._processes.abort_hung(running, self._method) from None
            logger.error("%s failed in %s", self._processes.describe(rank), self._method)
            raise

    def _errors_of_peers(self, waiting: Mapping[ray.ObjectRef, int], grace_s: float) -> list[RayTaskError]:
        """When a process dies, its peers' collectives may fail before Ray notices: give the death time to show.

        Ray takes longer for a whole node, but a node that is gone does not answer either.
        """
        if not waiting:
            return []
        ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=grace_s, fetch_local=False)
        errors = []
        for ref in ended:
            try:
                ray.get(ref)
            except LOST as error:
                raise self._processes.abort_lost(waiting[ref], self._method, f"Ray says: {error}") from None
            except RayTaskError as error:
                errors.append(error)
        self._processes.abort_silent(waiting.values(), self._method)
        return errors

    def _suspects(self, waiting: Mapping[ray.ObjectRef, int]) -> str:
        """NCCL ends a process that waits too long: where this may be why one ended, the ranks that others wait for."""
        if not waiting or time.monotonic() - self._start < self._processes.nccl_timeout_s:
            return ""
        ray.wait(list(waiting), num_returns=len(waiting), timeout=self._grace(after_timeout=True), fetch_local=False)
        if not (running := self._running(waiting)):
            return ""
        limit, named = (
            f"nccl_timeout={self._processes.nccl_timeout_s:g} s",
            ", ".join(map(self._processes.describe, running)),
        )
        return f"; if it had waited {limit} in a collective, then for one of what still runs: {named}"

    def _grace(self, after_timeout: bool) -> float:
        """Seconds for the peers of a rank that failed to fail, too; they may have begun to wait later than it did."""
        longest = HUNG_PEER_GRACE_S if after_timeout else LOST_PEER_GRACE_S
        return min(longest, max(LOST_PEER_GRACE_S, self._processes.nccl_timeout_s / 10))

    @staticmethod
    def _running(waiting: Mapping[ray.ObjectRef, int]) -> list[int]:
        if not waiting:
            return []
        _, running = ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False)
        return sorted(waiting[ref] for ref in running)


def get_together(*futures: WorkerFuture[Any]) -> list[Any]:
    """The results of calls on several groups whose ranks wait for each other.

    Raises:
        Exception: as `WorkerFuture.get`, for the first call that fails; for a lost worker before those that failed
            because they waited for it.
    """
    waiting = [ref for future in futures for ref in future.refs]
    failed: set[ray.ObjectRef] = set()
    while waiting and not failed:
        ended, waiting = ray.wait(waiting, num_returns=1)
        failed = {ref for ref in ended if _failure(ref)}
    if failed and waiting:
        ray.wait(waiting, num_returns=len(waiting), timeout=LOST_PEER_GRACE_S)
    lost = {ref for future in futures for ref in future.refs if failed and isinstance(_failure(ref), LOST)}
    for one in (lost, failed):
        for future in futures:
            if not one.isdisjoint(future.refs):
                future.get()
    return [future.get() for future in futures]


def _failure(ref: ray.ObjectRef) -> Exception | None:
    """Of a call that has ended; None also of one that runs."""
    if not ray.wait([ref], timeout=0)[0]:
        return None
    try:
        ray.get(ref)
    except (*LOST, RayTaskError) as error:
        return error
    return None


def _is_timeout(error: RayTaskError) -> bool:
    """Whether a rank waited too long in a collective; gloo says so in words alone."""
    return isinstance(error.cause, RuntimeError) and bool(re.search(r"timed? ?out", str(error.cause), re.IGNORECASE))
