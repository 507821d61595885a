"""`POST /v1/responses`: text in, text out; nothing is stored."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from xbai.serve.errors import ServiceError
from xbai.serve.openai.desk import Asked, Desk
from xbai.serve.openai.fields import (
    Count,
    LenientModel,
    SamplingFields,
    described,
    refuse_format,
    refuse_what_cannot_act,
)
from xbai.serve.openai.response_object import ResponseObject
from xbai.serve.openai.responses_stream import ResponsesStream
from xbai.serve.openai.sse import EventStream
from xbai.serve.schemas import Text

CANNOT_ACT = {
    "tools": "this model calls no tools",
    "previous_response_id": "responses are not stored; send the whole conversation as input",
    "conversation": "conversations are not stored; send the whole one as input",
    "background": "there are no background responses; use stream",
    "prompt": "there are no stored prompts; send input",
    "top_logprobs": "log-probs are not returned here",
}


class Reasoning(LenientModel):
    """How hard to think."""

    effort: str | None = Field(None, description="none, minimal, low, medium or high")


class ResponsesRequest(SamplingFields):
    """Body of `POST /v1/responses`."""

    input: Text | list[Any]
    instructions: Text | None = Field(None, description="Comes first, as a system message.")
    reasoning: Reasoning | None = None
    max_output_tokens: Count = Field(None, description="Of each candidate.")

    def check(self) -> None:
        """Refuse what cannot act.

        Raises:
            ServiceError: 400 that names the field.
        """
        refuse_what_cannot_act(self, CANNOT_ACT)
        text = (self.model_extra or {}).get("text")
        refuse_format("text.format", text.get("format") if isinstance(text, dict) else text)

    def asked(self) -> Asked:
        """What it asks.

        Raises:
            ServiceError: 400 for an item that is no message.
        """
        effort = self.reasoning.effort if self.reasoning else None
        return Asked(self._messages(), "input", effort, "reasoning.effort", self.max_output_tokens)

    def _messages(self) -> list[Any]:
        """The conversation, as a chat's.

        Raises:
            ServiceError: 400 for an item that is no message.
        """
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        items = [item for item in self.input if not (isinstance(item, dict) and item.get("type") == "reasoning")]
        return [*first, *(_message(item, f"input: item {number}") for number, item in enumerate(items, start=1))]


def _message(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, dict) or item.get("type") not in (None, "message"):
        kind = item.get("type") if isinstance(item, dict) else item
        raise ServiceError(400, f"{place}: only messages are taken, found {kind!r:.60}", param="input")
    content = item.get("content")
    if isinstance(content, list):
        content = [
            {**part, "type": "text"}
            if isinstance(part, dict) and part.get("type") in ("input_text", "output_text")
            else part
            for part in content
        ]
    return {"role": item.get("role"), "content": content}


def add_responses_route(desk: Desk) -> None:
    """Add it to the desk's service."""
    service = desk.service

    @service.app.post("/v1/responses", **described(service, streams=True))
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """The answer to an input, the best of as many candidates as the reasoning effort says."""
        body.check()
        asked = body.asked()
        question = await desk.question(request, body, asked)
        made = ResponseObject(
            {
                "id": f"resp_{uuid.uuid4().hex}",
                "created_at": int(time.time()),
                "model": body.model or desk.model.name,
                "instructions": body.instructions,
                "max_output_tokens": body.max_output_tokens,
                "reasoning": {"effort": asked.effort, "summary": None},
                "temperature": question.params.temperature,
                "top_p": question.params.top_p,
                "user": body.user,
            }
        )
        return_candidates = bool(body.return_candidates)
        with ExitStack() as places:
            places.enter_context(service.admission.admit(question.params.n))
            if body.stream:
                stream = ResponsesStream(desk, request, question, made, return_candidates)
                return EventStream(stream.events(), places.pop_all().close)
            answer = await service.answer(request, desk.answer(question))
        usage = await desk.usage(request, question, [answer])
        shown = await desk.shown(question, [answer], return_candidates)
        return JSONResponse(made.ended(answer, usage, shown))
