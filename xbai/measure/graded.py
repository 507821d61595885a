"""Result lines turned into what is measured: for each question the scores, grades and votes of its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np

from xbai.aggregation import aggregate
from xbai.benchmarks.base import Question
from xbai.benchmarks.registry import get_benchmark
from xbai.grading import AnswerGroups, GradeRequest, GraderPool
from xbai.measure.estimators import votes_for
from xbai.results.lines import REFUSED, ResultLine, Sample
from xbai.search.choice import sortable_scores

QuestionKey = tuple[int | None, str]
"""What identifies a question, whichever model answers it: its place in the benchmark (where known) and its text."""


@dataclass(frozen=True)
class GradedQuestion:
    """The candidates for one question, K in number.

    Attributes:
        key: which question.
        scores: [K] trajectory scores, -inf where there is none.
        correct: [K] 1.0, 0.0, or nan where it could not be graded.
        keys: the answer each votes for, the same for equal ones (see `AnswerGroups`); None where it has none.
        step_scores, token_counts, finish_reasons: per candidate; None where not known.
        mean_log_probs: [K] mean log-prob of the tokens, -inf where not known.
        combined: [K] score and log-prob together, -inf where one of them is missing; None without a calibration.
        step_ends: per candidate the number of tokens at the end of each step; None where not known, or for none.
        step_log_probs: per candidate the log-probs of each step and of what follows the last one, summed; as above.
    """

    key: QuestionKey
    scores: np.ndarray
    correct: np.ndarray
    keys: list[str | None]
    step_scores: list[list[float] | None]
    token_counts: list[int | None]
    finish_reasons: list[str | None]
    mean_log_probs: np.ndarray
    combined: np.ndarray | None = None
    step_ends: list[list[int] | None] | None = None
    step_log_probs: list[list[float] | None] | None = None

    @property
    def tokens(self) -> np.ndarray:
        """[K] generated tokens, inf where not known."""
        return np.array([np.inf if count is None else count for count in self.token_counts], dtype=np.float64)

    @property
    def is_refused(self) -> np.ndarray:
        """[K] bool: the service refused to make it."""
        return np.array([reason == REFUSED for reason in self.finish_reasons], dtype=bool)

    @property
    def votes(self) -> np.ndarray:
        """[K, answers] bool, see `votes_for`."""
        return votes_for(self.keys)

    @property
    def vote_weights(self) -> np.ndarray:
        """[K] the scores; 0.0 where there is none."""
        return np.where(np.isfinite(self.scores), self.scores, 0.0)

    def scores_by(self, aggregation: str) -> np.ndarray:
        """[K] scores of another aggregation of the step scores, -inf where there are none."""
        return sortable_scores([None if steps is None else aggregate(steps, aggregation) for steps in self.step_scores])

    def graded(self) -> GradedQuestion:
        """The same with only those candidates that could be graded."""
        return self.only(~np.isnan(self.correct))

    def only(self, kept: np.ndarray) -> GradedQuestion:
        """The same with only the candidates `kept`, [K] bool."""
        columns: dict[str, Any] = {}
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray):
                columns[name] = column[kept]
            elif isinstance(column, list):
                columns[name] = list(compress(column, kept))
        return replace(self, **columns)


def question_key(line: ResultLine) -> QuestionKey:
    """Which question the line answers; the chat template, which differs between models, is no part of it."""
    return line.index, line.meta.get("question", line.prompt)


Grades = dict[tuple[int, str], float | None]
"""By number of the line and response; None where it could not be graded."""


def grade_responses(task: str, lines: Sequence[ResultLine]) -> Grades:
    """Grade every candidate, equal responses of a line once."""
    benchmark = get_benchmark(task)
    requests: dict[tuple[int, str], GradeRequest] = {}
    for number, line in enumerate(lines):
        meta = dict(line.meta)
        question = Question(line.index or 0, meta.pop("question", line.prompt), line.answer, meta)
        for response in line.responses:
            requests.setdefault((number, response), benchmark.grade_request(question, response))
    with GraderPool() as pool:
        return dict(zip(requests, pool.grade(list(requests.values())), strict=True))


def grade_lines(task: str, lines: Sequence[ResultLine]) -> list[GradedQuestion]:
    """Grade every candidate; lines of the same question are put together."""
    grades = grade_responses(task, lines)
    by_question: dict[QuestionKey, list[tuple[Sample, float | None]]] = {}
    for number, line in enumerate(lines):
        graded = [(sample, grades[number, sample.response]) for sample in line.samples]
        by_question.setdefault(question_key(line), []).extend(graded)
    with AnswerGroups(get_benchmark(task).data_source) as groups:
        votes = groups.of([[sample.response for sample, _ in graded] for graded in by_question.values()])
    return [_graded_question(key, graded, keys) for (key, graded), keys in zip(by_question.items(), votes, strict=True)]


def _graded_question(
    key: QuestionKey, graded: Sequence[tuple[Sample, float | None]], keys: list[str | None]
) -> GradedQuestion:
    samples = [sample for sample, _ in graded]
    return GradedQuestion(
        key=key,
        scores=sortable_scores([_score(sample) for sample in samples]),
        correct=np.array([np.nan if grade is None else grade for _, grade in graded], dtype=np.float64),
        keys=keys,
        step_scores=[sample.step_scores for sample in samples],
        token_counts=[sample.token_count for sample in samples],
        finish_reasons=[sample.finish_reason for sample in samples],
        mean_log_probs=sortable_scores([sample.mean_log_prob for sample in samples]),
        step_ends=[sample.step_ends for sample in samples],
        step_log_probs=[sample.step_log_probs for sample in samples],
    )


def _score(sample: Sample) -> float | None:
    return aggregate(sample.step_scores) if sample.score is None and sample.step_scores is not None else sample.score
