"""The processes of a worker group: started with their ranks, named in messages, ended together."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from verl.single_controller.nodes import Node, answers
from verl.single_controller.resource_pool import RayResourcePool
from verl.single_controller.worker import WorkerInfo


class WorkerLostError(RuntimeError):
    """A worker process died or hangs, or its node went away."""


class WorkerProcesses:
    """One Ray actor for each process of a resource pool.

    Args:
        pool: where they run.
        init: their class and its arguments.
        env: environment variables, see `RayWorkerGroup`.
        name: what they are called in messages.
        nccl_timeout_s: how long a rank waits for others in a collective.

    Attributes:
        handles: of the actors, by rank; none after the end.
        infos: where each of them runs, once that is known.
        loss: why they were ended, if they were.
    """

    def __init__(
        self,
        pool: RayResourcePool,
        init: partial[Any],
        env: Mapping[str, str],
        name: str,
        nccl_timeout_s: float,
    ) -> None:
        self.nccl_timeout_s = nccl_timeout_s
        self.handles = _spawn(pool, init, env)
        self.infos: list[WorkerInfo] = []
        self.loss: WorkerLostError | None = None
        self._name, self._lock = name, threading.Lock()

    def describe(self, rank: int) -> str:
        """A worker by rank, role, process id and node."""
        if not self.infos:
            return f"worker rank {rank} of {self._name}"
        info = self.infos[rank]
        return f"worker rank {rank} of {self._name} (pid {info.pid} on node {info.node}, {info.address})"

    def abort_lost(self, rank: int, method: str, reason: str) -> WorkerLostError:
        """End all, and return the error that says which worker went first, in which method, and how that shows.

        The others would wait for the lost one in a collective, perhaps for half an hour. What other calls then find is
        no loss of its own.
        """
        return self.abort(WorkerLostError(f"{self.describe(rank)} was lost in {method}: {' '.join(reason.split())}"))

    def abort_hung(self, ranks: list[int], method: str) -> WorkerLostError:
        """End all, and return the error that names the ranks for which others waited in a collective of `method` until
        its time-out."""
        return self.abort(
            WorkerLostError(
                f"{', '.join(map(self.describe, ranks))} did not come to a collective of {method}, where others waited "
                f"nccl_timeout={self.nccl_timeout_s:g} s"
            )
        )

    def abort(self, loss: WorkerLostError) -> WorkerLostError:
        """End all for a loss, perhaps in another group that the run cannot go on without; returns the first one."""
        with self._lock:
            if self.loss is None:
                self.loss = loss
                self.shutdown()
            return self.loss

    def abort_silent(self, ranks: Iterable[int], method: str) -> None:
        """End all and raise a `WorkerLostError` where the node of one of `ranks` does not answer."""
        node_of = {self.infos[rank].node_id: rank for rank in sorted(ranks, reverse=True)} if self.infos else {}
        for node_id, rank in node_of.items():
            if not answers(node_id):
                raise self.abort_lost(rank, method, "its node does not answer")

    def shutdown(self) -> None:
        """End all processes, at once."""
        for handle in self.handles:
            ray.kill(handle, no_restart=True)
        self.handles = []


def _spawn(pool: RayResourcePool, init: partial[Any], env: Mapping[str, str]) -> list[ActorHandle]:
    nodes = pool.nodes()
    if nodes[0].is_here:
        port = _free_port()
    else:
        port = ray.get(ray.remote(num_cpus=0)(_free_port).options(scheduling_strategy=nodes[0].strategies[0]).remote())
    common = {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": str(port), "WORLD_SIZE": str(pool.world_size)}
    actor_class = ray.remote(init.func)
    workers: list[ActorHandle] = []
    for node in nodes:
        of_node = node.gloo_interface | _thread_env(node, pool.processes_beside) | dict(env)
        local_world_size = str(len(node.strategies))
        for local_rank, strategy in enumerate(node.strategies):
            ranks = {"RANK": str(len(workers)), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": local_world_size}
            options = actor_class.options(
                **pool.worker_resources,
                scheduling_strategy=strategy,
                runtime_env={"env_vars": of_node | common | ranks},
            )
            workers.append(options.remote(*init.args, **init.keywords))
    return workers


def _thread_env(node: Node, processes_beside: int = 0) -> dict[str, str]:
    """Threads for what is computed on the CPU, on GPU nodes an offloaded optimiser's step: the processes together use
    each core once, unless the driver's environment says otherwise, and wait without spinning."""
    fair_share = str(max(1, node.cpu_count // (len(node.strategies) + processes_beside)))
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", fair_share), "OMP_WAIT_POLICY": "PASSIVE"}


def _free_port() -> int:
    """Where rank 0's torch.distributed store can listen; runs on rank 0's node."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
