"""Workers of one class, one process a rank, called together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray

from verl.protocol import DataProto
from verl.single_controller.decorator import RankCalls, Registration, dispatch, registration_of
from verl.single_controller.resource_pool import RayResourcePool
from verl.single_controller.worker_future import WorkerFuture
from verl.single_controller.worker_processes import RayClassWithInitArgs, WorkerProcesses

P = ParamSpec("P")
R = TypeVar("R")


class RayWorkerGroup:
    """Worker processes; a subclass declares the methods of their class that the driver calls.

        class PolicyWorkers(RayWorkerGroup):
            compute_log_prob = joined(ActorRolloutRefWorker.compute_log_prob)

    Args:
        resource_pool: where they run.
        ray_cls_with_init: their class and its arguments.
        name: what they are called in messages, say the role.
        worker_env: environment variables of the worker processes, set before they start; they override what is derived
            from each node: the number of OpenMP threads and the network interface of gloo.
        group_sizes: for each kind of group that methods are registered with, how many consecutive ranks share the rows;
            1 for kinds that are not named.
        nccl_timeout_s: what the workers give their process groups: how long a rank waits for others.

    Raises:
        ValueError: a group size that does not divide the number of ranks.
        UserError: the cluster has no room.
        WorkerLostError: a worker died while it was being made.
    """

    def __init__(
        self,
        resource_pool: RayResourcePool,
        ray_cls_with_init: RayClassWithInitArgs,
        name: str = "",
        worker_env: Mapping[str, str] | None = None,
        group_sizes: Mapping[str, int] | None = None,
        nccl_timeout_s: float = 1800.0,
    ) -> None:
        self.world_size = resource_pool.world_size
        self.group_sizes = dict(group_sizes or {})
        for kind, size in self.group_sizes.items():
            if self.world_size % size:
                raise ValueError(f"groups of {size} ranks ({kind}) do not divide {self.world_size} ranks")
        name = name or ray_cls_with_init.cls.__name__
        self.processes = WorkerProcesses(resource_pool, ray_cls_with_init, worker_env or {}, name, nccl_timeout_s)
        refs: list[ray.ObjectRef] = [worker.worker_info.remote() for worker in self.processes.handles]
        try:
            self.processes.infos = WorkerFuture(self.processes, "__init__", refs, list).get()
        except Exception:
            self.shutdown()
            raise

    def start(self, method: str, calls: RankCalls) -> WorkerFuture:
        """Start `method` on the first ranks, `calls.group_size` of them for each entry of `calls.arguments`.

        What several ranks get is sent to Ray's object store once, and what several compute comes back once.
        """
        if self.processes.loss is not None:
            raise self.processes.loss
        size = calls.group_size
        refs: list[ray.ObjectRef] = []
        for group, (args, kwargs) in enumerate(calls.arguments):
            first, *others = self.processes.handles[group * size : (group + 1) * size]
            if others:
                args, kwargs = tuple(map(_stored, args)), {key: _stored(value) for key, value in kwargs.items()}
            refs.append(getattr(first, method).remote(*args, **kwargs))
            refs += [worker.run_without_answer.remote(method, *args, **kwargs) for worker in others]
        return WorkerFuture(self.processes, method, refs, calls.collect, size)

    def shutdown(self) -> None:
        """End all worker processes, at once."""
        self.processes.shutdown()


class GroupMethod(Generic[P, R]):
    """A method of all workers of a group: call it, or `.remote(...)` for a future."""

    def __init__(self, group: RayWorkerGroup, name: str, registration: Registration) -> None:
        self._group, self._name, self._registration = group, name, registration

    @property
    def shares(self) -> int:
        """Into how many parts a batch is cut: one for each rank, or for each group of ranks that share rows."""
        return self._group.world_size // self._group_size

    @property
    def _group_size(self) -> int:
        kind = self._registration.group
        return 1 if kind is None else self._group.group_sizes.get(kind, 1)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.remote(*args, **kwargs).get()

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> WorkerFuture[R]:
        """Start the call on the ranks and return at once."""
        mode, world_size = self._registration.dispatch_mode, self._group.world_size
        return self._group.start(self._name, dispatch(mode, world_size, args, kwargs, self._group_size))


class WorkerMethod(Generic[P, R]):
    """The declaration of a `GroupMethod` in the class of a group."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.name, self._registration = method.__name__, registration_of(method)

    def __get__(self, group: RayWorkerGroup, owner: type) -> GroupMethod[P, R]:
        return GroupMethod(group, self.name, self._registration)


def each(method: Callable[Concatenate[Any, P], R]) -> WorkerMethod[P, list[R]]:
    """Declare a method of the workers whose results come as a list, rank 0's first."""
    return WorkerMethod(method)


def joined(method: Callable[Concatenate[Any, P], R]) -> WorkerMethod[P, R]:
    """Declare a method of the workers that returns a batch, whose rows come as one batch."""
    return WorkerMethod(method)


def _stored(value: Any) -> Any:
    """Rows in Ray's object store, which calls on several workers can refer to; other values as they are."""
    return ray.put(value) if isinstance(value, DataProto) else value
