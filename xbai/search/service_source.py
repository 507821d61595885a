"""Continuations over HTTP: the policy service writes, it or the score service judges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xbai.evaluate.client import RequestFailedError, RequestTooLongError, ServicePool
from xbai.search.expander import Continuation
from xbai.search.path import Path
from xbai.sprm import StepRule
from xbai.sprm.steps import ScoredPart, joined_scores
from xbai.sprm.tags import THINK_CLOSE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StepServices:
    """What the searches of all questions share.

    Attributes:
        policy: `POST /generate`.
        scorer: `POST /score`; None where the policy service returns scores.
        sampling: fields of every `/generate` request (temperature, top_p, ...).
        rule, tokenizer: of the model.
    """

    policy: ServicePool
    scorer: ServicePool | None
    sampling: dict[str, Any]
    rule: StepRule
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Answer:
    text: str
    finish_reason: str
    token_count: int
    step_scores: list[float]


class ServiceSource:
    """Writes on at the responses to one prompt; a step token pauses generation and stays in the text.

    Args:
        services: what generates and scores.
        prompt: the question, chat template applied.
        ticket: of the requests that wait for the services, those of the lowest go first.
    """

    def __init__(self, services: StepServices, prompt: str, ticket: int) -> None:
        self._services = services
        self._prompt = prompt
        self._ticket = ticket

    async def write_on(self, path: Path, max_tokens: int, to_end: bool, seed: int | None) -> Continuation:
        """See `StepSource`."""
        try:
            answer = await self._post(path, max_tokens, to_end or THINK_CLOSE in path.text, seed)
        except RequestTooLongError:
            if not path.text:
                raise
            return Continuation(replace(path, finish_reason="length"), 0)
        try:
            step_scores = await self._step_scores(path, answer)
        except RequestTooLongError as error:  # The score service may take less than the policy service.
            if not path.text:
                raise RequestFailedError(f"no score for what the response begins with: {error}") from None
            return Continuation(replace(path, finish_reason="length"), answer.token_count)
        grown = Path(
            text=path.text + answer.text,
            token_count=path.token_count + answer.token_count,
            step_scores=step_scores,
            finish_reason="stop" if answer.finish_reason == "stop" else None,
        )
        return Continuation(grown, answer.token_count)

    async def _post(self, path: Path, max_tokens: int, to_end: bool, seed: int | None) -> _Answer:
        answer = await self._services.policy.post(
            {
                **self._services.sampling,
                "prefix_prompt": self._prompt + path.text,
                "response_num": 1,
                "max_tokens": max_tokens,
                "stop_token_ids": [] if to_end else list(self._services.rule.step_ids),
                "seed": seed,
                "return_scores": self._services.scorer is None,
            },
            ticket=self._ticket,
        )
        return _Answer(
            text=answer["results"][0],
            finish_reason=answer["finish_reasons"][0],
            token_count=answer["token_counts"][0],
            step_scores=answer["step_scores"][0] if self._services.scorer is None else [],
        )

    async def _step_scores(self, path: Path, answer: _Answer) -> tuple[float, ...]:
        scorer, tokenizer = self._services.scorer, self._services.tokenizer
        if scorer is None:
            prompt_ids, *ids = (
                tokenizer.encode(text, add_special_tokens=False) for text in (self._prompt, path.text, answer.text)
            )
            before, added = map(ScoredPart, ids, (path.step_scores, answer.step_scores))
            return tuple(joined_scores(prompt_ids, before, added, self._services.rule))
        text = self._prompt + path.text + answer.text
        payload = {"text": text, "prompt": self._prompt, "return_all_scores": True}
        scored = await scorer.post(payload, ticket=self._ticket)
        return tuple(scored["all_scores"])
