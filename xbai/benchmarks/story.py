"""A story with numbers while it is told: sentences, and the steps that work out its answer."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from xbai.benchmarks.story_words import capitalised, counted

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "x": operator.mul,
    "/": operator.floordiv,
}
ASIDE_RATE = 0.3


@dataclass(frozen=True)
class Story:
    """A question in words.

    Attributes:
        question: the whole text, with what is asked at its end.
        steps: of the worked solution, one an operation, without full stops.
        answer: the result of the last one.
    """

    question: str
    steps: tuple[str, ...]
    answer: int


class Tale:
    """Tells one story.

    Args:
        rng: chooses among wordings.
    """

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self._sentences: list[str] = []
        self._steps: list[str] = []

    def tell(self, *wordings: str) -> None:
        """One more sentence, in one of several wordings."""
        self._sentences.append(f"{capitalised(self.rng.choice(wordings))}.")

    def aside(self, *wordings: str) -> None:
        """Sometimes a sentence whose number the answer does not need."""
        if self.rng.random() < ASIDE_RATE:
            self.tell(*wordings)

    def note(self, step: str) -> None:
        """A step that only takes a number from the text."""
        self._steps.append(capitalised(step))

    def work(self, words: str, left: int, sign: str, right: int, unit: str = "", end: str = "") -> int:
        """A step with one operation, such as `WORDS 3 + 4 = 7 pens END`; returns its result."""
        result = OPERATIONS[sign](left, right)
        named = counted(result, unit) if unit else str(result)
        self.note(f"{words} {left} {sign} {right} = {named}{end}")
        return result

    def ask(self, answer: int, *wordings: str) -> Story:
        """End with a question in one of several wordings."""
        return Story(" ".join([*self._sentences, self.rng.choice(wordings)]), tuple(self._steps), answer)
