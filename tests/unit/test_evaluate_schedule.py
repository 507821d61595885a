"""Which requests are made, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xbai.infer.schedule import Schedule, missing_requests
from xbai.results.lines import StoredQuestion

QUESTIONS = [StoredQuestion(index, f"p{index}", "", {}) for index in range(3)]
KEYS = [(question.index, sample) for question in QUESTIONS for sample in range(6)]


@given(present=st.sets(st.sampled_from(KEYS)), response_num=st.integers(1, 8))
def test_every_missing_sample_is_asked_for_once_at_its_place_in_its_request(present: set, response_num: int) -> None:
    requests = list(missing_requests(QUESTIONS, present, 6, response_num))
    wanted = [key for request in requests for key in request.keys]
    assert sorted(wanted) == sorted(set(KEYS) - present)
    for request in requests:
        assert request.first_sample % response_num == 0
        assert request.missing[-1] - request.first_sample + 1 == request.count <= response_num


@given(data=st.data())
def test_each_request_is_handed_out_once_whatever_is_learned_meanwhile(data: st.DataObject) -> None:
    requests = list(missing_requests(QUESTIONS, (), 6, 1))
    schedule, taken = Schedule(requests), []
    while schedule:
        taken.append(schedule.take())
        if data.draw(st.booleans()):
            schedule.finished(data.draw(st.sampled_from(taken)), data.draw(st.floats(0, 100)))
    assert sorted(request.keys for request in taken) == sorted(request.keys for request in requests)


def test_breadth_first_then_the_slow_before_the_fast() -> None:
    schedule = Schedule(list(missing_requests(QUESTIONS, (), 4, 1)))
    first = [schedule.take() for _ in range(4)]
    assert [request.question.index for request in first] == [0, 1, 2, 0]
    schedule.finished(first[1], 9.0)
    schedule.finished(first[0], 3.0)
    following = [schedule.take().question.index for _ in range(len(schedule))]
    assert following == [2, 2, 2, 1, 1, 1, 0, 0]
