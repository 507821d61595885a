"""`POST /v1/responses` piece by piece: named events, each with a number."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

from fastapi import Request

from xbai.serve.errors import ServiceError
from xbai.serve.openai.desk import Desk
from xbai.serve.openai.response_object import ResponseObject, text_part
from xbai.serve.openai.sse import COMMENT, event
from xbai.serve.reflection import Answer, Question, Tell
from xbai.serve.thinking import Said


class ResponsesStream:
    """The events of one response: an item of thinking is open until the content begins, and the message to the end."""

    def __init__(
        self, desk: Desk, request: Request, question: Question, made: ResponseObject, return_candidates: bool
    ) -> None:
        self._desk = desk
        self._request = request
        self._question = question
        self._made = made
        self._return_candidates = return_candidates
        self._numbers = count()
        self._said = Said()
        self._open: str | None = None
        self._index = -1

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, from `response.created` to the one that ends it."""
        yield self._event("response.created", response=self._made.begun())
        yield self._event("response.in_progress", response=self._made.begun())
        try:
            async for news in self._desk.service.follow(self._work):
                if news is None:
                    yield COMMENT
                elif isinstance(news, Said):
                    for part in self._more(news):
                        yield part
                elif isinstance(news, Answer):
                    for part in self._close():
                        yield part
                    yield await self._end(news)
        except ServiceError as error:
            yield self._event("response.failed", response=self._made.failed(error.detail))

    async def _work(self, tell: Tell) -> Answer:
        return await self._desk.answer(self._question, tell)

    async def _end(self, answer: Answer) -> str:
        usage = await self._desk.usage(self._request, self._question, [answer])
        shown = await self._desk.shown(self._question, [answer], self._return_candidates)
        ended = self._made.ended(answer, usage, shown)
        return self._event(f"response.{ended['status']}", response=ended)

    def _more(self, said: Said) -> Iterator[str]:
        if said.reasoning:
            if self._open is None:
                yield from self._open_reasoning()
            self._said.reasoning += said.reasoning
            yield self._of_part("response.reasoning_text.delta", self._made.reasoning_id, delta=said.reasoning)
        if said.content:
            if self._open != "message":
                yield from self._close_reasoning()
                yield from self._open_message()
            self._said.content += said.content
            message_id = self._made.message_id
            yield self._of_part("response.output_text.delta", message_id, delta=said.content, logprobs=[])

    def _open_reasoning(self) -> Iterator[str]:
        self._open, self._index = "reasoning", self._index + 1
        yield self._of_item("response.output_item.added", self._made.reasoning_item(None))

    def _close_reasoning(self) -> Iterator[str]:
        if self._open == "reasoning":
            text = self._said.reasoning
            yield self._of_part("response.reasoning_text.done", self._made.reasoning_id, text=text)
            yield self._of_item("response.output_item.done", self._made.reasoning_item(text))

    def _open_message(self) -> Iterator[str]:
        self._open, self._index = "message", self._index + 1
        yield self._of_item("response.output_item.added", self._made.message_item(None))
        yield self._of_part("response.content_part.added", self._made.message_id, part=text_part(""))

    def _close(self) -> Iterator[str]:
        """Every response has a message, be it empty."""
        if self._open != "message":
            yield from self._close_reasoning()
            yield from self._open_message()
        text, message_id = self._said.content, self._made.message_id
        yield self._of_part("response.output_text.done", message_id, text=text, logprobs=[])
        yield self._of_part("response.content_part.done", message_id, part=text_part(text))
        yield self._of_item("response.output_item.done", self._made.message_item(text, "completed"))

    def _of_item(self, kind: str, item: dict[str, Any]) -> str:
        return self._event(kind, output_index=self._index, item=item)

    def _of_part(self, kind: str, item_id: str, **fields: Any) -> str:
        return self._event(kind, item_id=item_id, output_index=self._index, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, name=kind)
