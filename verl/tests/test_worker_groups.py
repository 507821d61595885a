"""A group of workers declares methods that its workers have, under their names, and rows are dealt out and stacked."""

from __future__ import annotations

import inspect

import pytest
import torch

from verl import DataProto
from verl.single_controller import RayWorkerGroup, Worker
from verl.single_controller.worker_group import WorkerMethod, deal_parts, deal_rows
from verl.workers.critic_worker import CriticWorkers
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker, PolicyWorkers
from verl.workers.rollout_worker import RolloutWorker, RolloutWorkers


@pytest.mark.parametrize(
    ("worker", "group"),
    [(ActorRolloutRefWorker, PolicyWorkers), (CriticWorker, CriticWorkers), (RolloutWorker, RolloutWorkers)],
)
def test_what_is_declared_is_of_the_worker(worker: type[Worker], group: type[RayWorkerGroup]) -> None:
    members = inspect.getmembers_static(group)
    declared = {name: member.name for name, member in members if isinstance(member, WorkerMethod)}
    assert {"init_model"} < declared.keys() and ("save_checkpoint" in declared) == hasattr(worker, "save_checkpoint")
    assert declared == {name: name for name in declared if hasattr(worker, name)}


@pytest.mark.parametrize(("rows", "parts", "k"), [(4, 2, 1), (3, 2, 1), (1, 4, 3), (5, 3, 2)])
def test_padding_comes_off_again(rows: int, parts: int, k: int) -> None:
    arguments, collect = deal_rows(parts, (DataProto.from_dict({"x": torch.arange(rows)}),), {"times": k})
    assert len({len(part) for (part,), _ in arguments}) == 1
    stacked = collect([part.repeat(named["times"]) for (part,), named in arguments])
    assert stacked.batch["x"].tolist() == [x for x in range(rows) for _ in range(k)]


def test_rows_that_may_not_be_padded_must_divide() -> None:
    with pytest.raises(ValueError, match="3 rows do not divide into 2"):
        deal_rows(2, (DataProto.from_dict({"x": torch.arange(3)}),), {}, pads=False)


def test_what_the_caller_has_dealt_out_goes_to_each_part() -> None:
    arguments, collect = deal_parts(2, (["a", "b"], 3), {})
    assert arguments == [(("a", 3), {}), (("b", 3), {})] and collect([1, 2]) == [1, 2]
    with pytest.raises(ValueError, match="expected 2 parts, got 3"):
        deal_parts(2, ([1, 2, 3],), {})
