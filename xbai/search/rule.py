"""What decides how many candidates a question gets, and which of them are worth finishing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from xbai.search.choice import best_candidate


@dataclass(frozen=True)
class Candidate:
    """One response to a question, as far as it is written.

    Attributes:
        values: what it is worth after each of its steps: by the score head, the trajectory score so far.
        score: what it is worth as a whole; None while it is written.
        chance: the calibrated probability that a response of this score is right; None while it is written, and where
            there is no calibration.
        answer: the same for equal answers; None where it has none, or nobody asked.
    """

    values: Sequence[float]
    score: float | None = None
    chance: float | None = None
    answer: str | None = None

    @property
    def has_ended(self) -> bool:
        """It is whole."""
        return self.score is not None


class Rule:
    """Candidates begin in waves, each when nothing of the earlier ones is written any more, and are pruned within them.

    A rule decides by scores alone, never by time: whatever else the engine has to do, the same candidates begin, and
    the same are pruned after the same steps. This one has all candidates written to their ends.
    """

    @property
    def needs_chance(self) -> bool:
        """It asks for the `chance` of ended candidates."""
        return False

    @property
    def needs_answers(self) -> bool:
        """It asks for the `answer` of ended candidates."""
        return False

    @property
    def prunes(self) -> bool:
        """`pruned` may name some."""
        return False

    def begin(self, ended: Sequence[Candidate], left: int) -> int:
        """How many of the candidates that are left are to begin; none: the question has had enough.

        Args:
            ended: those of the waves before that were not pruned, in their order.
            left: how many there may still be, at least one.
        """
        return left

    def certainty(self, ended: Sequence[Candidate]) -> float:
        """How sure it is of what it would choose of these (at least one), between 0 and 1."""
        return 0.0

    def pruned(self, wave: Sequence[Candidate]) -> Mapping[int, int]:
        """Which candidates of a wave are not worth more tokens, each with the number of steps after which it was not.

        One counts as pruned at that step, even where it has ended since. Candidates that go on never change what was
        decided of others.
        """
        return {}

    def choose(self, ended: Sequence[Candidate]) -> int:
        """Which of the candidates (at least one) that ended is the response."""
        return best_candidate([candidate.score for candidate in ended])

    def __str__(self) -> str:
        """As `parse_budget` reads it."""
        return "all"


@dataclass(frozen=True)
class Stopping(Rule):
    """Begins `wave` candidates at once until it is sure enough.

    Attributes:
        name: of the kind of rule, in a budget.
    """

    name: ClassVar[str]
    threshold: float
    wave: int = 1

    def begin(self, ended: Sequence[Candidate], left: int) -> int:
        """See `Rule`."""
        return 0 if ended and self.certainty(ended) > self.threshold else min(self.wave, left)

    def __str__(self) -> str:
        """As `parse_budget` reads it."""
        return f"{self.name}:{decimals(self.threshold)}/{self.wave}"


def decimals(share: float) -> str:
    """A share as `parse_budget` reads it."""
    return f"{share:.6f}".rstrip("0")
