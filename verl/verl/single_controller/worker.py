"""The base class of everything that runs in a worker process."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs: its node by host name, IP address and Ray's id."""

    rank: int
    pid: int
    node: str
    address: str
    node_id: str


class Worker:
    """One rank of a worker group; its group sets the environment torch.distributed reads before the process starts."""

    @property
    def rank(self) -> int:
        """This worker's number in its group."""
        return int(os.environ["RANK"])

    def worker_info(self) -> WorkerInfo:
        """Rank, process id and node, for messages about this worker."""
        node_id = ray.get_runtime_context().get_node_id()
        return WorkerInfo(self.rank, os.getpid(), socket.gethostname(), ray.util.get_node_ip_address(), node_id)

    def run_without_answer(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call a method and keep its result here: another rank of its group sends the same one to the driver."""
        getattr(self, method)(*args, **kwargs)
