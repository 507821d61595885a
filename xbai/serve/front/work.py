"""What a request asks of a copy, as far as its body tells that cheaply: how much work, and what it begins with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from xbai.serve.openai.effort import EFFORTS, OF_MODEL_NAMES
from xbai.serve.schemas import MAX_RESPONSES, GenerateRequest

MAX_PARSED_BYTES = 256 << 10
"""A larger body would keep the event loop for more than some milliseconds."""
BEGINNING_CHARS = 512
"""Of a prompt without roles; searches and conversations go on from it."""


@dataclass(frozen=True)
class Work:
    """Of a request.

    Attributes:
        weight: responses that it has generated, or texts scored; 0 for what takes no work.
        beginning: digest of that part of the prompt which later requests will repeat; empty where there is none.
    """

    weight: int
    beginning: bytes = b""


def work_of(method: str, body: bytes, default_effort: str | None) -> Work:
    """Never refuses: what a body is good for, the copy says.

    Args:
        default_effort: of conversations that ask for none.
    """
    if method != "POST":
        return Work(0)
    if len(body) > MAX_PARSED_BYTES:
        return Work(1, _digest(body[:BEGINNING_CHARS]))
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return Work(1)
    if not isinstance(fields, dict):
        return Work(1)
    return Work(_weight(fields, default_effort), _beginning(fields))


def _weight(fields: dict[str, Any], default_effort: str | None) -> int:
    if "prefix_prompt" in fields:
        return _count(fields.get("response_num"), GenerateRequest.model_fields["response_num"].default)
    if isinstance(texts := fields.get("texts"), list):
        return max(1, len(texts))
    if "messages" in fields or "input" in fields:
        candidates = _count(fields.get("candidates"), EFFORTS[_effort(fields, default_effort)])
        return candidates * _count(fields.get("n"), 1)
    return 1


def _effort(fields: dict[str, Any], default_effort: str | None) -> str:
    reasoning = fields.get("reasoning")
    of_name = str(fields.get("model")).rpartition("-")[2]
    asked = (
        fields.get("reasoning_effort"),
        reasoning.get("effort") if isinstance(reasoning, dict) else None,
        of_name if of_name in OF_MODEL_NAMES else None,
        default_effort,
    )
    return next((effort for effort in asked if isinstance(effort, str) and effort in EFFORTS), "low")


def _count(value: Any, default: int) -> int:
    return value if type(value) is int and 1 <= value <= MAX_RESPONSES else default


def _beginning(fields: dict[str, Any]) -> bytes:
    if isinstance(prompt := fields.get("prefix_prompt"), str):
        return _digest(prompt[:BEGINNING_CHARS].encode(errors="replace"))
    turns = fields.get("messages", fields.get("input"))
    if isinstance(turns, list):
        # Up to the first question: a conversation keeps it, and it is another where only the system prompt is the same.
        users = [place for place, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"]
        turns = turns[: users[0] + 1] if users else turns
    return _digest(json.dumps([fields.get("instructions"), turns]).encode()) if turns else b""


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
