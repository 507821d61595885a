"""Searches that choose after every step. That over a tree has a module of its own, `mcts.py`."""

from __future__ import annotations

import sys
from dataclasses import replace
from operator import attrgetter

from xbai.search.expander import Expander, SearchLimits, StepSource, together
from xbai.search.mcts import finished_paths, tree_search
from xbai.search.options import SearchOptions
from xbai.search.path import ROOT, SearchPath, Value, highest, step_value

RESERVED_SHARE = 0.25
"""Of a token budget: writes the best response to its end where the rest of the budget finished none."""
TRAJECTORY_SCORE: Value = attrgetter("score")


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
    (best,) = highest(await _ends(options, expander), 1, TRAJECTORY_SCORE)
    if best.finish_reason == "length" and best.token_count < max_tokens:
        best = await greedy_search(expander.ending(), 1, TRAJECTORY_SCORE, start=replace(best, finish_reason=None))
    return best, expander.spent


async def _ends(options: SearchOptions, expander: Expander) -> list[SearchPath]:
    settings = options.to_dict()
    width, expand, value = settings["beam_width"], settings["expand"], step_value(settings["step_value"])
    if options.name == "beam":
        return await beam_search(expander, width, expand, value)
    if options.name == "dvts":
        return await diverse_tree_search(expander, width, expand, value)
    return finished_paths(await tree_search(expander, width, expand, value, settings["exploration"]), value)


async def beam_search(expander: Expander, width: int, expand: int, value: Value) -> list[SearchPath]:
    """Beam search (arXiv 2408.03314, section 5.2): sample `expand` next steps of each of `width` paths, keep the
    `width` best of all; until all have ended. Finished paths hold their place for as long as they are among the best.

    Returns:
        The finished paths, best first.
    """
    beam = [ROOT] * width
    while any(path.open for path in beam):
        finished = [path for path in beam if not path.open]
        children = await expander.extend([path for path in beam if path.open for _ in range(expand)])
        beam = highest([*finished, *children], width, value)
    return beam


async def diverse_tree_search(expander: Expander, subtrees: int, expand: int, value: Value) -> list[SearchPath]:
    """Diverse verifier tree search: greedy search in subtrees side by side, whose paths never compete on the way, each
    on a budget of its own.

    Returns:
        The end of each subtree's path, best first.
    """
    ends = await together(greedy_search(part, expand, value) for part in expander.split(subtrees))
    return highest(ends, subtrees, value)


async def greedy_search(expander: Expander, expand: int, value: Value, start: SearchPath = ROOT) -> SearchPath:
    """Sample `expand` next steps, go on with the best; until the end."""
    path = start
    while path.open:
        (path,) = highest(await expander.extend([path] * expand), 1, value)
    return path
