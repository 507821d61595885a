"""Workers of one class, one process a rank, called together."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from verl.protocol import DataProto
from verl.single_controller.decorator import RankCalls, Registration, dispatch, registered_methods
from verl.single_controller.nodes import Node, answers
from verl.single_controller.resource_pool import RayResourcePool
from verl.single_controller.worker import Worker, WorkerInfo
from verl.single_controller.worker_future import WorkerFuture


class WorkerLostError(RuntimeError):
    """A worker process died or hangs, or its node went away."""


class RayClassWithInitArgs:
    """A worker class and the arguments to construct it with on every rank."""

    def __init__(self, cls: type[Worker], *args: Any, **kwargs: Any) -> None:
        self.cls, self.args, self.kwargs = cls, args, kwargs


class GroupMethod:
    """A registered method of all workers: call it, or `.remote(...)` for a future."""

    def __init__(self, group: RayWorkerGroup, name: str, registration: Registration) -> None:
        self._group, self._name, self._registration = group, name, registration

    @property
    def shares(self) -> int:
        """Into how many parts a batch is cut: one for each rank, or for each group of ranks that share rows."""
        return self._group.world_size // self._group_size

    @property
    def _group_size(self) -> int:
        return self._group.group_sizes.get(self._registration.group, 1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.remote(*args, **kwargs).get()

    def remote(self, *args: Any, **kwargs: Any) -> WorkerFuture:
        """Start the call on the ranks and return at once."""
        mode, world_size = self._registration.dispatch_mode, self._group.world_size
        calls = dispatch(mode, world_size, args, kwargs, self._group_size)
        return self._group.start(self._name, calls)


class RayWorkerGroup:
    """One Ray actor for each process of a resource pool; the class's registered methods are attributes of the group."""

    def __init__(
        self,
        resource_pool: RayResourcePool,
        ray_cls_with_init: RayClassWithInitArgs,
        name: str = "",
        worker_env: Mapping[str, str] | None = None,
        group_sizes: Mapping[str, int] | None = None,
        nccl_timeout_s: float = 1800.0,
    ) -> None:
        """Start the workers and wait until they are constructed.

        Args:
            resource_pool: where they run.
            ray_cls_with_init: their class and its arguments.
            name: what they are called in messages, say the role.
            worker_env: environment variables of the worker processes, set before they start; they override what
                is derived from each node: the number of OpenMP threads and the network interface of gloo.
            group_sizes: for each kind of group that methods are registered with, how many consecutive ranks share the
                rows; 1 for kinds that are not named.
            nccl_timeout_s: what the workers give their process groups: how long a rank waits for others.

        Raises:
            ValueError: a group size that does not divide the number of ranks.
            UserError: the cluster has no room.
            WorkerLostError: a worker died while it was being made.
        """
        self.name = name or ray_cls_with_init.cls.__name__
        self.world_size = resource_pool.world_size
        self.nccl_timeout_s = nccl_timeout_s
        self.group_sizes = dict(group_sizes or {})
        for kind, size in self.group_sizes.items():
            if self.world_size % size:
                raise ValueError(f"groups of {size} ranks ({kind}) do not divide {self.world_size} ranks")
        self._infos: list[WorkerInfo] | None = None
        self._loss: WorkerLostError | None = None
        self._lock = threading.Lock()
        self._workers = _spawn(resource_pool, ray_cls_with_init, worker_env or {})
        refs = [worker.worker_info.remote() for worker in self._workers]
        try:
            self._infos = WorkerFuture(self, "__init__", refs, list).get()
        except Exception:
            self.shutdown()
            raise
        for method, registration in registered_methods(ray_cls_with_init.cls).items():
            setattr(self, method, GroupMethod(self, method, registration))

    @property
    def worker_infos(self) -> list[WorkerInfo]:
        """Rank, process id and node of every worker."""
        return list(self._infos or [])

    def start(self, method: str, calls: RankCalls) -> WorkerFuture:
        """Start `method` on the first ranks, `calls.group_size` of them for each entry of `calls.arguments`.

        What several ranks get is sent to Ray's object store once, and what several compute comes back once.
        """
        if self._loss is not None:
            raise self._loss
        size, refs = calls.group_size, []
        for group, (args, kwargs) in enumerate(calls.arguments):
            first, *others = self._workers[group * size : (group + 1) * size]
            if others:
                args, kwargs = tuple(map(_stored, args)), {key: _stored(value) for key, value in kwargs.items()}
            refs.append(getattr(first, method).remote(*args, **kwargs))
            refs += [worker.run_without_answer.remote(method, *args, **kwargs) for worker in others]
        return WorkerFuture(self, method, refs, calls.collect, size)

    def describe(self, rank: int) -> str:
        """A worker by rank, role, process id and node."""
        if not self._infos:
            return f"worker rank {rank} of {self.name}"
        info = self._infos[rank]
        return f"worker rank {rank} of {self.name} (pid {info.pid} on node {info.node}, {info.address})"

    def lost(self, rank: int, method: str, reason: str) -> WorkerLostError:
        """The error that says which worker went first, in which method, and how that shows.

        The other workers end at once: they wait for the lost one in a collective, perhaps for half an hour. What other
        calls then find is no loss of its own.
        """
        return self._end(f"{self.describe(rank)} was lost in {method}: {' '.join(reason.split())}")

    def hung(self, ranks: list[int], method: str) -> WorkerLostError:
        """The error that names the ranks for which others waited in a collective of `method` until its time-out."""
        return self._end(
            f"{', '.join(map(self.describe, ranks))} did not come to a collective of {method}, where others waited "
            f"nccl_timeout={self.nccl_timeout_s:g} s"
        )

    def _end(self, reason: str) -> WorkerLostError:
        with self._lock:
            if self._loss is None:
                self._loss = WorkerLostError(reason)
                self.shutdown()
            return self._loss

    def raise_if_silent(self, ranks: Iterable[int], method: str) -> None:
        """Raise a `WorkerLostError` for the first of `ranks` whose node does not answer."""
        node_of = {self._infos[rank].node_id: rank for rank in sorted(ranks, reverse=True)} if self._infos else {}
        for node_id, rank in node_of.items():
            if not answers(node_id):
                raise self.lost(rank, method, "its node does not answer")

    def shutdown(self) -> None:
        """End all worker processes, at once."""
        for worker in self._workers:
            ray.kill(worker, no_restart=True)
        self._workers = []


def _spawn(pool: RayResourcePool, init: RayClassWithInitArgs, env: Mapping[str, str]) -> list[ActorHandle]:
    nodes = pool.nodes()
    if nodes[0].is_here:
        port = _free_port()
    else:
        port = ray.get(ray.remote(num_cpus=0)(_free_port).options(scheduling_strategy=nodes[0].strategies[0]).remote())
    common = {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": str(port), "WORLD_SIZE": str(pool.world_size)}
    actor_class, workers = ray.remote(init.cls), []
    for node in nodes:
        of_node = node.gloo_interface | _thread_env(node) | dict(env)
        local_world_size = str(len(node.strategies))
        for local_rank, strategy in enumerate(node.strategies):
            ranks = {"RANK": str(len(workers)), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": local_world_size}
            options = actor_class.options(
                **pool.worker_resources,
                scheduling_strategy=strategy,
                runtime_env={"env_vars": of_node | common | ranks},
            )
            workers.append(options.remote(*init.args, **init.kwargs))
    return workers


def _thread_env(node: Node) -> dict[str, str]:
    """Threads for what is computed on the CPU, on GPU nodes an offloaded optimiser's step: the processes together use
    each core once, unless the driver's environment says otherwise, and wait without spinning."""
    fair_share = str(max(1, node.cpu_count // len(node.strategies)))
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", fair_share), "OMP_WAIT_POLICY": "PASSIVE"}


def _stored(value: Any) -> Any:
    """Rows in Ray's object store, which calls on several workers can refer to; other values as they are."""
    return ray.put(value) if isinstance(value, DataProto) else value


def _free_port() -> int:
    """Where rank 0's torch.distributed store can listen; runs on rank 0's node."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
