"""Workers of one class, one process a rank, called together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray

from verl.protocol import DataProto
from verl.single_controller.resource_pool import RayResourcePool
from verl.single_controller.worker_future import WorkerFuture
from verl.single_controller.worker_processes import WorkerProcesses

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Arguments = tuple[tuple, dict[str, Any]]
"""Positional and named."""
Deal = Callable[[int, tuple, dict[str, Any]], tuple[list[Arguments], Callable[[list[Any]], Any]]]
"""From into how many parts, and the arguments of a call: those of each part, and how to make one result of theirs."""


class RayWorkerGroup:
    """Worker processes; a subclass declares the methods of their class that the driver calls.

        class PolicyWorkers(RayWorkerGroup):
            compute_log_prob = joined(ActorRolloutRefWorker.compute_log_prob)

    Args:
        resource_pool: where they run.
        init: their class and its arguments.
        name: what they are called in messages, say the role.
        worker_env: environment variables of the worker processes, set before they start; they override what is derived
            from each node: the number of OpenMP threads and the network interface of gloo.
        group_sizes: for each kind of group that methods are declared with, how many consecutive ranks share the rows;
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
        init: partial[Any],
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
        name = name or init.func.__name__
        self.processes = WorkerProcesses(resource_pool, init, worker_env or {}, name, nccl_timeout_s)
        refs: list[ray.ObjectRef] = [worker.worker_info.remote() for worker in self.processes.handles]
        try:
            self.processes.infos = WorkerFuture(self.processes, "__init__", refs, list).get()
        except Exception:
            self.shutdown()
            raise

    def start(
        self, method: str, arguments: Sequence[Arguments], collect: Callable[[list[Any]], Any]
    ) -> WorkerFuture[Any]:
        """Start `method` on all ranks, of which as many consecutive ones share each entry of `arguments`; `collect`
        makes one result of those of the first rank of each entry.

        What several ranks get is sent to Ray's object store once, and what several compute comes back once.
        """
        if self.processes.loss is not None:
            raise self.processes.loss
        size = self.world_size // len(arguments)
        refs: list[ray.ObjectRef] = []
        for part, (args, kwargs) in enumerate(arguments):
            first, *others = self.processes.handles[part * size : (part + 1) * size]
            if others:
                args, kwargs = tuple(map(_stored, args)), {key: _stored(value) for key, value in kwargs.items()}
            refs.append(getattr(first, method).remote(*args, **kwargs))
            refs += [worker.run_without_answer.remote(method, *args, **kwargs) for worker in others]
        return WorkerFuture(self.processes, method, refs, lambda results: collect(results[::size]))

    def check(self) -> None:
        """Wait until all workers answer.

        Raises:
            WorkerLostError: one of them has died.
        """
        self.start("worker_info", [((), {})] * self.world_size, list).get()

    def shutdown(self) -> None:
        """End all worker processes, at once."""
        self.processes.shutdown()


class GroupMethod(Generic[P, R]):
    """A method of all workers of a group: call it, or `.remote(...)` for a future."""

    def __init__(self, group: RayWorkerGroup, name: str, deal: Deal, shares: int) -> None:
        self._group, self._name, self._deal, self.shares = group, name, deal, shares

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.remote(*args, **kwargs).get()

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> WorkerFuture[R]:
        """Start the call on the ranks and return at once."""
        return self._group.start(self._name, *self._deal(self.shares, args, kwargs))


class WorkerMethod(Generic[P, R]):
    """The declaration of a `GroupMethod` in the class of a group."""

    def __init__(self, method: Callable[..., Any], deal: Deal, group: str | None = None) -> None:
        self.name, self._deal, self._kind = method.__name__, deal, group

    def __get__(self, group: RayWorkerGroup, owner: type) -> GroupMethod[P, R]:
        size = 1 if self._kind is None else group.group_sizes.get(self._kind, 1)
        return GroupMethod(group, self.name, self._deal, group.world_size // size)


def each(method: Callable[Concatenate[Any, P], R]) -> WorkerMethod[P, list[R]]:
    """Declare a method that all ranks run with the same arguments; their results come as a list, rank 0's first."""
    return WorkerMethod(method, lambda ranks, args, kwargs: ([(args, kwargs)] * ranks, list))


def joined(method: Callable[Concatenate[Any, P], R], group: str | None = None, pads: bool = True) -> WorkerMethod[P, R]:
    """Declare a method whose batches are cut into one part for each rank, and whose results are stacked to one batch.

    Args:
        method: of the workers; takes `DataProto`s of one length, and returns k rows for each row, or none.
        group: the kind of groups in which consecutive ranks share the rows (sequence or tensor parallel ranks);
            `RayWorkerGroup(group_sizes=...)` says how many ranks that is. A part goes to all ranks of one group, and
            the result is taken from the first of them.
        pads: rows that do not divide are filled up with copies of the first ones, whose results are dropped: for
            methods that treat rows independently. Otherwise rows must divide.
    """
    return WorkerMethod(method, partial(deal_rows, pads=pads), group)


def dealt(
    method: Callable[Concatenate[Any, T, P], R], group: str | None = None
) -> WorkerMethod[Concatenate[Sequence[T], P], list[R]]:
    """Declare a method whose first argument the caller has dealt out: `shares` of them, one for each group of ranks of
    the kind `group` (see `joined`); the results of their first ranks come as a list in the same order."""
    return WorkerMethod(method, deal_parts, group)


def deal_parts(parts: int, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Arguments], Callable[[list[R]], list[R]]]:
    """Give each of the `parts` its own first argument, and all of them the others.

    Raises:
        ValueError: another number of first arguments.
    """
    own, *others = args
    if len(own) != parts:
        raise ValueError(f"expected {parts} parts, got {len(own)}")
    return [((part, *others), kwargs) for part in own], list


def deal_rows(
    parts: int, args: tuple, kwargs: dict[str, Any], pads: bool = True
) -> tuple[list[Arguments], Callable[[list[DataProto]], DataProto]]:
    """Cut every batch among the arguments of a call into `parts`; what is no batch goes to all unchanged.

    Returns:
        The arguments of each part, and how to make one result of theirs.

    Raises:
        ValueError: batches of several lengths, or one that does not divide.
    """
    lengths = {len(value) for value in (*args, *kwargs.values()) if isinstance(value, DataProto)}
    if len(lengths) != 1:
        raise ValueError(f"expected batches of one length, got lengths {sorted(lengths)}")
    rows = lengths.pop()
    padding = -rows % parts if pads else 0

    def cut(value: Any) -> list[Any]:
        return value.padded(padding).chunk(parts) if isinstance(value, DataProto) else [value] * parts

    def collect(results: list[DataProto]) -> DataProto:
        stacked = DataProto.concat(results)
        return stacked[: len(stacked) * rows // (rows + padding)] if padding else stacked

    columns, named = [cut(value) for value in args], {key: cut(value) for key, value in kwargs.items()}
    arguments = [
        (tuple(column[part] for column in columns), {key: value[part] for key, value in named.items()})
        for part in range(parts)
    ]
    return arguments, collect


def _stored(value: Any) -> Any:
    """Rows in Ray's object store, which calls on several workers can refer to; other values as they are."""
    return ray.put(value) if isinstance(value, DataProto) else value
