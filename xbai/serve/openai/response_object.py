"""The object that `POST /v1/responses` returns, at its beginning and at its end."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from xbai.serve.openai.desk import Usage
from xbai.serve.reflection import Answer


def _fresh_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


@dataclass
class ResponseObject:
    """Its output is an item of thinking, where there is some, and a message.

    Attributes:
        head: what it says of the request.
    """

    head: dict[str, Any]
    reasoning_id: str = field(default_factory=lambda: _fresh_id("rs"))
    message_id: str = field(default_factory=lambda: _fresh_id("msg"))

    def begun(self) -> dict[str, Any]:
        """While it is written."""
        return {
            "object": "response",
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": None,
            **self.head,
        }

    def ended(self, answer: Answer, usage: Usage, shown: dict[str, Any]) -> dict[str, Any]:
        """With all that was written.

        Args:
            shown: of `Desk`.
        """
        reasoning = [self.reasoning_item(answer.said.reasoning)] if answer.said.reasoning else []
        status = "completed" if answer.is_whole else "incomplete"
        return {
            **self.begun(),
            "status": status,
            "incomplete_details": None if answer.is_whole else {"reason": "max_output_tokens"},
            "output": [*reasoning, self.message_item(answer.said.content, status)],
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            },
            **shown,
        }

    def failed(self, message: str) -> dict[str, Any]:
        """Without an end."""
        return {**self.begun(), "status": "failed", "error": {"code": "server_error", "message": message}}

    def reasoning_item(self, text: str | None) -> dict[str, Any]:
        """The thinking; None before there is any."""
        content = [] if text is None else [{"type": "reasoning_text", "text": text}]
        status = "in_progress" if text is None else "completed"
        return {"id": self.reasoning_id, "type": "reasoning", "summary": [], "content": content, "status": status}

    def message_item(self, text: str | None, status: str = "in_progress") -> dict[str, Any]:
        """The content; None before there is any."""
        content = [] if text is None else [text_part(text)]
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "status": status,
        }


def text_part(text: str) -> dict[str, Any]:
    """Of a message's content."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
