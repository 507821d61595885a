"""The step-level searches on synthetic trees whose every step score is known, against brute force."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.errors import UserError
from xbai.search.expander import Continuation, Expander, SearchLimits
from xbai.search.mcts import Node, finished_paths, tree_search
from xbai.search.options import SearchOptions
from xbai.search.path import SearchPath, highest, step_value
from xbai.search.strategy import beam_search, diverse_tree_search, search_response

BRANCHES, DEPTH, STEP_TOKENS = 3, 3, 10
ROOM = 1000
GEOMETRIC, LAST = step_value("geometric"), step_value("last")


class Tree:
    """Responses of `DEPTH` steps, each one of `BRANCHES` letters of `STEP_TOKENS` tokens; every node has its score.

    Samples of one node take its branches in turn; a request of too few tokens is cut within its step.
    """

    def __init__(self, seed: int = 0, depth: int = DEPTH, branches: int = BRANCHES) -> None:
        self.depth = depth
        self.letters = "abcdefgh"[:branches]
        self.generated = 0
        self.requests: list[tuple[str, int | None]] = []
        self._rng = random.Random(seed)
        self._turns: dict[str, int] = {}
        self.scores = {
            "".join(path): self._rng.uniform(0.01, 0.99)
            for length in range(1, depth + 1)
            for path in itertools.product(self.letters, repeat=length)
        }

    async def write_on(self, path: SearchPath, max_tokens: int, to_end: bool, seed: int | None) -> Continuation:
        assert path.open
        assert max_tokens > 0
        self.requests.append((path.text, seed))
        text, tokens, left = path.text, path.token_count, max_tokens
        while True:
            needed = STEP_TOKENS - tokens % STEP_TOKENS
            if left < needed:
                return self._grown(path, text, tokens + left, None)
            tokens, left = tokens + needed, left - needed
            turn = self._turns.setdefault(text, 0)
            self._turns[text] += 1
            text += self.letters[turn % len(self.letters)]
            await asyncio.sleep(0)
            if len(text) == self.depth or not to_end:
                return self._grown(path, text, tokens, "stop" if len(text) == self.depth else None)

    def _grown(self, path: SearchPath, text: str, tokens: int, finish_reason: str | None) -> Continuation:
        self.generated += tokens - path.token_count
        scores = tuple(self.scores[text[: i + 1]] for i in range(len(text)))
        return Continuation(SearchPath(text, tokens, scores, finish_reason), tokens - path.token_count)

    def leaves(self) -> list[SearchPath]:
        """All whole responses."""
        texts = [text for text in self.scores if len(text) == self.depth]
        return [
            SearchPath(text, 0, tuple(self.scores[text[: i + 1]] for i in range(self.depth)), "stop") for text in texts
        ]


def expander(tree: Tree, budget: int = 10**9, **limits: int) -> Expander:
    return Expander(tree, SearchLimits(limits.pop("max_tokens", ROOM), budget, **limits), seed=0)


seeds = st.integers(0, 2**32)
briefly = settings(max_examples=25, deadline=None)


@briefly
@given(seeds)
def test_a_beam_without_bound_finds_the_best_response(seed: int) -> None:
    tree = Tree(seed)
    best = asyncio.run(beam_search(expander(tree), BRANCHES**DEPTH, BRANCHES, GEOMETRIC))[0]
    assert best.score == max(path.score for path in tree.leaves())


@briefly
@given(seeds, st.integers(1, 4))
def test_a_beam_keeps_what_step_by_step_pruning_keeps(seed: int, width: int) -> None:
    tree = Tree(seed)
    kept = [""]
    for _ in range(DEPTH):
        children = [text + letter for text in kept for letter in tree.letters]
        kept = sorted(children, key=tree.scores.__getitem__, reverse=True)[:width]
    beam = asyncio.run(beam_search(expander(tree), width, BRANCHES, LAST))
    assert [path.text for path in beam] == kept


@briefly
@given(seeds, st.integers(1, 4), st.integers(1, 5))
def test_subtrees_never_mix(seed: int, subtrees: int, expand: int) -> None:
    tree = Tree(seed)
    ends = asyncio.run(diverse_tree_search(expander(tree), subtrees, expand, LAST))
    assert 1 <= len(ends) <= subtrees
    # Every subtree samples `expand` steps of a single path at each depth, whatever the others do.
    for depth in range(DEPTH):
        asked = [text for text, _ in tree.requests if len(text) == depth]
        assert len(asked) == subtrees * expand
    assert len({seed for _, seed in tree.requests}) == len(tree.requests)


@briefly
@given(seeds)
def test_one_subtree_goes_greedily(seed: int) -> None:
    tree, text = Tree(seed), ""
    (end,) = asyncio.run(diverse_tree_search(expander(tree), 1, BRANCHES, LAST))
    for _ in range(DEPTH):
        text = max((text + letter for letter in tree.letters), key=tree.scores.__getitem__)
    assert end.text == text


def nodes_of(root: Node) -> list[Node]:
    return [root, *(node for child in root.children for node in nodes_of(child))]


@briefly
@given(seeds, st.integers(1, 4), st.integers(1, 40))
def test_visits_and_values_of_a_tree_add_up(seed: int, width: int, steps: int) -> None:
    tree = Tree(seed)
    searched = expander(tree, budget=steps * STEP_TOKENS)
    root = asyncio.run(tree_search(searched, width, BRANCHES, LAST, exploration=1.0))
    for node in nodes_of(root):
        own = 0 if node is root else 1
        worth = 0.0 if own == 0 or node.path.finish_reason == "length" else LAST(node.path)
        assert node.visits == own + sum(child.visits for child in node.children)
        assert node.total == pytest.approx(worth + sum(child.total for child in node.children))
        if node.children:
            assert sum(child.prior for child in node.children) == pytest.approx(1)
        assert node.closed


@briefly
@given(seeds)
def test_tree_search_with_enough_budget_sees_every_response(seed: int) -> None:
    tree = Tree(seed)
    root = asyncio.run(tree_search(expander(tree), 2, BRANCHES, LAST, exploration=1.0))
    ends = finished_paths(root, GEOMETRIC)
    assert {path.text for path in ends} == {path.text for path in tree.leaves()}
    assert ends[0].score == max(path.score for path in tree.leaves())


@briefly
@given(seeds)
def test_tree_search_converges_to_the_best_child(seed: int) -> None:
    tree = Tree(seed, depth=6)
    good = tree.letters[seed % BRANCHES]
    tree.scores = {text: 0.9 if text[0] == good else 0.2 for text in tree.scores}
    root = asyncio.run(tree_search(expander(tree, budget=100 * STEP_TOKENS), 1, BRANCHES, LAST, exploration=1.0))
    visits = {child.path.text: child.visits for child in root.children}
    assert max(visits, key=visits.__getitem__) == good
    assert visits[good] > 0.8 * sum(visits.values())


@briefly
@given(
    seeds,
    st.sampled_from(["beam", "dvts", "mcts"]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 2000),
    st.integers(1, 60),
)
def test_the_budget_is_never_exceeded(
    seed: int, name: str, width: int, expand: int, budget: int, max_tokens: int
) -> None:
    tree = Tree(seed)
    options = SearchOptions(name, beam_width=width, expand=expand, token_budget=budget)
    path, spent = asyncio.run(search_response(options, tree, max_tokens, seed=1))
    assert spent == tree.generated <= budget
    assert path.token_count <= max_tokens
    assert path.finish_reason == ("stop" if len(path.text) == DEPTH else "length")


@pytest.mark.parametrize("name", ["beam", "dvts", "mcts"])
def test_a_finished_response_is_preferred_to_a_cut_off_one(name: str) -> None:
    options = SearchOptions(name, beam_width=2, expand=2, token_budget=240)
    for seed in range(20):
        path, _ = asyncio.run(search_response(options, Tree(seed), ROOM, seed=0))
        assert path.finish_reason == "stop"


@pytest.mark.parametrize("name", ["beam", "dvts", "mcts"])
def test_a_search_asks_for_the_same_again(name: str) -> None:
    options = SearchOptions(name, token_budget=700)
    runs = []
    for seed in (5, 5, 6, None):
        tree = Tree()
        asyncio.run(search_response(options, tree, ROOM, seed))
        runs.append(tree.requests)
    assert runs[0] == runs[1]
    assert not {seed for _, seed in runs[0]} & {seed for _, seed in runs[2]}
    assert {seed for _, seed in runs[3]} == {None}


def test_after_so_many_steps_a_response_is_written_to_its_end() -> None:
    tree = Tree(depth=4)
    (end,) = asyncio.run(diverse_tree_search(expander(tree, max_steps=2), 1, 2, LAST))
    assert len(end.text) == 4
    assert {len(text) for text, _ in tree.requests} == {0, 1, 2}


def test_all_requests_of_a_round_are_in_flight_at_once() -> None:
    class Gate(Tree):
        waiting = most = 0

        async def write_on(self, path: SearchPath, max_tokens: int, to_end: bool, seed: int | None) -> Continuation:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            await asyncio.sleep(0.001)
            self.waiting -= 1
            return await super().write_on(path, max_tokens, to_end, seed)

    for search, at_once in ((beam_search, 12), (diverse_tree_search, 12)):
        tree = Gate()
        asyncio.run(search(expander(tree), 4, 3, LAST))
        assert tree.most == at_once
    tree = Gate()
    asyncio.run(tree_search(expander(tree), 4, 3, LAST, 1.0))
    assert tree.most == 12


def test_shares_that_are_not_used_go_to_steps_that_were_cut() -> None:
    tree = Tree()
    extended = asyncio.run(
        expander(tree, budget=4 * STEP_TOKENS + 5, max_tokens=STEP_TOKENS + 4).extend([SearchPath()] * 4)
    )
    assert [path.finish_reason for path in extended] == [None] * 4
    longer = Tree()
    longer.scores = {}
    cut = asyncio.run(expander(longer, budget=4 * (STEP_TOKENS - 1)).extend([SearchPath()] * 4))
    assert [path.finish_reason for path in cut] == ["length"] * 4
    assert longer.generated == 4 * (STEP_TOKENS - 1)


def test_equal_responses_count_once_and_the_cut_off_come_last() -> None:
    good, poor = SearchPath("good", step_scores=(0.9,)), SearchPath("poor", step_scores=(0.1,))
    cut = SearchPath("cut", step_scores=(0.99,), finish_reason="length")
    assert highest([cut, poor, good, replace(good)], 9, GEOMETRIC) == [good, poor, cut]
    assert highest([cut, poor, good], 1, GEOMETRIC) == [good]
    assert math.isclose(SearchPath(step_scores=(0.4, 0.9)).score, 0.6)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"name": "beams"}, "--search 'beams': use one of best_of_n"),
        ({"name": "best_of_n", "expand": 2}, "--expand does not act on --search best_of_n, only on beam, dvts, mcts"),
        ({"name": "beam", "exploration": 1.0}, "--exploration does not act on --search beam, only on mcts"),
        ({"name": "dvts", "step_value": "mean"}, "--step_value 'mean': use one of geometric"),
        ({"name": "mcts"}, "--search mcts needs --token_budget"),
    ],
)
def test_settings_that_do_not_fit_are_refused(chosen: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        SearchOptions(**chosen)


def test_only_settings_that_act_are_kept() -> None:
    assert SearchOptions().to_dict() == {"name": "best_of_n"}
    assert SearchOptions("beam", expand=2).to_dict() == {
        "name": "beam",
        "beam_width": 4,
        "expand": 2,
        "token_budget": None,
        "max_steps": None,
        "step_value": "last",
    }
