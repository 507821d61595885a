"""Which search runs, with which settings, and what it chooses in the end."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from xbai.errors import UserError
from xbai.search.beam import beam_search
from xbai.search.dvts import diverse_tree_search, greedy_search
from xbai.search.expander import Expander, Limits, StepSource
from xbai.search.mcts import finished_paths, tree_search
from xbai.search.path import Path, Value, highest, step_value
from xbai.sprm.score import AGGREGATIONS

CHOICES = ("best_of_n", "majority", "weighted_vote")
"""Ways of choosing among whole responses that are sampled independently."""

STEP_SEARCHES = ("beam", "dvts", "mcts")
"""Searches that choose after every step."""

_SETTINGS = {
    **dict.fromkeys(CHOICES, ()),
    **dict.fromkeys(("beam", "dvts"), ("beam_width", "expand", "token_budget", "max_steps", "step_value")),
    "mcts": ("beam_width", "expand", "token_budget", "max_steps", "step_value", "exploration"),
}
RESERVED_SHARE = 0.25
"""Of a token budget: writes the best response to its end where the rest of the budget finished none."""

_DEFAULTS = {"beam_width": 4, "expand": 4, "step_value": "last", "exploration": 1.0}


@dataclass(frozen=True)
class SearchOptions:
    """A search and its settings; None takes the default, where the search has such a setting.

    Attributes:
        name: of `CHOICES` or `STEP_SEARCHES`.
        beam_width: paths kept (beam), subtrees (dvts), leaves expanded at once (mcts).
        expand: samples of a path's next step.
        token_budget: most generated tokens of one search.
        max_steps: from so many steps on a response is written to its end in one go.
        step_value: what paths are ranked by: an aggregation of their step scores, `last` being the newest step's.
        exploration: weight of the bonus for steps with few visits.
    """

    name: str = "best_of_n"
    beam_width: int | None = None
    expand: int | None = None
    token_budget: int | None = None
    max_steps: int | None = None
    step_value: str | None = None
    exploration: float | None = None

    def __post_init__(self) -> None:
        """Refuse what does not fit together, and fill in the defaults."""
        if self.name not in _SETTINGS:
            raise UserError(f"--search {self.name!r}: use one of {', '.join(_SETTINGS)}")
        known = _SETTINGS[self.name]
        for setting, value in asdict(self).items():
            if setting != "name" and value is not None and setting not in known:
                able = [name for name, settings in _SETTINGS.items() if setting in settings]
                raise UserError(f"--{setting} does not act on --search {self.name}, only on {', '.join(able)}")
        if self.step_value is not None and self.step_value not in AGGREGATIONS:
            raise UserError(f"--step_value {self.step_value!r}: use one of {', '.join(AGGREGATIONS)}")
        if self.name == "mcts" and self.token_budget is None:
            raise UserError("--search mcts needs --token_budget: it goes on for as long as there are tokens")
        for setting in known:
            if getattr(self, setting) is None and setting in _DEFAULTS:
                object.__setattr__(self, setting, _DEFAULTS[setting])

    @property
    def is_step_search(self) -> bool:
        """It chooses after every step, not among whole responses."""
        return self.name in STEP_SEARCHES

    def to_dict(self) -> dict[str, Any]:
        """The settings that act, JSON-ready."""
        return {"name": self.name, **{setting: getattr(self, setting) for setting in _SETTINGS[self.name]}}


async def search_response(
    options: SearchOptions, source: StepSource, max_tokens: int, seed: int | None
) -> tuple[Path, int]:
    """Search for the response to one prompt.

    Returns:
        The response of the best trajectory score among those that the search finished (a cut-off one where none is),
        and the tokens generated on the way.
    """
    budget = options.token_budget or sys.maxsize
    limits = Limits(max_tokens, budget, options.max_steps or sys.maxsize, reserve=int(RESERVED_SHARE * budget))
    expander = Expander(source, limits, seed)
    ends = await _ends(options, expander, step_value(options.step_value))
    (best,) = highest(ends, 1, _trajectory_score)
    if best.finish_reason == "length" and best.token_count < max_tokens:
        best = await greedy_search(expander.ending(), 1, _trajectory_score, start=replace(best, finish_reason=None))
    return best, expander.spent


async def _ends(options: SearchOptions, expander: Expander, value: Value) -> list[Path]:
    if options.name == "beam":
        return await beam_search(expander, options.beam_width, options.expand, value)
    if options.name == "dvts":
        return await diverse_tree_search(expander, options.beam_width, options.expand, value)
    tree = await tree_search(expander, options.beam_width, options.expand, value, options.exploration)
    return finished_paths(tree, value)


def _trajectory_score(path: Path) -> float:
    return path.score
