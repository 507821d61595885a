"""What is to be graded, and which grader does it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from xbai.errors import UserError

ANSWER_CHECKS = {
    "make10": "xbai.grading.make10:grade_make10",
    **dict.fromkeys(
        ("aime", "math", "gsm8k", "stories", "deepscaler", "numina", "openr1", "ys_train"),
        "xbai.grading.math:grade_math",
    ),
    "ceval": "xbai.grading.choice:grade_choice",
    **dict.fromkeys(("livecodebench", "code"), "xbai.grading.code:grade_code"),
}
"""Prefix of a data source's name to the check of its answers."""
NOT_GRADED = {
    **dict.fromkeys(
        ("codecontests", "codeforces", "code_syn", "apps", "taco"),
        'its tests have another form than {"tests": [{"input": ..., "output": ...}]}',
    ),
    "kk": "there is no grader of knights and knaves",
}
"""Prefix of a data source that the public trainers grade and nothing here can, and why."""
ANSWER_KEYS = {
    "xbai.grading.make10:grade_make10": "xbai.grading.make10:boxed_expression",
    "xbai.grading.math:grade_math": "xbai.grading.math_key:math_key",
    "xbai.grading.choice:grade_choice": "xbai.grading.choice:chosen_option",
}
"""Checks to what reads the answer out of a response; those of answers that are voted on."""
INEXACT_KEYS = {"xbai.grading.math:grade_math"}
"""Checks that can call answers equal whose keys differ."""


@dataclass(frozen=True)
class GradeRequest:
    """One response to grade."""

    data_source: str
    """Names the grader by its beginning (`aime24`, `HuggingFaceH4/MATH-500`, ...; see `ANSWER_CHECKS`)."""
    response: str
    """The model's text, thinking included."""
    ground_truth: Any
    """The right answer: a string, a number, or either as `{"target": ...}`."""
    extra_info: dict[str, Any] | None = None
    """Whatever else a grader of one's own wants to know."""

    @property
    def target(self) -> str:
        """The right answer as text.

        Raises:
            ValueError: it is not known: None, empty, or neither a text nor a finite number.
        """
        truth = self.ground_truth.get("target") if isinstance(self.ground_truth, dict) else self.ground_truth
        if isinstance(truth, Real) and not isinstance(truth, bool) and math.isfinite(truth):
            whole = math.floor(truth)
            truth = str(whole if truth == whole else truth)
        if not isinstance(truth, str) or not truth.strip():
            raise ValueError(f"the right answer is not known: the ground truth is {truth!r}")
        return truth


Grader = Callable[[GradeRequest], Any]
"""Returns what `as_grade` takes."""


@dataclass(frozen=True)
class Grade:
    """What became of one response."""

    value: float | None
    """The score; None where the response could not be graded."""
    failure: str | None = None
    """Why not: one of `FAILURES`."""
    detail: str = ""
    """The same in words."""
    extras: dict[str, Any] = field(default_factory=dict)
    """What a grader of one's own returned besides the score: numbers and texts by name."""


@dataclass(frozen=True)
class Preparation:
    """What a check of answers says before the clock starts."""

    time_limit_s: float = 0.0
    """What it may take, where that can be longer than usual."""
    warning: str = ""
    """What people should know of how it works on this machine."""


FAILURES = TIMEOUT, CRASH, MEMORY, ERROR = ("timeout", "crash", "memory", "error")


def as_grade(result: Any) -> Grade:
    """The grade that a grader's result means: a number, or a dict that holds it as `score` beside other entries.

    None and numbers that are not finite are no grade.
    """
    if isinstance(result, Grade):
        return result
    entries = dict(result) if isinstance(result, dict) else {"score": result}
    score = entries.pop("score")
    if score is None or not math.isfinite(score):
        return Grade(None, ERROR, f"the score {score} is not a number to train on")
    return Grade(float(score), extras={str(name): _plain(value) for name, value in entries.items()})


def _plain(value: Any) -> bool | float | str | None:
    """A value that any process can read: numpy and torch scalars as Python's, everything else as text."""
    value = value.item() if callable(getattr(value, "item", None)) and getattr(value, "size", 1) == 1 else value
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def answer_check(data_source: str) -> Callable[[str, str], bool]:
    """The check for a data source, imported on first use: (response, right answer) to whether it is right.

    Raises:
        UserError: no grader goes by this name.
    """
    return _load(_check_location(data_source))


def answer_key(data_source: str, response: str) -> str | None:
    """The answer that would be graded, in a form that is the same for answers that are certainly equal.

    None where a response gives no answer, or one of a kind that is not voted on. What votes together is for
    `AnswerGroups` to say. May take for ever on a hostile mathematical answer.

    Raises:
        UserError: no grader goes by this name.
    """
    location = ANSWER_KEYS.get(_check_location(data_source))
    return _load(location)(response) if location else None


def has_exact_keys(data_source: str) -> bool:
    """Whether answers with different keys are different to the grader.

    Raises:
        UserError: no grader goes by this name.
    """
    return _check_location(data_source) not in INEXACT_KEYS


def prepare(request: GradeRequest) -> Preparation:
    """Do what grading `request` needs once (imports above all), and say what it may take.

    A check's module may have a function `prepare(right answer) -> Preparation`.

    Raises:
        UserError: no grader goes by its data source's name, or it cannot work on this machine.
    """
    module = importlib.import_module(_check_location(request.data_source).partition(":")[0])
    return module.prepare(request.target) if hasattr(module, "prepare") else Preparation()


def grade(request: GradeRequest) -> float:
    """1.0 for a right answer, 0.0 for a wrong one.

    May take for ever on a hostile answer: batches go through `GraderPool`, whose processes can be killed.
    """
    return float(answer_check(request.data_source)(request.response, request.target))


def compare(request: GradeRequest) -> Grade | bool:
    """Whether the grader calls two boxed answers equal, whichever of them is taken for the right one.

    The response is one of them; the ground truth the other, or None: then the key of the first is found, and is `key`
    in the extras. May take for ever, as `grade` may.
    """
    if request.ground_truth is None:
        return Grade(1.0, extras={"key": answer_key(request.data_source, request.response)})
    swapped = GradeRequest(request.data_source, request.ground_truth, request.response)
    return bool(grade(request) and grade(swapped))


def _load(location: str) -> Callable[..., Any]:
    module, _, function = location.partition(":")
    return getattr(importlib.import_module(module), function)


def _check_location(data_source: str) -> str:
    name = data_source.rsplit("/", 1)[-1].lower()
    for prefix, reason in NOT_GRADED.items():
        if name.startswith(prefix):
            raise UserError(f"data_source {data_source!r}: {reason}; set custom_reward_function for your own grader")
    for prefix, location in ANSWER_CHECKS.items():
        if name.startswith(prefix):
            return location
    known = ", ".join(f"{prefix}*" for prefix in ANSWER_CHECKS)
    raise UserError(
        f"data_source {data_source!r}: no grader for it; known are {known}; set custom_reward_function for your own"
    )
