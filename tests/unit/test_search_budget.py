"""The rules that decide how many candidates are sampled, and which are given up."""

import math
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.aggregation import aggregate, running_scores
from xbai.errors import UserError
from xbai.search.agreement import lead_is_right
from xbai.search.budget import parse_budget
from xbai.search.group import CandidateGroup
from xbai.search.posterior import posterior
from xbai.search.prune import Prune
from xbai.search.rule import Candidate, Rule

VALUES = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), max_size=6)
PRUNING = st.builds(
    Prune,
    st.sampled_from([0.25, 0.5, 0.75]),
    st.sets(st.integers(1, 5), min_size=1, max_size=3).map(lambda steps: tuple(sorted(steps))),
)


def ended(score: float, chance: float | None = None, answer: str | None = None, values: tuple[float, ...] = ()):
    return Candidate(values, score, score if chance is None else chance, answer)


@pytest.mark.parametrize(
    "text",
    ["stop:0.9/1", "stop:0.05/8", "posterior:0.95/2", "majority:0.99/4", "prune:0.5@1,2,3", "prune:0.25@4+stop:0.9/8"],
)
def test_a_rule_has_one_form(text):
    assert str(parse_budget(text)) == text


@given(st.integers(1, 999_999), st.integers(1, 9999))
@settings(deadline=None)
def test_thresholds_survive_the_way_through_text(millionths, wave):
    rule = parse_budget(f"stop:{millionths / 1e6:.6f}/{wave}")
    assert parse_budget(str(rule)) == rule
    assert rule.threshold == millionths / 1e6


@pytest.mark.parametrize(
    "text",
    ["", "stop", "stop:", "stop:1", "stop:0", "stop:0.0", "stop:1.5", "stop:0.9/0", "stop:0.9/x", "stop:nan",
     "stop:0.9 ", "stop:0.9+prune:0.5@1", "stop:0.9+stop:0.8", "+stop:0.9", "prune:0.5", "prune:0.5@", "prune:0.5@0",
     "prune:0.5@2,1", "prune:0.5@1,1", "prune:1@1", "prune:0.5@1+prune:0.5@2", "prune:0.5@1+", "beam:0.5"],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_the_forms(text):
    with pytest.raises(UserError, match="budget"):
        parse_budget(text)


def test_stop_goes_on_in_waves_until_a_chance_is_above_the_threshold():
    rule = parse_budget("stop:0.9/4")
    assert rule.begin([], 32) == 4
    assert rule.begin([ended(0.9)], 3) == 3
    assert rule.begin([ended(0.95, chance=0.2), ended(0.1, chance=0.91)], 28) == 0


def test_something_begins_however_little_is_enough():
    assert [parse_budget(f"{name}:0.1/2").begin([], 32) for name in ("stop", "posterior", "majority")] == [2, 2, 2]


def test_without_a_rule_all_begin_at_once_and_the_best_is_chosen():
    assert Rule().begin([], 32) == 32
    assert Rule().choose([ended(0.2), ended(0.8), ended(0.8)]) == 1


@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.sampled_from(["a", "b", None])), max_size=6))
@settings(deadline=None)
def test_the_posterior_is_that_of_independent_witnesses(seen):
    """Reference: every world in which one answer is right, or none, weighed by what each witness says of it."""
    worlds = {
        right: math.prod(chance if answer == right else 1 - chance for chance, answer in seen if answer is not None)
        for right in ["a", "b", "none"]
    }
    found = posterior([ended(chance, chance, answer) for chance, answer in seen])
    given_answers = {answer for _, answer in seen if answer is not None}
    total = sum(weight for right, weight in worlds.items() if right in given_answers | {"none"})
    assert found == pytest.approx({answer: worlds[answer] / total for answer in given_answers})


def test_the_posterior_chooses_within_the_leading_answer():
    rule = parse_budget("posterior:0.9/2")
    candidates = [ended(0.7, 0.7, "a"), ended(0.8, 0.8, "b"), ended(0.75, 0.75, "a")]
    assert rule.choose(candidates) == 2
    assert rule.begin(candidates, 29) == 2
    assert rule.begin([ended(0.9, 0.9, "a"), ended(0.9, 0.9, "a")], 30) == 0
    assert rule.choose([ended(0.2, 0.2, None), ended(0.3, 0.3, None)]) == 1


@pytest.mark.parametrize(("first", "second"), list(combinations_with_replacement(range(5), 2)))
def test_the_lead_is_the_integral_of_its_beta_distribution(first, second):
    points = [(2 * i + 1) / 20_000 for i in range(10_000)]
    density = [x**second * (1 - x) ** first for x in points]
    above = sum(value for x, value in zip(points, density, strict=True) if x > 0.5)
    assert lead_is_right(second, first) == pytest.approx(above / sum(density), abs=1e-4)


def test_majority_stops_where_the_lead_is_sure():
    rule = parse_budget("majority:0.9/1")
    same = [ended(0.5, answer="a")]
    assert [rule.begin(same * votes, 8) for votes in (0, 1, 2, 3)] == [1, 1, 1, 0]
    assert rule.choose([ended(0.1, answer="a"), ended(0.9, answer="b"), ended(0.2, answer="a")]) == 2


def test_halving_keeps_the_better_half_after_each_number_of_steps():
    wave = [Candidate(values, values[-1]) for values in ([0.1, 0.9], [0.2, 0.2], [0.8, 0.3], [0.7, 0.4])]
    assert Prune(0.5, (1, 2)).pruned(wave) == {0: 1, 1: 1, 2: 2}


def test_what_ended_before_the_step_is_never_pruned_but_holds_a_place():
    wave = [Candidate([0.1], 0.1), Candidate([0.9], 0.9), Candidate([0.3, 0.3]), Candidate([0.4, 0.4])]
    assert Prune(0.5, (2,)).pruned(wave) == {2: 2}


@given(st.lists(st.tuples(VALUES, st.integers(0, 6)), min_size=1, max_size=8), PRUNING)
@settings(deadline=None)
def test_what_is_pruned_does_not_depend_on_who_was_faster(candidates, rule):
    """What is pruned in any state on the way is part of what is pruned once all have ended, after the same steps."""
    whole = [Candidate(values, values[-1] if values else 0.0) for values, _ in candidates]
    on_the_way = [
        Candidate(values[:seen]) if seen <= len(values) else Candidate(values, values[-1] if values else 0.0)
        for values, seen in candidates
    ]
    at_the_end = rule.pruned(whole)
    assert rule.pruned(on_the_way).items() <= at_the_end.items()
    assert all(len(candidates[number][0]) >= steps for number, steps in at_the_end.items())
    assert len(at_the_end) < len(whole)


@given(st.lists(VALUES, min_size=1, max_size=8), PRUNING)
@settings(deadline=None)
def test_the_best_after_a_step_outlives_it(values, rule):
    wave = [Candidate(each, each[-1] if each else 0.0) for each in values]
    first = rule.steps[0]
    out = [number for number, steps in rule.pruned(wave).items() if steps == first]
    after = [each[:first][-1] if each else -math.inf for each in values]
    assert all(
        after[number] <= after[other]
        for number in out
        for other in range(len(values))
        if other not in out and len(values[other]) >= first
    )


def test_a_group_begins_prunes_and_ends_wave_after_wave():
    group = CandidateGroup(parse_budget("prune:0.5@1+stop:0.9/4"), 10, chance=lambda score: score**2)
    waves = []
    while wave := group.begin():
        first = 0.95 if len(waves) == 1 else 0.94  # Squared above 0.9, and below.
        values = [[0.1], [0.2], [0.3], [first]]
        assert group.prune([Candidate([])] * 4) == []
        assert group.prune([Candidate(each) for each in values]) == [wave[0], wave[1]]
        group.end([Candidate(each, each[-1]) for each in values])
        waves.append(wave)
    assert waves == [range(4), range(4, 8)]
    assert group.pruned == dict.fromkeys([0, 1, 4, 5], 1)
    assert group.ended[7].chance == pytest.approx(0.95**2)
    assert group.choose() == 7


def test_the_last_wave_is_what_is_left():
    group = CandidateGroup(parse_budget("stop:0.9/4"), 6, chance=lambda score: score)
    waves = []
    while wave := group.begin():
        group.end([ended(0.5)] * len(wave))
        waves.append(len(wave))
    assert waves == [4, 2]
    assert group.choose() == 0


@given(st.lists(st.one_of(st.floats(0.001, 1), st.just(0.0)), min_size=1, max_size=8))
@settings(deadline=None)
def test_running_scores_are_those_of_what_is_written_so_far(step_scores):
    expected = [aggregate(step_scores[:count]) for count in range(1, len(step_scores) + 1)]
    assert running_scores(step_scores) == pytest.approx(expected, rel=1e-9)
