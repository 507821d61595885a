"""The chat messages that a row's prompt is made of."""

from __future__ import annotations

from typing import Any

from xbai.errors import UserError


def check_messages(messages: Any, column: str, place: str) -> None:
    """Raise a `UserError` that names `column` and `place` unless `messages` is a usable prompt."""
    usable = (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(m, dict) and m.get("role") and isinstance(m.get("content"), str) for m in messages)
    )
    if not usable:
        raise UserError(
            f"{place}: {column!r} must be a non-empty list of {{role, content}} messages, found {messages!r:.60}"
        )
