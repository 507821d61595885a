"""Rules as people write them: `stop:0.9/4`, `prune:0.5@1,2,3+stop:0.9/8`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xbai.errors import UserError
from xbai.search.agreement import Agreement
from xbai.search.posterior import Posterior
from xbai.search.prune import Prune
from xbai.search.rule import Candidate, Rule, Stopping
from xbai.search.stop import Stop

STOPPING: dict[str, type[Stopping]] = {kind.name: kind for kind in (Stop, Posterior, Agreement)}
FORMS = (
    "stop:CHANCE[/WAVE], posterior:CHANCE[/WAVE], majority:CHANCE[/WAVE], prune:SHARE@STEPS,STEPS,... or "
    "prune:...+stop:..., with chances and shares between 0 and 1, as stop:0.9/2 or prune:0.5@1,2,3+stop:0.9/8"
)

_STOPPING = re.compile(rf"({'|'.join(STOPPING)}):(0?\.\d{{1,6}})(?:/([1-9]\d{{0,3}}))?")
_PRUNING = re.compile(r"prune:(0?\.\d{1,6})@([1-9]\d{0,5}(?:,[1-9]\d{0,5}){0,31})")


@dataclass(frozen=True)
class Together(Rule):
    """One rule says what begins and what is chosen, the other what is pruned of it."""

    pruning: Rule
    stopping: Rule

    @property
    def needs_chance(self) -> bool:
        """See `Rule`."""
        return self.stopping.needs_chance

    @property
    def needs_answers(self) -> bool:
        """See `Rule`."""
        return self.stopping.needs_answers

    @property
    def prunes(self) -> bool:
        """See `Rule`."""
        return self.pruning.prunes

    def begin(self, ended: Sequence[Candidate], left: int) -> int:
        """See `Rule`."""
        return self.stopping.begin(ended, left)

    def certainty(self, ended: Sequence[Candidate]) -> float:
        """See `Rule`."""
        return self.stopping.certainty(ended)

    def pruned(self, wave: Sequence[Candidate]) -> Mapping[int, int]:
        """See `Rule`."""
        return self.pruning.pruned(wave)

    def choose(self, ended: Sequence[Candidate]) -> int:
        """See `Rule`."""
        return self.stopping.choose(ended)

    def __str__(self) -> str:
        """As `parse_budget` reads it."""
        return f"{self.pruning}+{self.stopping}"


def parse_budget(text: str) -> Rule:
    """The rule that a text names; its `str` is the same rule in its one form.

    Raises:
        UserError: it names none.
    """
    pruning, plus, stopping = text.rpartition("+")
    if plus:
        return Together(_pruning(pruning), _stopping(stopping))
    return _pruning(text) if text.startswith("prune") else _stopping(text)


def _stopping(text: str) -> Rule:
    if (match := _STOPPING.fullmatch(text)) is None:
        raise UserError(f"budget {text!r:.80}: write {FORMS}")
    name, threshold, wave = match.groups()
    return STOPPING[name](_share(threshold, text), int(wave or 1))


def _pruning(text: str) -> Rule:
    if (match := _PRUNING.fullmatch(text)) is None:
        raise UserError(f"budget {text!r:.80}: write {FORMS}")
    steps = tuple(map(int, match[2].split(",")))
    if list(steps) != sorted(set(steps)):
        raise UserError(f"budget {text!r:.80}: numbers of steps must ascend")
    return Prune(_share(match[1], text), steps)


def _share(digits: str, text: str) -> float:
    if not 0 < (share := float(digits)) < 1:
        raise UserError(f"budget {text!r:.80}: {digits} is not between 0 and 1")
    return share
