"""A group of workers has the methods that its workers registered, under their names, and no others."""

from __future__ import annotations

import inspect

import pytest

from verl.single_controller import RayWorkerGroup, Worker, each
from verl.single_controller.decorator import REGISTRATION_ATTRIBUTE
from verl.single_controller.worker_group import WorkerMethod
from verl.workers.critic_worker import CriticWorkers
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker, PolicyWorkers


@pytest.mark.parametrize(("worker", "group"), [(ActorRolloutRefWorker, PolicyWorkers), (CriticWorker, CriticWorkers)])
def test_what_is_registered_is_declared(worker: type[Worker], group: type[RayWorkerGroup]) -> None:
    registered = {name for name, method in inspect.getmembers_static(worker) if hasattr(method, REGISTRATION_ATTRIBUTE)}
    members = inspect.getmembers_static(group)
    declared = {name: member.name for name, member in members if isinstance(member, WorkerMethod)}
    assert {"init_model", "save_checkpoint"} < registered
    assert declared == {name: name for name in registered}


def test_a_method_that_no_worker_registered_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match=r"^Worker\.worker_info is not registered$"):
        each(Worker.worker_info)
