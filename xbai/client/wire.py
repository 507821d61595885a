"""What is asked of services that may know the published interface only, and what is read from their answers."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

SHOWN = 200


class BrokenAnswerError(Exception):
    """A success whose body is not what such a service answers; says what is wrong, and how the body begins."""


class ReportedFailureError(Exception):
    """A success that says `error`: XBai's own services report failures as one."""


class _Body(BaseModel):
    """JSON of these types, without NaN and half surrogate pairs. Further fields are free."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


class Answer(_Body):
    """What is read of a body."""

    error: None = None


class _Report(_Body):
    error: str | dict[str, Any] | list[Any]


AnswerT = TypeVar("AnswerT", bound=Answer)


class ReadyAnswer(Answer):
    """Of `GET /ready`, which the published interface does not have. See `ServedModel` for what it says."""

    identity: str | None = None
    lang: str | None = None
    scores: bool = False
    log_probs: bool = False


class ScoreAnswer(Answer):
    """Of `POST /score`: the trajectory's score, and those of its steps."""

    value: float
    all_scores: list[float] | None = None


class GenerateAnswer(Answer):
    """Of `POST /generate`; item i of every list belongs to response i."""

    results: list[str]
    finish_reasons: list[str | None] | None = None
    token_counts: list[int | None] | None = None
    scores: list[float | None] | None = None
    step_scores: list[list[float] | None] | None = None
    mean_log_probs: list[float | None] | None = None


def read_answer(kind: type[AnswerT], body: bytes) -> AnswerT:
    """A body as an answer.

    Raises:
        ReportedFailureError: it says what went wrong.
        BrokenAnswerError: it is none of this kind.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        with suppress(ValidationError):
            raise ReportedFailureError(str(_Report.model_validate_json(body).error)[:SHOWN]) from None
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise broken(f"{place}: {problem['msg']}" if place else problem["msg"], body) from None


def broken(problem: str, body: bytes) -> BrokenAnswerError:
    """The error that says what is wrong with a body."""
    return BrokenAnswerError(f"{problem}, in {body[:SHOWN].decode(errors='backslashreplace')!r}")


def score_request(prompt: str, response: str, names_prompt: bool) -> dict[str, Any]:
    """Body of `POST /score`; `prompt` is a field of this project's own."""
    request = {"text": prompt + response, "return_all_scores": True}
    return {**request, "prompt": prompt} if names_prompt else request


def read_score(body: bytes) -> tuple[float, list[float] | None]:
    """Trajectory score and step scores.

    Raises:
        ReportedFailureError, BrokenAnswerError: there is none.
    """
    answer = read_answer(ScoreAnswer, body)
    return answer.value, answer.all_scores


def read_responses(body: bytes, count: int, *columns: str) -> list[tuple[Any, ...]]:
    """`count` responses, each with its item of every other column; None where the service does not return it.

    Raises:
        ReportedFailureError, BrokenAnswerError: there are none, not as many, or a column is not as long.
    """
    answer = read_answer(GenerateAnswer, body)
    items = [answer.results, *(getattr(answer, name) or [None] * count for name in columns)]
    for name, column in zip(("results", *columns), items, strict=True):
        if len(column) != count:
            raise broken(f"{name}: {len(column)} items for the {count} responses that were asked for", body)
    return list(zip(*items, strict=True))
