"""Runs a search that chooses after every step."""

from __future__ import annotations

import sys
from dataclasses import replace

from xbai.search.beam import beam_search
from xbai.search.dvts import diverse_tree_search, greedy_search
from xbai.search.expander import Expander, SearchLimits, StepSource
from xbai.search.mcts import finished_paths, tree_search
from xbai.search.options import SearchOptions
from xbai.search.path import SearchPath, highest, step_value

RESERVED_SHARE = 0.25
"""Of a token budget: writes the best response to its end where the rest of the budget finished none."""


async def search_response(
    options: SearchOptions, source: StepSource, max_tokens: int, seed: int | None
) -> tuple[SearchPath, int]:
    """Search for the response to one prompt.

    Returns:
        The response of the best trajectory score among those that the search finished (a cut-off one where none is),
        and the tokens generated on the way.
    """
    budget = options.token_budget or sys.maxsize
    limits = SearchLimits(max_tokens, budget, options.max_steps or sys.maxsize, reserve=int(RESERVED_SHARE * budget))
    expander = Expander(source, limits, seed)
    ends = await _ends(options, expander)
    (best,) = highest(ends, 1, _trajectory_score)
    if best.finish_reason == "length" and best.token_count < max_tokens:
        best = await greedy_search(expander.ending(), 1, _trajectory_score, start=replace(best, finish_reason=None))
    return best, expander.spent


async def _ends(options: SearchOptions, expander: Expander) -> list[SearchPath]:
    settings = options.to_dict()
    width, expand, value = settings["beam_width"], settings["expand"], step_value(settings["step_value"])
    if options.name == "beam":
        return await beam_search(expander, width, expand, value)
    if options.name == "dvts":
        return await diverse_tree_search(expander, width, expand, value)
    return finished_paths(await tree_search(expander, width, expand, value, settings["exploration"]), value)


def _trajectory_score(path: SearchPath) -> float:
    return path.score
