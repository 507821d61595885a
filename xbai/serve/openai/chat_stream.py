"""`POST /v1/chat/completions` piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request

from xbai.serve.errors import ServiceError
from xbai.serve.openai.desk import Desk, Usage
from xbai.serve.openai.sse import COMMENT, DONE, event
from xbai.serve.progress import Progress
from xbai.serve.reflection import Answer, Question, Tell


class ChatStream:
    """The chunks of one answer.

    Args:
        head: what all chunks begin with.
        include_usage: the last chunk is what it has cost.
        include_progress: before the answer, chunks without content tell how far the candidates are.
        return_candidates: the chunk that ends the answer has them.
    """

    def __init__(
        self,
        desk: Desk,
        request: Request,
        question: Question,
        head: dict[str, Any],
        *,
        include_usage: bool,
        include_progress: bool,
        return_candidates: bool,
    ) -> None:
        self._desk = desk
        self._request = request
        self._question = question
        self._head = {**head, "object": "chat.completion.chunk"}
        self._include_usage = include_usage
        self._return_candidates = return_candidates
        self._tells_openwebui = desk.options.openwebui_status and question.params.n > 1
        self._tell_progress = include_progress or self._tells_openwebui

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, from the role to `[DONE]`; after the first, failures are events too."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for news in self._desk.service.follow(self._work):
                if news is None:
                    yield COMMENT
                elif isinstance(news, Progress):
                    yield self._chunk({}, **self._progress(news))
                elif isinstance(news, Answer):
                    async for last in self._end(news):
                        yield last
                else:
                    if news.reasoning:
                        yield self._chunk({self._desk.options.reasoning_field: news.reasoning})
                    if news.content:
                        yield self._chunk({"content": news.content})
        except ServiceError as error:
            yield event(error.to_openai())

    async def _work(self, tell: Tell) -> Answer:
        return await self._desk.answer(self._question, tell, self._tell_progress)

    async def _end(self, answer: Answer) -> AsyncIterator[str]:
        usage = await self._desk.usage(self._request, self._question, [answer])
        further = await self._desk.shown(self._question, [answer], self._return_candidates)
        if self._tells_openwebui:
            further["event"] = _status(f"chose the best of {self._question.params.n} candidates", done=True)
        yield self._chunk({}, finish_reason(answer), **further)
        if self._include_usage:
            yield event({**self._head, "choices": [], "usage": usage_of(usage)})
        yield DONE

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **further: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return event({**self._head, "choices": [choice], **usage, **further})

    def _progress(self, progress: Progress) -> dict[str, Any]:
        total = self._question.params.n
        further: dict[str, Any] = {
            "progress": {
                "candidates": total,
                "begun": len(progress.candidates),
                "done": progress.done,
                "tokens": progress.tokens,
                "best_score": progress.best_score,
                "each": [
                    {"tokens": one.tokens, "step_scores": one.step_scores, "done": one.done}
                    for one in progress.candidates
                ],
            }
        }
        if self._tells_openwebui:
            further["event"] = _status(
                f"{progress.done} of {total} candidates done, {progress.tokens} tokens", done=False
            )
        return further


def _status(description: str, done: bool) -> dict[str, Any]:
    """What Open WebUI shows above an answer that is coming."""
    return {"type": "status", "data": {"description": description, "done": done}}


def finish_reason(answer: Answer) -> str:
    """By OpenAI's names."""
    return "stop" if answer.is_whole else "length"


def usage_of(usage: Usage) -> dict[str, Any]:
    """By OpenAI's names."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }
