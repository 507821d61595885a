"""`POST /v1/chat/completions`: the request, and the answer in one piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from xbai.serve.openai.chat_stream import ChatStream, finish_reason, usage_of
from xbai.serve.openai.desk import Asked, Desk
from xbai.serve.openai.fields import (
    Count,
    LenientModel,
    SamplingFields,
    described,
    refusal,
    refuse_format,
    refuse_what_cannot_act,
)
from xbai.serve.openai.sse import EventStream
from xbai.serve.reflection import Answer
from xbai.serve.schemas import StopText

MAX_CHOICES = 128
CANNOT_ACT = {
    "tools": "this model calls no tools",
    "functions": "this model calls no functions",
    "logprobs": "log-probs are not returned here; POST /generate has mean log-probs",
    "top_logprobs": "log-probs are not returned here",
    "frequency_penalty": "there is none; use repetition_penalty",
    "presence_penalty": "there is none; use repetition_penalty",
    "logit_bias": "logits are not biased here",
    "audio": "text alone is generated",
    "web_search_options": "there is no search",
}


class StreamOptions(LenientModel):
    """What a stream is to have besides the answer."""

    include_usage: bool | None = None
    include_progress: bool | None = Field(
        default=None, description="How far the candidates are, at most once a second."
    )


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Any] = Field(min_length=1)
    reasoning_effort: str | None = Field(None, description="none, minimal, low, medium or high")
    max_tokens: Count = Field(None, description="Of each candidate.")
    max_completion_tokens: Count = Field(None, description="Of each candidate; comes before max_tokens.")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Refuse what cannot act.

        Raises:
            ServiceError: 400 that names the field.
        """
        refuse_what_cannot_act(self, CANNOT_ACT)
        given = self.model_extra or {}
        refuse_format("response_format", given.get("response_format"))
        if given.get("modalities") not in (None, [], ["text"]):
            raise refusal("modalities", "text alone is generated")
        if self.stream and (self.n or 1) > 1:
            raise refusal("n", "a stream has one choice; leave out n, or stream")

    def asked(self) -> Asked:
        """What it asks."""
        most = self.max_completion_tokens or self.max_tokens
        return Asked(self.messages, "messages", self.reasoning_effort, "reasoning_effort", most, self.stop)


def add_chat_route(desk: Desk) -> None:
    """Add it to the desk's service."""
    service = desk.service

    @service.app.post("/v1/chat/completions", **described(service, streams=True))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The answer to a conversation, the best of as many candidates as the reasoning effort says."""
        body.check()
        question = await desk.question(request, body, body.asked())
        count = body.n or 1
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or desk.model.name,
        }
        with ExitStack() as places:
            places.enter_context(service.admission.admit(question.params.n * count))
            if body.stream:
                options = body.stream_options or StreamOptions()
                stream = ChatStream(
                    desk,
                    request,
                    question,
                    head,
                    include_usage=bool(options.include_usage),
                    include_progress=bool(options.include_progress),
                    return_candidates=bool(body.return_candidates),
                )
                return EventStream(stream.events(), places.pop_all().close)
            answers = await service.answer(request, desk.answers(question, count))
        usage = await desk.usage(request, question, answers)
        shown = await desk.shown(question, answers, bool(body.return_candidates))
        return JSONResponse(
            {
                **head,
                "object": "chat.completion",
                "choices": _choices(answers, desk.options.reasoning_field),
                "usage": usage_of(usage),
                **shown,
            }
        )


def _choices(answers: Sequence[Answer], reasoning_field: str) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "message": {
                "role": "assistant",
                "content": answer.said.content,
                reasoning_field: answer.said.reasoning or None,
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": finish_reason(answer),
        }
        for index, answer in enumerate(answers)
    ]
