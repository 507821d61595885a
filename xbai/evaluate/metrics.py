"""From result files to numbers: accuracy of every way of choosing at every N, and how well the scores tell."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xbai.benchmarks.base import Question
from xbai.benchmarks.registry import get_benchmark
from xbai.errors import UserError
from xbai.evaluate.estimators import best_of_n_groups, expected_best_of_n, expected_oracle, expected_vote
from xbai.evaluate.results import ResultLine, read_result_lines
from xbai.evaluate.store import JOURNAL_SUFFIX
from xbai.grading import GraderPool
from xbai.search.best_of_n import sortable_scores
from xbai.search.majority import vote_key
from xbai.sprm import auc

logger = logging.getLogger(__name__)

NO_SCORE = -np.inf


@dataclass(frozen=True)
class GradedQuestion:
    """The candidates for one question, K in number.

    Attributes:
        scores: [K], -inf where there is none.
        correct: [K] 1.0, 0.0, or nan where it could not be graded.
        keys: the answer each votes for.
        step_scores, token_counts, truncated: per candidate; None where not known.
    """

    prompt: str
    scores: np.ndarray
    correct: np.ndarray
    keys: list[str | None]
    step_scores: list[list[float] | None]
    token_counts: list[int | None]
    truncated: list[bool]

    def graded(self) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        """Scores, correctness and vote keys of the candidates that could be graded."""
        known = ~np.isnan(self.correct)
        return self.scores[known], self.correct[known], [key for key, is_known in zip(self.keys, known) if is_known]


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its standard error (nan with one question)."""

    mean: float
    standard_error: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Estimate:
        """The mean of one value a question."""
        array = np.asarray(values, dtype=np.float64)
        error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else np.nan
        return cls(float(array.mean()), float(error))


STRATEGIES = ("best_of_n", "majority", "weighted_vote", "oracle", "random")


@dataclass(frozen=True)
class Report:
    """Everything measured on one set of results.

    Attributes:
        questions, samples: how many questions, and candidates of each (the fewest).
        ungraded, unscored: how many candidates have no grade, no score.
        truncated_rate: share of the candidates that hit the length limit.
        mean_tokens: generated tokens of a candidate; nan when not known.
        mean_at_1: accuracy of a single candidate.
        curves: by strategy (see `STRATEGIES`) and N, the accuracy of its choice among N.
        auc: of score against correctness over all candidates; nan when undefined.
        within_prompt_auc: the same within each question that has right and wrong candidates, averaged.
        settings: how the candidates were made; None when the files do not say.
    """

    questions: int
    samples: int
    ungraded: int
    unscored: int
    truncated_rate: float
    mean_tokens: float
    mean_at_1: Estimate
    curves: dict[str, dict[int, Estimate]]
    auc: float
    within_prompt_auc: float
    settings: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; undefined values are None."""
        return _none_for_nan(asdict(self))


def _none_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _none_for_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def result_files(pattern: str) -> list[Path]:
    """The files of a glob, journals of unfinished runs left out.

    Raises:
        UserError: there is none.
    """
    found = [Path(path) for path in sorted(glob.glob(pattern))]  # noqa: PTH207 (a pattern may be absolute)
    results = [path for path in found if path.is_file() and path.suffix != JOURNAL_SUFFIX]
    if not results:
        journal = Path(pattern + JOURNAL_SUFFIX)
        hint = (
            f"; {journal} is an unfinished run, run the same inference again to finish it" if journal.exists() else ""
        )
        raise UserError(f"--result_paths {pattern}: no such file{hint}")
    return results


def read_lines(paths: Sequence[Path]) -> list[ResultLine]:
    """All result lines.

    Raises:
        UserError: a file is not a result file, or there is no candidate at all.
    """
    lines = [line for path in paths for line in read_result_lines(path) if line.solutions]
    if not lines:
        raise UserError(f"{', '.join(map(str, paths))}: no candidates to measure")
    return lines


def grade_lines(task: str, lines: Sequence[ResultLine], workers: int | None = None) -> list[GradedQuestion]:
    """Grade every candidate, equal responses to a question once; lines of the same question are put together."""
    benchmark = get_benchmark(task)
    requests = {}
    for number, line in enumerate(lines):
        meta = dict(line.meta)
        question = Question(line.index or 0, meta.pop("question", line.prompt), line.answer, meta)
        for response in line.responses:
            requests.setdefault((number, response), benchmark.grade_request(question, response))
    with GraderPool(workers) as pool:
        grades = dict(zip(requests, pool.grade(list(requests.values())), strict=True))
    by_question: dict[tuple, list[int]] = {}
    for number, line in enumerate(lines):
        by_question.setdefault(_identity(line), []).append(number)
    return [_graded_question(lines, numbers, grades) for numbers in by_question.values()]


def _identity(line: ResultLine) -> tuple:
    """What lines of one question share: its place in its set of questions, or its text where that is not known."""
    digest = (line.settings or {}).get("questions")
    return (line.prompt,) if digest is None or line.index is None else (digest, line.index)


def _graded_question(
    lines: Sequence[ResultLine], numbers: list[int], grades: dict[tuple[int, str], float | None]
) -> GradedQuestion:
    def column(get: Callable[[ResultLine], list]) -> list:
        return [item for number in numbers for item in get(lines[number])]

    correct = [grades[number, response] for number in numbers for response in lines[number].responses]
    return GradedQuestion(
        prompt=lines[numbers[0]].prompt,
        scores=sortable_scores(column(lambda line: line.scores)),
        correct=np.array([np.nan if grade is None else grade for grade in correct]),
        keys=[vote_key(response) for response in column(lambda line: line.responses)],
        step_scores=column(lambda line: line.step_scores),
        token_counts=column(lambda line: line.token_counts),
        truncated=[reason == "length" for reason in column(lambda line: line.finish_reasons)],
    )


def candidate_counts(samples: int) -> list[int]:
    """The N to report for that many samples: powers of two, and all of them."""
    powers = [2**exponent for exponent in range(samples.bit_length()) if 2**exponent <= samples]
    return powers if powers[-1] == samples else [*powers, samples]


def measure(questions: Sequence[GradedQuestion], settings: dict[str, Any] | None = None, seed: int = 0) -> Report:
    """Measure graded candidates.

    Candidates without a grade are left out (and counted); where that leaves a question fewer than N, its estimate is
    that of all it has. `seed` draws the subsets of the votes.

    Raises:
        UserError: nothing could be graded.
    """
    usable = [graded for graded in (question.graded() for question in questions) if len(graded[1])]
    if not usable:
        raise UserError("none of the responses could be graded")
    samples = min(len(question.correct) for question in questions)
    rng = np.random.default_rng(seed)
    curves: dict[str, dict[int, Estimate]] = {name: {} for name in STRATEGIES}
    for n in candidate_counts(samples):
        per_question = [_choose(*graded, n, rng) for graded in usable]
        for name in STRATEGIES:
            curves[name][n] = Estimate.over([values[name] for values in per_question])
    every_score = np.concatenate([question.scores for question in questions])
    tokens = [count for question in questions for count in question.token_counts if count is not None]
    return Report(
        questions=len(questions),
        samples=samples,
        ungraded=int(sum(np.isnan(question.correct).sum() for question in questions)),
        unscored=int((every_score == NO_SCORE).sum()),
        truncated_rate=float(np.mean([hit for question in questions for hit in question.truncated])),
        mean_tokens=float(np.mean(tokens)) if tokens else float("nan"),
        mean_at_1=Estimate.over([float(correct.mean()) for _, correct, _ in usable]),
        curves=curves,
        auc=_auc(np.concatenate([scores for scores, *_ in usable]), np.concatenate([right for _, right, _ in usable])),
        within_prompt_auc=_within_prompt_auc([(scores, correct) for scores, correct, _ in usable]),
        settings=settings,
    )


def _choose(
    scores: np.ndarray, correct: np.ndarray, keys: list[str | None], n: int, rng: np.random.Generator
) -> dict[str, float]:
    n = min(n, len(scores))
    weights = np.where(np.isfinite(scores), scores, 0.0)
    return {
        "best_of_n": expected_best_of_n(scores, correct, n),
        "majority": expected_vote(keys, correct, n, rng),
        "weighted_vote": expected_vote(keys, correct, n, rng, weights),
        "oracle": expected_oracle(correct, n),
        "random": float(correct.mean()),
    }


def _auc(scores: np.ndarray, correct: np.ndarray) -> float:
    scored = np.isfinite(scores)
    return auc(torch.from_numpy(scores[scored]), torch.from_numpy(correct[scored]))


def _within_prompt_auc(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    values = np.array([_auc(scores, correct) for scores, correct in pairs])
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def repeated_best_of_n(questions: Sequence[GradedQuestion], n: int) -> list[float]:
    """Accuracy of Best-of-N in each repetition of the test: repetition k takes every question's k-th group of n.

    Raises:
        UserError: a question has fewer than n candidates.
    """
    fewest = min(questions, key=lambda question: len(question.correct))
    repetitions = len(fewest.correct) // n
    if repetitions == 0:
        raise UserError(f"--N {n}: only {len(fewest.correct)} candidates for the question {fewest.prompt[:60]!r}")
    picks = np.stack([best_of_n_groups(question.scores, question.correct, n)[:repetitions] for question in questions])
    return [float(value) for value in np.nanmean(picks, axis=0)]


def report_files(task: str, pattern: str) -> tuple[Report, list[GradedQuestion]]:
    """Read, grade and measure the result files of a glob.

    Raises:
        UserError: no such files, or files that are not results.
    """
    lines = read_lines(result_files(pattern))
    questions = grade_lines(task, lines)
    return measure(questions, lines[0].settings), questions
