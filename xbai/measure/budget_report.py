"""Results that were sampled with a budget: what was chosen, and what it has cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xbai.errors import UserError
from xbai.measure.estimators import Estimate
from xbai.measure.graded import GradedQuestion, grade_lines
from xbai.measure.result_set import read_lines, result_files
from xbai.measure.tables import Grid, percent
from xbai.results.lines import NOT_BEGUN, NOT_CHOSEN, PRUNED, read_result_lines
from xbai.results.run_budget import RunBudget


@dataclass(frozen=True)
class BudgetReport:
    """Means over groups of candidates, each as many as its rule wanted; errors are over questions.

    Attributes:
        groups: how often each question was answered.
        accuracy: of the responses that the rule chose; an ungraded one counts in no question, none at all as wrong.
        tokens: generated for a group, those of pruned candidates included.
        begun: candidates of a group that began.
        pruned: share of these that were given up.
        ungraded: groups whose response could not be graded.
    """

    rule: str
    candidates: int
    questions: int
    groups: int
    accuracy: Estimate
    tokens: Estimate
    begun: Estimate
    pruned: float
    ungraded: int
    settings: dict[str, Any] | None

    @property
    def grid(self) -> Grid:
        """As a table."""
        row = [
            self.rule,
            percent(self.accuracy),
            f"{self.tokens.mean:,.0f} ±{self.tokens.standard_error:,.0f}",
            f"{self.begun.mean:.1f} of {self.candidates}",
            f"{100 * self.pruned:.0f}",
        ]
        header = ["budget", "accuracy in %", "tokens", "candidates", "% of them pruned"]
        title = f"{self.questions:,} questions, {self.groups} times each, ± standard error over questions"
        return Grid(title, header, [[row]], 1)


@dataclass(frozen=True)
class _Group:
    correct: float
    tokens: float
    begun: int
    pruned: int


def budget_of_files(patterns: Sequence[str]) -> RunBudget | None:
    """The budget by which the results were sampled; None where there was none.

    Raises:
        UserError: no such files, or files that are not results.
    """
    line = next((line for path in result_files(patterns) for line in read_result_lines(path)), None)
    return RunBudget.from_settings(None if line is None else line.settings)


def report_budget(task: str, patterns: Sequence[str], budget: RunBudget) -> BudgetReport:
    """Read, grade and measure.

    Raises:
        UserError: as `read_lines`; or no response could be graded.
    """
    lines = read_lines(result_files(patterns), task, with_budget=True)
    questions = [list(_groups(question, budget)) for question in grade_lines(task, lines)]
    correct = [np.array([group.correct for group in groups]) for groups in questions]
    if all(np.isnan(each).all() for each in correct):
        raise UserError("none of the responses could be graded")
    flat = [group for groups in questions for group in groups]
    return BudgetReport(
        rule=budget.name,
        candidates=budget.candidates,
        questions=len(questions),
        groups=max(map(len, questions)),
        accuracy=Estimate.over([np.nanmean(each) if len(each) else 0.0 for each in correct if not _is_unknown(each)]),
        tokens=_mean_over(questions, "tokens"),
        begun=_mean_over(questions, "begun"),
        pruned=sum(group.pruned for group in flat) / max(1, sum(group.begun for group in flat)),
        ungraded=sum(int(np.isnan(group.correct)) for group in flat),
        settings=lines[0].settings,
    )


def _groups(question: GradedQuestion, budget: RunBudget) -> Iterator[_Group]:
    for first in range(0, len(question.correct), budget.candidates):
        members = slice(first, first + budget.candidates)
        reasons = question.finish_reasons[members]
        scores = [
            None if np.isinf(score) or reason == NOT_CHOSEN else float(score)
            for score, reason in zip(question.scores[members], reasons, strict=True)
        ]
        chosen = budget.choose(scores, question.keys[members])
        yield _Group(
            correct=0.0 if chosen is None else float(question.correct[first + chosen]),
            tokens=float(np.where(np.isfinite(question.tokens[members]), question.tokens[members], np.nan).sum()),
            begun=len(reasons) - reasons.count(NOT_BEGUN),
            pruned=reasons.count(PRUNED),
        )


def _is_unknown(correct: np.ndarray) -> bool:
    return len(correct) > 0 and bool(np.isnan(correct).all())


def _mean_over(questions: Sequence[Sequence[_Group]], name: str) -> Estimate:
    return Estimate.over([float(np.mean([getattr(group, name) for group in groups])) for groups in questions if groups])
