"""What stands behind both of OpenAI's interfaces: from a conversation to questions, from answers to what they cost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from fastapi import Request

from xbai.calibration import ScoreChance
from xbai.engine import Completion
from xbai.engine.detokenizer import Detokenizer
from xbai.errors import UserError
from xbai.prompts import Message
from xbai.search.budget import parse_budget
from xbai.seeds import sample_seed
from xbai.serve.app import Service
from xbai.serve.engine_thread import EngineThread
from xbai.serve.errors import ServiceError
from xbai.serve.openai.effort import ServedModel
from xbai.serve.openai.fields import SamplingFields
from xbai.serve.options import OpenAIOptions
from xbai.serve.reflection import Answer, Question, Tell, reflect
from xbai.serve.schemas import Budget
from xbai.serve.thinking import TextStream, ThinkingParser, split_thinking

THINKING_FIELDS = ("reasoning", "reasoning_content")
"""Of messages of earlier turns; templates leave earlier thinking out, and not all of them know its name."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: of its prompt, once, and of all that was written for it, the chosen content apart."""

    prompt: int
    cached: int
    completion: int
    content: int

    @property
    def reasoning(self) -> int:
        """All that was written but is not the content."""
        return self.completion - self.content


@dataclass(frozen=True)
class Asked:
    """What is asked in either interface, and the fields that say it there."""

    messages: Sequence[Any]
    messages_field: str
    effort: str | None
    effort_field: str
    max_tokens: int | None
    stop: str | list[str] | None = None


class Desk:
    """Asks a service's model.

    Args:
        name: what clients call it, where the options do not say.
        own_chance: of the calibration beside it.
    """

    def __init__(
        self,
        service: Service,
        thread: EngineThread,
        options: OpenAIOptions,
        name: str,
        own_chance: ScoreChance | None,
    ) -> None:
        self.service = service
        self.options = options
        self._thread = thread
        self._name = options.served_model_name or name
        self._own_chance = own_chance
        self._budget = effort_budget(options, own_chance)

    @property
    def model(self) -> ServedModel:
        """What is served.

        Raises:
            ServiceError: 503 while it is not loaded.
        """
        return ServedModel(self._name, self._thread.model.step_rule is not None, self.options.effort)

    async def question(self, request: Request, fields: SamplingFields, asked: Asked) -> Question:
        """What a request asks of the model.

        Raises:
            ServiceError: 404 for another model; 400 for what it cannot do; 413 for too long a prompt.
        """
        candidates = self.model.candidates(fields.model, asked.effort, fields.candidates, asked.effort_field)
        budget = fields.budget
        if budget is None and fields.candidates is None and candidates > 1:
            budget = self._budget
        try:
            prompt = await self.service.render(history(asked.messages), asked.messages_field)
        except UserError as error:
            raise ServiceError(400, str(error), code="invalid_value", param=asked.messages_field) from None
        return Question(
            prompt,
            await self.service.encode_prompt(asked.messages_field, prompt),
            fields.sampling(candidates, asked.max_tokens, asked.stop),
            answer_once=fields.answer_once is not False,
            budget=budget,
            return_scores=bool(fields.return_candidates) and self.model.scores,
            client=request.client.host if request.client else "",
        )

    async def answer(self, question: Question, tell: Tell | None = None, tell_progress: bool = False) -> Answer:
        """See `reflect`."""
        return await reflect(self._thread, question, self._own_chance, tell, tell_progress)

    async def answers(self, question: Question, count: int) -> list[Answer]:
        """Several, each of its own random streams."""
        seed = question.params.seed
        seeds = [seed if i == 0 or seed is None else sample_seed(seed, -i) for i in range(count)]
        questions = [replace(question, params=replace(question.params, seed=each)) for each in seeds]
        tasks = [asyncio.ensure_future(self.answer(each)) for each in questions]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def shown(self, question: Question, answers: Sequence[Answer], return_candidates: bool) -> dict[str, Any]:
        """What an answer has beside itself: its `candidates`, where they are asked for."""
        if not return_candidates:
            return {}
        # Their texts may be megabytes.
        made = await asyncio.to_thread(candidates_of, question, answers, self._thread.model.detokenize)
        return {"candidates": made}

    async def usage(self, request: Request, question: Question, answers: Sequence[Answer]) -> Usage:
        """What the answers have cost, which the service counts."""
        candidates = [candidate for answer in answers for candidate in answer.candidates]
        completion = sum(answer.generated for answer in answers)
        self.service.count(request, len(question.prompt_ids), candidates, completion)
        content = sum([await self._content_tokens(answer) for answer in answers])
        cached = candidates[0].cached_prompt_tokens
        return Usage(len(question.prompt_ids), cached, completion, min(content, completion))

    async def _content_tokens(self, answer: Answer) -> int:
        if answer.answer_tokens is not None:
            return answer.answer_tokens
        if not answer.said.reasoning:
            return answer.response.generated
        (content_ids,) = await self.service.encode(answer.said.content)
        return len(content_ids)


def effort_budget(options: OpenAIOptions, own_chance: ScoreChance | None) -> Budget | None:
    """The budget that an option names.

    Raises:
        UserError: it names none, or one that these routes cannot follow with this model.
    """
    if options.effort_budget is None:
        return None
    rule = parse_budget(options.effort_budget)
    if rule.needs_answers:
        raise UserError(
            f"--effort_budget {rule}: it compares answers, and of a chat nobody knows how; use stop or prune"
        )
    if rule.needs_chance and own_chance is None:
        raise UserError(f"--effort_budget {rule}: the model has no calibration of its own; make one (xbai calibrate)")
    return Budget(rule=str(rule), chance=None, data_source=None)


def history(messages: Sequence[Any]) -> list[Any]:
    """A conversation as chat templates know it."""
    return [_known(message) if isinstance(message, dict) else message for message in messages]


def _known(message: Message) -> Message:
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {name: value for name, value in message.items() if name not in THINKING_FIELDS} | {"role": role}


def candidates_of(question: Question, answers: Sequence[Answer], detokenize: Detokenizer) -> list[dict[str, Any]]:
    """What clients get of all candidates: of each answer's, one after the other."""
    return [
        {
            "choice": choice,
            "index": index,
            **_candidate(question, candidate, detokenize),
            **({"content": answer.said.content, "chosen": True} if index == answer.chosen else {"chosen": False}),
        }
        for choice, answer in enumerate(answers)
        for index, candidate in enumerate(answer.candidates)
    ]


def _candidate(question: Question, candidate: Completion, detokenize: Detokenizer) -> dict[str, Any]:
    said = split_thinking(question.prompt, candidate.text)
    return {
        "reasoning": said.reasoning,
        "content": said.content,
        "score": candidate.score,
        "step_scores": candidate.step_scores,
        "steps": None if candidate.step_ends is None else _steps(question, candidate, detokenize),
        "finish_reason": candidate.finish_reason,
    }


def _steps(question: Question, candidate: Completion, detokenize: Detokenizer) -> list[str]:
    """The text of each step; together they begin the thinking, or the content of what does not think."""
    stream, parser = TextStream(detokenize), ThinkingParser.after(question.prompt)
    pieces = []
    for begin, end in pairwise([0, *(candidate.step_ends or [])]):
        said = parser.push(stream.push(candidate.token_ids[begin:end]))
        pieces.append(said.reasoning + said.content)
    return pieces
