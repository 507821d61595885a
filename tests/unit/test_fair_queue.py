"""Whose turn it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xbai.serve.engine_thread import FairQueue


def drain(queue: FairQueue[str]) -> str:
    return " ".join(queue.get() for _ in range(len(queue)))


def test_clients_take_turns_and_so_do_the_requests_of_each() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("a", "1", (f"a1.{i}" for i in range(4)))
    queue.put("a", "2", ["a2.0"])
    queue.put("b", "3", ["b3.0", "b3.1", "b3.2"])
    assert drain(queue) == "a1.0 b3.0 a2.0 b3.1 a1.1 b3.2 a1.2 a1.3"


def test_what_is_removed_has_no_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for request in "12":
        queue.put("a", request, [f"a{request}.{i}" for i in range(3)])
    assert queue.get() == "a1.0"
    queue.remove("a", "1")
    queue.remove("nobody", "1")
    assert len(queue) == 3
    assert drain(queue) == "a2.0 a2.1 a2.2"
    queue.remove("a", "2")
    assert len(queue) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), max_size=12))
def test_everything_comes_out_once_in_its_order(requests: list[tuple[str, int]]) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for number, (client, count) in enumerate(requests):
        queue.put(client, str(number), [(number, i) for i in range(count)])
    taken = [queue.get() for _ in range(len(queue))]
    for number, (_, count) in enumerate(requests):
        assert [i for request, i in taken if request == number] == list(range(count))
