"""Worker groups on a real Ray: dispatch, padding, and what happens when a worker fails or dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial

import pytest
import ray
import torch

from verl import DataProto
from verl.models.fsdp import create_mesh, init_distributed
from verl.models.ulysses import sequence_parallel_group
from verl.single_controller import (
    RayResourcePool,
    RayWorkerGroup,
    Worker,
    WorkerLostError,
    each,
    get_together,
    joined,
)
from verl.single_controller.nodes import Node
from verl.single_controller.worker_processes import _thread_env
from xbai.errors import UserError

pytestmark = pytest.mark.slow


class Doubler(Worker):
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def environment(self, key: str) -> str:
        return os.environ[key]

    def multiply(self, data: DataProto, repeat: int = 1) -> DataProto:
        columns = {"y": data.batch["x"] * self.factor, "rank": torch.full((len(data),), self.rank)}
        return DataProto.from_dict(columns).repeat(repeat)

    def total(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"total": data.batch["x"].sum()[None]})

    def multiply_in_pairs(self, data: DataProto, repeat: int = 1) -> DataProto:
        self.seen = data.batch["x"].tolist()
        return self.multiply(data, repeat)

    def total_of_pairs(self, data: DataProto) -> DataProto:
        if self.rank == 1:
            raise UserError("rank 1 cannot")
        return self.total(data)

    def last_seen(self) -> list[int]:
        return self.seen

    def refuse(self) -> None:
        raise UserError("model.path: no such folder")

    def all_reduce(self) -> float:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        value = torch.ones(1)
        torch.distributed.all_reduce(value)
        return float(value)

    def meet(self, sleeper: int) -> None:
        if self.rank == sleeper:
            time.sleep(600)
        torch.distributed.all_reduce(torch.ones(1))

    def timeouts(self, timeout_s: float) -> list[float]:
        init_distributed(timeout_s)
        groups = [*create_mesh(1).get_all_groups(), sequence_parallel_group(2)]
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    def sleep_on_other_ranks(self, rank: int) -> None:
        time.sleep(0 if self.rank == rank else 600)


class Doublers(RayWorkerGroup):
    environment = each(Doubler.environment)
    multiply = joined(Doubler.multiply)
    total = joined(Doubler.total, pads=False)
    multiply_in_pairs = joined(Doubler.multiply_in_pairs, group="pairs")
    total_of_pairs = joined(Doubler.total_of_pairs, group="pairs", pads=False)
    last_seen = each(Doubler.last_seen)
    refuse = each(Doubler.refuse)
    all_reduce = each(Doubler.all_reduce)
    meet = each(Doubler.meet)
    timeouts = each(Doubler.timeouts)
    sleep_on_other_ranks = each(Doubler.sleep_on_other_ranks)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # Ray would have the workers import this module by a name that only pytest knows.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def group() -> Iterator[Doublers]:
    pool = RayResourcePool([2], use_gpu=False, cpus_per_process=0.5)
    group = Doublers(pool, partial(Doubler, 2), name="doubler", worker_env={"COLOUR": "green"})
    yield group
    group.shutdown()
    pool.release()


def test_dispatch_and_collect(group: Doublers):
    assert group.environment("RANK") == ["0", "1"]
    assert group.environment("WORLD_SIZE") == ["2", "2"]
    assert group.environment("COLOUR") == ["green", "green"]
    assert group.environment("OMP_WAIT_POLICY") == ["PASSIVE", "PASSIVE"]
    assert group.all_reduce() == [2.0, 2.0]
    for rows in (1, 2, 3, 4):
        doubled = group.multiply(DataProto.from_dict({"x": torch.arange(rows)}), repeat=3)
        assert doubled.batch["y"].tolist() == [2 * i for i in range(rows) for _ in range(3)]
        assert set(doubled.batch["rank"].tolist()) == ({0} if rows == 1 else {0, 1})
    future = group.multiply.remote(DataProto.from_dict({"x": torch.arange(2)}))
    assert future.get().batch["y"].tolist() == [0, 2]
    assert group.total(DataProto.from_dict({"x": torch.arange(4)})).batch["total"].tolist() == [1, 5]
    with pytest.raises(ValueError, match="3 rows do not divide into 2"):
        group.total(DataProto.from_dict({"x": torch.arange(3)}))
    with pytest.raises(UserError, match=r"^model.path: no such folder$"):
        group.refuse()


def test_a_group_that_waits_for_a_lost_one_ends_with_it(group: Doublers):
    pool = RayResourcePool([1], use_gpu=False, cpus_per_process=0.5)
    other = Doublers(pool, partial(Doubler, 2), name="other")
    try:
        ranks = get_together(group.environment.remote("RANK"), other.environment.remote("RANK"))
        assert ranks == [["0", "1"], ["0"]]
        group.check()
        calls = group.sleep_on_other_ranks.remote(-1), other.sleep_on_other_ranks.remote(-1)
        os.kill(other.processes.infos[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match=r"rank 0 of other .* lost in sleep_on_other_ranks") as lost:
            get_together(*calls)
        group.processes.abort(lost.value)
        with pytest.raises(WorkerLostError, match="rank 0 of other"):
            group.check()
    finally:
        other.shutdown()
        pool.release()


def test_processes_share_the_cores_of_their_node(monkeypatch: pytest.MonkeyPatch):
    node = Node("id", "10.0.0.1", None, 16, (None,) * 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _thread_env(node)["OMP_NUM_THREADS"] == "4" and _thread_env(node, 4)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _thread_env(node)["OMP_NUM_THREADS"] == "3"


def test_ranks_of_a_group_share_rows_and_the_first_answers():
    pool = RayResourcePool([4], use_gpu=False, cpus_per_process=0.25)
    group = Doublers(pool, partial(Doubler, 2), group_sizes={"pairs": 2, "others": 4})
    try:
        assert (group.multiply.shares, group.multiply_in_pairs.shares) == (4, 2)
        for rows in (1, 3, 4):
            doubled = group.multiply_in_pairs(DataProto.from_dict({"x": torch.arange(rows)}), repeat=2)
            assert doubled.batch["y"].tolist() == [2 * i for i in range(rows) for _ in range(2)]
            assert set(doubled.batch["rank"].tolist()) == ({0} if rows == 1 else {0, 2})
        assert group.last_seen() == [[0, 1], [0, 1], [2, 3], [2, 3]]
        assert set(group.multiply(DataProto.from_dict({"x": torch.arange(4)})).batch["rank"].tolist()) == {0, 1, 2, 3}
        with pytest.raises(ValueError, match="3 rows do not divide into 2"):
            group.total_of_pairs(DataProto.from_dict({"x": torch.arange(3)}))
        with pytest.raises(UserError, match="rank 1 cannot"):
            group.total_of_pairs(DataProto.from_dict({"x": torch.zeros(4)}))
    finally:
        group.shutdown()
    with pytest.raises(ValueError, match=r"groups of 3 ranks \(pairs\) do not divide 4 ranks"):
        Doublers(pool, partial(Doubler, 2), group_sizes={"pairs": 3})
    pool.release()


@pytest.mark.parametrize(
    "when", [*(pytest.param(when, marks=pytest.mark.long) for when in ("working", "idle")), "in a collective"]
)
def test_a_killed_worker_is_named_at_once(group: Doublers, when: str):
    victim = group.processes.infos[1]
    group.all_reduce()
    start = time.monotonic()
    if when == "working":
        future = group.sleep_on_other_ranks.remote(rank=0)
        os.kill(victim.pid, signal.SIGKILL)
    else:
        os.kill(victim.pid, signal.SIGKILL)
        future = group.environment.remote("RANK") if when == "idle" else group.all_reduce.remote()
    with pytest.raises(WorkerLostError, match=rf"rank 1 of doubler \(pid {victim.pid} on node .*\) was lost in"):
        future.get()
    assert time.monotonic() - start < 60


def test_a_rank_that_hangs_in_a_collective_is_named(group: Doublers):
    sleeper, start = group.processes.infos[1], time.monotonic()
    assert group.timeouts(3) == [[3.0] * 3] * 2, "of groups of groups, too"
    group.processes.nccl_timeout_s = 3
    named = (
        rf"^worker rank 1 of doubler \(pid {sleeper.pid} on node \S+, [\d.]+\) did not come to a collective of meet, "
    )
    with pytest.raises(WorkerLostError, match=named + r"where others waited nccl_timeout=3 s$"):
        group.meet(sleeper=1)
    assert time.monotonic() - start < 60
    with pytest.raises(WorkerLostError, match=named):
        group.environment("RANK")


@pytest.mark.long
def test_a_death_after_the_time_out_of_collectives_names_who_still_runs(group: Doublers):
    # As NCCL ends the processes that waited; gloo lets them fail.
    first, second = group.processes.infos
    group.processes.nccl_timeout_s = 0.1
    future = group.sleep_on_other_ranks.remote(rank=2)
    time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    suspect = rf"rank 0 of .* if it had waited nccl_timeout=0.1 s .*still runs: worker rank 1 .*\(pid {second.pid} "
    with pytest.raises(WorkerLostError, match=suspect):
        future.get()


def test_no_room_in_the_cluster_is_one_clear_line():
    with pytest.raises(UserError, match=r"no room for \[2\] processes .*; it has 1 node: [\d.]+ \(2 CPU\)"):
        RayResourcePool([2], use_gpu=False, cpus_per_process=8).nodes()


def test_room_that_others_use_is_waited_for(caplog: pytest.LogCaptureFixture):
    first, second = (RayResourcePool([2], use_gpu=False, cpus_per_process=1, timeout_s=4) for _ in range(2))
    first.nodes()
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"no room for .*; after ray_init.timeout_s=4 others .* \(2 CPU\); free are 0 CPU"
    ):
        second.nodes()
    assert 4 <= time.monotonic() - started < 60
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("verl")]
    assert said.startswith("waiting for at most 4 s: Ray has no room for [2] processes")
    first.release()
    assert len(second.nodes()) == 1
    second.release()
