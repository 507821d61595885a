"""One driver, many worker processes: methods of a worker class called on all ranks at once, over Ray."""

from verl.single_controller.resource_pool import RayResourcePool
from verl.single_controller.worker import Worker
from verl.single_controller.worker_future import WorkerFuture, get_together
from verl.single_controller.worker_group import GroupMethod, RayWorkerGroup, dealt, each, joined
from verl.single_controller.worker_processes import WorkerLostError

__all__ = [
    "GroupMethod",
    "RayResourcePool",
    "RayWorkerGroup",
    "Worker",
    "WorkerFuture",
    "WorkerLostError",
    "dealt",
    "each",
    "get_together",
    "joined",
]
