"""Which copy of a service takes the next request."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.client.replicas import AFFINITY_SLACK, RETRY_MAX_S, Replica, Replicas


def busy(count: int, max_in_flight: int = 8) -> Replica:
    replica = Replica("http://a", max_in_flight)
    for _ in range(count):
        replica.take(1, now=0.0)
    return replica


def refuse(replica: Replica, now: float, retry_after_s: float = 2.0) -> None:
    replica.refused(now, retry_after_s)
    replica.give_back(1)


def test_a_copy_that_is_full_gets_what_it_answers_and_later_one_more() -> None:
    replica = busy(8)
    for _ in range(3):
        refuse(replica, now=1.0)
    assert (replica.limit, replica.in_flight) == (5, 5)
    assert not replica.has_room(2.9), "Retry-After is kept"
    replica.give_back(1)
    assert replica.has_room(2.9), "what it has answered is replaced"
    replica.take(1, 2.9)
    assert replica.room_again_at(2.9) <= 1.0 + 2.0 * 1.25
    assert replica.has_room(4.0)
    replica.take(1, 4.0)
    assert replica.limit == 6
    assert not replica.has_room(4.1)


def test_a_copy_that_stays_full_is_tried_less_and_less() -> None:
    replica, now, pauses = busy(2, max_in_flight=2), 0.0, []
    refuse(replica, now, retry_after_s=0.0)
    for _ in range(12):
        pauses.append(replica.room_again_at(now) - now)
        now += pauses[-1]
        replica.take(1, now)
        refuse(replica, now, retry_after_s=0.0)
    assert pauses[0] < 1 and pauses[-1] > 20
    assert max(pauses) <= RETRY_MAX_S * 1.25


def test_a_copy_that_refuses_everything_is_tried_after_the_time_it_asked_for() -> None:
    replica = busy(1)
    refuse(replica, now=0.0)
    assert replica.limit == 0
    assert not replica.has_room(1.9)
    assert replica.has_room(2.6)


def test_a_failed_copy_is_tried_with_one_request_and_then_gets_its_share() -> None:
    replica = busy(3)
    assert replica.failed(10.0, answered=False) is not None
    assert replica.failed(10.0, answered=False) is None, "what was in flight with it fails too"
    for _ in range(3):
        replica.give_back(1)
    assert not replica.has_room(10.1)
    assert replica.has_room(11.0)
    replica.take(1, 11.0)
    assert not replica.has_room(11.0)
    replica.succeeded()
    assert replica.has_room(11.0)


def test_patience_ends_sooner_with_the_silent_than_with_the_failing() -> None:
    silent, failing = busy(1), busy(1)
    for now in (0.0, 100.0):
        silent.failed(now, answered=False)
        failing.failed(now, answered=True)
    assert silent.is_lost(101.0, patience_s=50, max_failures=5)
    assert not failing.is_lost(101.0, patience_s=50, max_failures=5)
    assert not silent.is_lost(49.0, patience_s=50, max_failures=5)


def test_the_oldest_request_is_served_first_and_cancelled_ones_leave_no_trace() -> None:
    async def run() -> list[int]:
        replicas = Replicas(["http://a"], 1)
        served: list[int] = []
        begun = {ticket: asyncio.Event() for ticket in (5, 3, 4, 1)}
        may_end = {ticket: asyncio.Event() for ticket in begun}

        async def use(ticket: int) -> None:
            async with replicas.lease(ticket, weight=2):
                served.append(ticket)
                begun[ticket].set()
                await may_end[ticket].wait()

        tasks = {ticket: asyncio.create_task(use(ticket)) for ticket in begun}
        await begun[5].wait()
        tasks[4].cancel()
        may_end[5].set()
        await begun[1].wait()
        tasks[1].cancel()
        may_end[3].set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert (replicas.all[0].in_flight, replicas.all[0].outstanding) == (0, 0)
        return served

    assert asyncio.run(run()) == [5, 1, 3]


def test_a_request_leaves_the_copy_that_failed_it_to_others_while_another_works() -> None:
    async def run() -> list[tuple[int, str]]:
        replicas = Replicas(["http://a", "http://b"], 1)
        served: list[tuple[int, str]] = []

        async def use(ticket: int, failed_on: set[str]) -> None:
            async with replicas.lease(ticket, 1, failed_on) as replica:
                served.append((ticket, replica.base_url))
                await asyncio.sleep(0.01)

        async with replicas.lease(0, 1, {"http://a"}) as busy_replica:
            assert busy_replica.base_url == "http://b"
            oldest = asyncio.create_task(use(1, {"http://a"}))
            await asyncio.sleep(0)
            await use(2, set())
        await oldest
        await use(3, {"http://a", "http://b"})
        replicas.all[1].failed(asyncio.get_running_loop().time(), answered=False)
        await use(4, {"http://a"})
        return served

    assert asyncio.run(run()) == [(2, "http://a"), (1, "http://b"), (3, "http://a"), (4, "http://a")]


def borrowed(replicas: Replicas, weight: int, beginning: bytes, tried: frozenset[str] = frozenset()) -> Replica | None:
    """Who gets a request that ends at once."""

    async def ask() -> Replica | None:
        with replicas.borrow(weight, beginning, tried) as replica:
            return replica

    return asyncio.run(ask())


@settings(deadline=None)
@given(st.lists(st.integers(0, 3 * AFFINITY_SLACK), min_size=1, max_size=5), st.binary(min_size=1, max_size=4))
def test_a_beginning_has_a_copy_of_its_own_which_others_relieve(work: list[int], beginning: bytes) -> None:
    replicas = Replicas([f"http://{i}" for i in range(len(work))], 8)
    own = borrowed(replicas, 1, beginning)
    for replica, outstanding in zip(replicas.all, work, strict=True):
        replica.outstanding = outstanding
    found = borrowed(replicas, 1, beginning)
    assert own is not None and found is not None
    assert found is own if own.outstanding <= min(work) + AFFINITY_SLACK else found.outstanding == min(work)
    assert [replica.outstanding for replica in replicas.all] == work, "what was borrowed is given back"
    assert borrowed(replicas, 1, b"").outstanding == min(work)


def test_only_the_beginnings_of_a_copy_that_is_gone_move() -> None:
    replicas = Replicas([f"http://{i}" for i in range(4)], 8)
    beginnings = [bytes([i]) for i in range(200)]
    before = {beginning: borrowed(replicas, 1, beginning) for beginning in beginnings}
    gone = replicas.all.pop(1)
    moved = [beginning for beginning in beginnings if borrowed(replicas, 1, beginning) is not before[beginning]]
    assert moved == [beginning for beginning in beginnings if before[beginning] is gone]
    assert 20 < len(moved) < 80


def test_what_is_no_work_needs_no_room() -> None:
    async def ask() -> None:
        replicas = Replicas(["http://a", "http://b"], 1)
        with ExitStack() as held:
            assert {held.enter_context(replicas.borrow(1, b"x")).base_url for _ in range(2)} == {"http://a", "http://b"}
            assert held.enter_context(replicas.borrow(1, b"x")) is None
            light = held.enter_context(replicas.borrow(0))
            assert light is not None and light.in_flight == 1
            assert held.enter_context(replicas.borrow(0, tried={"http://a", "http://b"})) is None
        assert [replica.in_flight for replica in replicas.all] == [0, 0]

    asyncio.run(ask())
