"""Which responses to a question vote together: those whose answers the grader calls equal."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import combinations

from xbai.grading.boxed import final_answer
from xbai.grading.dispatch import GradeRequest, answer_key, compare, has_exact_keys
from xbai.grading.math_key import is_plain, key_of_answer, surely_differ, text_key
from xbai.grading.pool import GraderPool

logger = logging.getLogger(__name__)

Pair = tuple[str, str]


class AnswerGroups(AbstractContextManager["AnswerGroups"]):
    """Groups of equal answers. Mathematical answers are compared in killable processes, which start when needed.

    Answers with the same key are equal; of different keys, those that the grader calls equal, whichever of the two is
    taken for the right one, and so on from answer to answer (transitive closure: 20 % joins 20 and 0.2). The right
    answer takes no part. What cannot be compared votes apart. Use as a context manager.

    Args:
        data_source: names the grader.
        workers: processes; the machine's cores when not given.
        timeout_s: limit for one comparison.
    """

    def __init__(self, data_source: str, workers: int | None = None, timeout_s: float = 10.0) -> None:
        self._data_source = data_source
        self._exact = has_exact_keys(data_source)
        self._pool = GraderPool(workers, timeout_s, grader=compare, failure_level=logging.DEBUG)
        self._keys: dict[str, str] = {}
        self._unreadable: set[str] = set()
        self._equal: dict[Pair, bool] = {}

    def of(self, questions: Iterable[Sequence[str]]) -> list[list[str | None]]:
        """For each response of each question the group that it votes for, by the key of one answer in it; None: none.

        Raises:
            UserError: no grader goes by the data source's name.
        """
        if self._exact:
            return [[answer_key(self._data_source, response) for response in responses] for responses in questions]
        answers = [[final_answer(response) for response in responses] for responses in questions]
        known_failures = self._pool.failures.copy()
        self._find_keys({answer for of_question in answers for answer in of_question if answer is not None})
        plainest = [self._plainest(of_question) for of_question in answers]
        self._compare(pair for by_key in plainest for pair in self._pairs(by_key))
        if failures := self._pool.failures - known_failures:
            reasons = ", ".join(f"{count} {reason}" for reason, count in failures.items())
            logger.warning("comparisons of answers that failed: %s; these answers vote apart", reasons)
        groups = [self._joined(by_key) for by_key in plainest]
        return [
            [None if answer is None else group[self._keys[answer]] for answer in of_question]
            for of_question, group in zip(answers, groups, strict=True)
        ]

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _find_keys(self, answers: set[str]) -> None:
        missing = sorted(answers - self._keys.keys())
        self._keys |= {answer: key_of_answer(answer) for answer in missing if is_plain(answer)}
        asked = [answer for answer in missing if answer not in self._keys]
        futures = [self._pool.submit(GradeRequest(self._data_source, _boxed(answer), None)) for answer in asked]
        for answer, future in zip(asked, futures, strict=True):
            grade = future.result()
            if grade.value is None:
                self._unreadable.add(answer)
            self._keys[answer] = grade.extras.get("key") or text_key(answer)

    def _plainest(self, answers: Sequence[str | None]) -> dict[str, str]:
        """For each key the answer to compare: the shortest, since names and degrees are more to differ in."""
        found: dict[str, str] = {}
        for answer in sorted({answer for answer in answers if answer is not None}, key=lambda text: (len(text), text)):
            found.setdefault(self._keys[answer], answer)
        return found

    def _pairs(self, by_key: dict[str, str]) -> list[Pair]:
        """Answers of different keys of which only the grader knows whether they are equal."""
        return [
            (by_key[key], by_key[other])
            for key, other in combinations(sorted(by_key), 2)
            if not surely_differ(key, other) and self._unreadable.isdisjoint((by_key[key], by_key[other]))
        ]

    def _compare(self, pairs: Iterable[Pair]) -> None:
        asked = [pair for pair in dict.fromkeys(pairs) if pair not in self._equal]
        futures = [self._pool.submit(GradeRequest(self._data_source, _boxed(a), _boxed(b))) for a, b in asked]
        self._equal |= {pair: future.result().value == 1.0 for pair, future in zip(asked, futures, strict=True)}

    def _joined(self, by_key: dict[str, str]) -> dict[str, str]:
        """Each key's group, by the smallest key in it."""
        group = {key: key for key in by_key}
        for pair in self._pairs(by_key):
            if self._equal[pair]:
                kept, dropped = sorted(group[self._keys[answer]] for answer in pair)
                group = {key: kept if name == dropped else name for key, name in group.items()}
        return group


def _boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"
