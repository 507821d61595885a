"""From graded candidates to numbers: accuracy of every way of choosing at every N, and how well the scores tell."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np

from xbai.calibration import Calibration
from xbai.errors import UserError
from xbai.measure.estimators import Estimate, best_of_n_groups, vote_groups
from xbai.measure.graded import GradedQuestion, QuestionKey, grade_lines
from xbai.measure.length_bands import LengthBand, length_bands
from xbai.measure.length_quarters import LengthQuarter, length_quarters
from xbai.measure.result_set import read_lines, result_files
from xbai.measure.separation import Bin, Separation, expected_calibration_error, reliability, separation
from xbai.measure.strategies import (
    SIGNALS,
    Curves,
    accuracies,
    candidate_counts,
    paired_differences,
    possible_strategies,
)
from xbai.results.settings import check_calibration, differing_settings

logger = logging.getLogger(__name__)

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Lengths:
    """Generated tokens of a candidate (of a step search: all that it generated); nan where not known or none.

    Attributes:
        mean, right, wrong: mean of all, of the right and of the wrong candidates.
        percentiles: by percent.
    """

    mean: float
    right: float
    wrong: float
    percentiles: dict[int, float]


@dataclass(frozen=True)
class Report:
    """Everything measured on one set of results.

    Attributes:
        questions, samples: how many questions, and candidates of each (the fewest of those that have any).
        missing: candidates by which questions fall short of the question that has the most.
        unanswered: questions without any candidate, because the service failed each time. They are wrong, at every N:
            what times out is rarely easy, so leaving them out would flatter the model.
        ungraded, unscored, refused: candidates that have no grade, have no score, were refused by the service. Those
            without a grade are left out of all accuracies, refused ones are wrong.
        ungraded_rate, truncated_rate: share of the candidates without a grade, cut off by the length limit; the latter
            nan when not known.
        mean_at_1: accuracy of a single candidate.
        curves: accuracy of each strategy that the results allow; those by score need scores.
        differences: of two strategies' accuracies, paired by question.
        within_prompt_auc, within_prompt_auc_standard_error, auc: of the score, as in `signals`; nan when undefined.
        signals: how well each strategy's signal tells right from wrong, for the strategies that have one.
        calibration_error: expected distance of score and accuracy; nan without scores.
        by_length: how well the score does on short, middling and long responses; empty where it or they are unknown.
        by_question_length: accuracy of each strategy on questions with short and long candidates; empty where it is
            unknown.
        settings: how the candidates were made; None when the files do not say.
    """

    questions: int
    samples: int
    missing: int
    unanswered: int
    ungraded: int
    unscored: int
    refused: int
    ungraded_rate: float
    truncated_rate: float
    mean_at_1: Estimate
    curves: Curves
    differences: Curves
    within_prompt_auc: float
    within_prompt_auc_standard_error: float
    auc: float
    signals: dict[str, Separation]
    calibration_error: float
    reliability: list[Bin]
    by_length: list[LengthBand]
    by_question_length: list[LengthQuarter]
    lengths: Lengths
    settings: dict[str, Any] | None


@dataclass(frozen=True)
class Comparison:
    """How much better the first of two sets of results is, question by question.

    Attributes:
        questions: those that both have.
        unpaired: those that only one has.
        curves: mean difference of the accuracies, and the standard error of that mean over questions.
        differing_settings: names of the settings in which the two differ.
    """

    questions: int
    unpaired: int
    curves: Curves
    differing_settings: list[str]


def json_ready(value: Any) -> Any:
    """The value with string keys, dataclasses as objects, and None for nan."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def measure(questions: Sequence[GradedQuestion], settings: dict[str, Any] | None = None) -> Report:
    """Measure graded candidates.

    Raises:
        UserError: nothing could be graded.
    """
    usable = [question for question in questions if _counts(question)]
    if not any(map(_is_answered, usable)):
        raise UserError("none of the responses could be graded")
    per_question = [len(question.correct) for question in questions]
    fewest = min(filter(None, per_question))
    scores = np.concatenate([question.scores for question in questions])
    correct = np.concatenate([question.correct for question in questions])
    question_of = np.repeat(np.arange(len(questions)), per_question)
    judged = np.isfinite(scores) & ~np.isnan(correct)
    curve = reliability(scores[judged], correct[judged], question_of[judged])
    found = accuracies(usable, possible_strategies(usable), candidate_counts(fewest))
    of_score = _separation("best_of_n", questions)
    finishes = [reason for question in questions for reason in question.finish_reasons if reason is not None]
    return Report(
        questions=len(questions),
        samples=fewest,
        missing=sum(max(per_question) - count for count in per_question),
        unanswered=per_question.count(0),
        ungraded=int(np.isnan(correct).sum()),
        unscored=int((~np.isfinite(scores)).sum()),
        refused=int(sum(question.is_refused.sum() for question in questions)),
        ungraded_rate=float(np.isnan(correct).mean()),
        truncated_rate=_mean(np.array([reason == "length" for reason in finishes], dtype=np.float64)),
        mean_at_1=Estimate.over(found["random"][1]),
        curves={name: {n: Estimate.over(values) for n, values in by_count.items()} for name, by_count in found.items()},
        differences=paired_differences(found),
        within_prompt_auc=of_score.within_prompt_auc.mean,
        within_prompt_auc_standard_error=of_score.within_prompt_auc.standard_error,
        auc=of_score.auc,
        signals={name: _separation(name, questions) for name in found if name in SIGNALS},
        calibration_error=expected_calibration_error(curve),
        reliability=curve,
        by_length=length_bands(questions),
        by_question_length=length_quarters(usable, found),
        lengths=_lengths(questions, correct),
        settings=settings,
    )


def compare(
    questions: Sequence[GradedQuestion],
    base: Sequence[GradedQuestion],
    settings: tuple[dict[str, Any] | None, dict[str, Any] | None] = (None, None),
) -> Comparison:
    """Accuracies of `questions` less those of `base`, paired by question.

    Raises:
        UserError: they have no question in common that could be graded.
    """
    # Where one side does not know the questions' places, by their texts.
    has_places = all(question.key[0] is not None for side in (questions, base) for question in side)
    ours, theirs = (
        {question.key if has_places else question.key[1]: question for question in side} for side in (questions, base)
    )
    common: list[QuestionKey | str] = [key for key in ours if key in theirs]
    paired = [key for key in common if _counts(ours[key]) and _counts(theirs[key])]
    if not any(len(side[key].correct) for key in paired for side in (ours, theirs)):
        raise UserError("--compare: the two have no question in common that could be graded")
    pairs = [[side[key] for key in paired] for side in (ours, theirs)]
    strategies = [name for name in possible_strategies(pairs[0]) if name in possible_strategies(pairs[1])]
    counts = candidate_counts(min(filter(None, (len(question.correct) for side in pairs for question in side))))
    here, there = (accuracies(side, strategies, counts) for side in pairs)
    return Comparison(
        questions=len(paired),
        unpaired=len(ours) + len(theirs) - 2 * len(paired),
        curves={name: {n: Estimate.over(here[name][n] - there[name][n]) for n in counts} for name in strategies},
        differing_settings=differing_settings(*settings),
    )


def repeated_accuracy(questions: Sequence[GradedQuestion], n: int, strategy: str = "best_of_n") -> list[float]:
    """Accuracy in each repetition of the test: repetition k takes every question's k-th group of n candidates.

    Candidates are in the order they were sampled; `strategy` is best_of_n, majority or weighted_vote.

    Raises:
        UserError: a question has candidates, but fewer than n, or there are no scores to choose by.
    """
    fewest = min(filter(_is_answered, questions), key=lambda question: len(question.correct))
    repetitions = len(fewest.correct) // n
    if repetitions == 0:
        raise UserError(
            f"--N {n}: only {len(fewest.correct)} candidates for the question {fewest.key[1][:60]!r}; "
            f"use --N {len(fewest.correct)} or less, or sample more"
        )
    if n > 1 and strategy != "majority" and strategy not in possible_strategies(questions):
        raise UserError(f"--N {n}: there are no scores to choose by; use --N 1, or run inference again with scores")
    picks = [
        _group_picks(question, n, strategy)[:repetitions] if _is_answered(question) else np.zeros(repetitions)
        for question in questions
    ]
    return [_mean(pick) for pick in np.stack(picks, axis=1) if not np.isnan(pick).all()]


def _group_picks(question: GradedQuestion, n: int, strategy: str) -> np.ndarray:
    if strategy == "best_of_n":
        return best_of_n_groups(question.scores, question.correct, n)
    weights = question.vote_weights if strategy == "weighted_vote" else None
    return vote_groups(question.votes, question.correct, n, weights)


def report_files(
    task: str, patterns: Sequence[str], calibration: Calibration | None = None
) -> tuple[Report, list[GradedQuestion]]:
    """Read, grade and measure result files that belong together; with a calibration, also choose by it.

    Raises:
        UserError: no such files, files that are not results, that do not belong together, or to which the calibration
            does not apply.
    """
    lines, place = read_lines(result_files(patterns), task), " ".join(patterns)
    settings = next((line.settings for line in lines if line.settings is not None), None)
    if calibration is not None:
        check_calibration(calibration, settings, place)
    questions = grade_lines(task, lines)
    if calibration is not None:
        combined = calibration.combined
        questions = [replace(each, combined=combined(each.scores, each.mean_log_probs)) for each in questions]
    report = measure(questions, settings)
    if calibration is not None and "best_of_n_combined" not in report.curves:
        raise UserError(
            f"{place}: --calibration needs scores and log-probs of all responses, which are not there; "
            "leave it out, or sample again from a policy service that returns both"
        )
    if report.missing:
        logger.warning(
            "%s: %d samples are missing; N ends at %d, which every question has that has any",
            place, report.missing, report.samples,
        )  # fmt: skip
    if report.unanswered:
        logger.warning(
            "%s: %d of %d questions have no sample and count as wrong; run the same inference again to ask for them",
            place, report.unanswered, report.questions,
        )  # fmt: skip
    return report, questions


def _is_answered(question: GradedQuestion) -> bool:
    return len(question.correct) > 0


def _counts(question: GradedQuestion) -> bool:
    """Whether it has a part in accuracies: not where there are candidates, but no grades."""
    return not _is_answered(question) or not np.isnan(question.correct).all()


def _separation(name: str, questions: Sequence[GradedQuestion]) -> Separation:
    signal = SIGNALS[name]
    return separation([signal(question) for question in questions], [question.correct for question in questions])


def _lengths(questions: Sequence[GradedQuestion], correct: np.ndarray) -> Lengths:
    counts = [np.nan if count is None else count for question in questions for count in question.token_counts]
    tokens = np.array(counts, dtype=np.float64)
    known = tokens[~np.isnan(tokens)]
    return Lengths(
        mean=_mean(tokens),
        right=_mean(tokens[correct > 0.5]),
        wrong=_mean(tokens[correct <= 0.5]),
        percentiles={p: float(np.percentile(known, p)) if len(known) else float("nan") for p in PERCENTILES},
    )


def _mean(values: np.ndarray) -> float:
    """Of those that are not nan; nan of none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
