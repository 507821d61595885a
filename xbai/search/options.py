"""Which search runs, and with which settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from xbai.aggregation import AGGREGATIONS
from xbai.errors import UserError

CHOICES = ("best_of_n", "majority", "weighted_vote")
"""Ways of choosing among whole responses that are sampled independently."""

STEP_SEARCHES = ("beam", "dvts", "mcts")
"""Searches that choose after every step."""

_SETTINGS = {
    **dict.fromkeys(CHOICES, ()),
    **dict.fromkeys(("beam", "dvts"), ("beam_width", "expand", "token_budget", "max_steps", "step_value")),
    "mcts": ("beam_width", "expand", "token_budget", "max_steps", "step_value", "exploration"),
}
_DEFAULTS = {"beam_width": 4, "expand": 4, "step_value": "last", "exploration": 1.0}


@dataclass(frozen=True)
class SearchOptions:
    """A search and its settings; None takes the default, where the search has such a setting."""

    name: Annotated[str, typer.Option("--search")] = "best_of_n"
    """best_of_n, majority or weighted_vote; or by steps: beam, dvts or mcts."""
    beam_width: Annotated[int | None, typer.Option(min=1)] = None
    """Paths kept (beam), subtrees (dvts), leaves expanded at once (mcts): 4."""
    expand: Annotated[int | None, typer.Option(min=1)] = None
    """Samples of a path's next step: 4."""
    token_budget: Annotated[int | None, typer.Option(min=1)] = None
    """Most generated tokens of one search."""
    max_steps: Annotated[int | None, typer.Option(min=1)] = None
    """Steps after which a response is no longer branched, but written to its end in one go."""
    step_value: str | None = None
    """Ranks paths: last (the newest step's score), geometric, min, product, ..."""
    exploration: Annotated[float | None, typer.Option(min=0)] = None
    """Weight of the bonus for steps with few visits (mcts): 1.0."""

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
