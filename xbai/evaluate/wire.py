"""What is asked of services that may know the published interface only, and what is read from their answers."""

from __future__ import annotations

from typing import Any

from xbai.errors import UserError


def score_request(prompt: str, response: str, names_prompt: bool) -> dict[str, Any]:
    """Body of `POST /score`; `prompt` is a field of this project's own."""
    request = {"text": prompt + response, "return_all_scores": True}
    return {**request, "prompt": prompt} if names_prompt else request


def read_score(answer: dict[str, Any]) -> tuple[float, list[float] | None]:
    """Trajectory score and step scores.

    Raises:
        UserError: there is none.
    """
    value = answer.get("value")
    if not isinstance(value, int | float):
        raise UserError(f"/score did not return a value, but {answer!r:.200}; is --score_api_url a score service?")
    return value, answer.get("all_scores")


def read_responses(answer: dict[str, Any], count: int, *columns: str) -> list[tuple[Any, ...]]:
    """`count` responses, each with its item of every other column; None where the service does not return it.

    Raises:
        UserError: they are not as many.
    """
    texts = answer.get("results")
    if not isinstance(texts, list) or len(texts) != count:
        raise UserError(f"/generate did not return the {count} responses that were asked for, but {answer!r:.200}")
    unknown = [None] * count
    return list(zip(texts, *(answer.get(name) or unknown for name in columns), strict=True))
