"""What is asked of services that may know the published interface only, and what is read from their answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from xbai.errors import UserError
from xbai.model_identity import is_same_model

SHOWN = 200


class BrokenAnswerError(Exception):
    """A success whose body is not what such a service answers; says what is wrong, and how the body begins."""

    def __init__(self, problem: str, body: bytes) -> None:
        super().__init__(f"{problem}, in {body[:SHOWN].decode(errors='backslashreplace')!r}")


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


@dataclass(frozen=True)
class ServedModel:
    """What all copies of a service serve.

    Attributes:
        identity: of the model; None where no copy says.
        lang: the rule by which they find steps; None where they find none.
        scores: every copy returns scores.
        log_probs: every copy returns mean log-probs.
        is_ours: every copy says what it is: a service of this project, which knows more than the published interface.
    """

    identity: str | None
    lang: str | None
    scores: bool
    log_probs: bool
    is_ours: bool

    @classmethod
    def from_copies(cls, option: str, described: Sequence[ReadyAnswer]) -> ServedModel:
        """From the copies' `/ready`.

        Raises:
            UserError: they serve different models, or find steps by different rules; names `option`.
        """
        identities = [copy.identity for copy in described if copy.identity]
        others = {identity for identity in identities if not is_same_model(identity, identities[0])}
        if others:
            raise UserError(f"{option}: the copies serve different models ({', '.join([identities[0], *others])})")
        langs = sorted({copy.lang for copy in described if copy.lang})
        if len(langs) > 1:
            raise UserError(f"{option}: the copies find steps by different rules ({', '.join(langs)})")
        return cls(
            identity=identities[0] if identities else None,
            lang=langs[0] if langs else None,
            scores=all(copy.scores for copy in described),
            log_probs=all(copy.log_probs for copy in described),
            is_ours=all(copy.identity for copy in described),
        )

    def gives_scores_of(self, scorer: ServedModel) -> bool:
        """Whether its scores are those of the scorer: of one model, whose steps both find by one rule."""
        if not self.scores or self.identity is None or scorer.identity is None or self.lang is None:
            return False
        return is_same_model(self.identity, scorer.identity) and self.lang == scorer.lang


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
    step_ends: list[list[int] | None] | None = None
    step_log_probs: list[list[float] | None] | None = None
    chosen: int | None = None

    @model_validator(mode="after")
    def _ends_are_of_the_steps(self) -> Self:
        # How long the columns should be, `read_responses` knows.
        rows = zip_longest(
            self.step_ends or (), self.step_scores or (), self.token_counts or (), self.step_log_probs or ()
        )
        for number, (ends, scores, tokens, log_probs) in enumerate(rows):
            borders = [0, *(ends or ())]
            if ends is not None and not (
                all(begin < end for begin, end in pairwise(borders))
                and (scores is None or len(scores) == len(ends))
                and (tokens is None or borders[-1] <= tokens)
                and (log_probs is None or len(log_probs) == len(borders))
            ):
                raise ValueError(f"step_ends: they are not those of response {number}")
        return self


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
        raise BrokenAnswerError(f"{place}: {problem['msg']}" if place else problem["msg"], body) from None


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
    return _rows(read_answer(GenerateAnswer, body), body, count, columns)


def read_chosen(body: bytes, count: int, *columns: str) -> tuple[int, list[tuple[Any, ...]]]:
    """As `read_responses`, of a request with `answer_once`, and which of the responses answers.

    Raises:
        ReportedFailureError, BrokenAnswerError: as above, or none was chosen.
    """
    answer = read_answer(GenerateAnswer, body)
    if answer.chosen is None or not 0 <= answer.chosen < count:
        raise BrokenAnswerError(f"chosen: {answer.chosen}, of {count} responses of which one was to answer", body)
    return answer.chosen, _rows(answer, body, count, columns)


def _rows(answer: GenerateAnswer, body: bytes, count: int, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    items = [answer.results, *(getattr(answer, name) or [None] * count for name in columns)]
    for name, column in zip(("results", *columns), items, strict=True):
        if len(column) != count:
            problem = f"{name}: {len(column)} items for the {count} responses that were asked for"
            raise BrokenAnswerError(problem, body)
    return list(zip(*items, strict=True))
