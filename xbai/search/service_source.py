"""Continuations over HTTP: the policy service writes, it or the score service judges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xbai.client.pool import RequestFailedError, RequestTooLongError, ServicePool
from xbai.client.wire import read_responses, read_score, score_request
from xbai.errors import UserError
from xbai.search.expander import Continuation
from xbai.search.path import SearchPath
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
        names_prompt: the score service is told where the prompt ends.
    """

    policy: ServicePool
    scorer: ServicePool | None
    sampling: dict[str, Any]
    rule: StepRule
    tokenizer: PreTrainedTokenizerBase
    names_prompt: bool = True


@dataclass(frozen=True)
class _Answer:
    text: str
    finish_reason: str
    token_count: int
    step_scores: list[float] | tuple[()] = ()


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

    async def write_on(self, path: SearchPath, max_tokens: int, to_end: bool, seed: int | None) -> Continuation:
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
        grown = SearchPath(
            text=path.text + answer.text,
            token_count=path.token_count + answer.token_count,
            step_scores=step_scores,
            finish_reason="stop" if answer.finish_reason == "stop" else None,
        )
        return Continuation(grown, answer.token_count)

    async def _post(self, path: SearchPath, max_tokens: int, to_end: bool, seed: int | None) -> _Answer:
        is_fused = self._services.scorer is None
        columns = ("finish_reasons", "token_counts", *(("step_scores",) if is_fused else ()))
        ((text, *others),) = await self._services.policy.post(
            {
                **self._services.sampling,
                "prefix_prompt": self._prompt + path.text,
                "response_num": 1,
                "max_tokens": max_tokens,
                **({} if to_end else {"stop_token_ids": list(self._services.rule.step_ids)}),
                **({} if seed is None else {"seed": seed}),
                **({"return_scores": True} if is_fused else {}),
            },
            lambda body: read_responses(body, 1, *columns),
            ticket=self._ticket,
        )
        if None in others:
            raise UserError(
                f"/generate does not return {' and '.join(columns)}, which a search by steps needs: use this project's "
                "policy service, or --search best_of_n"
            )
        return _Answer(text, *others)

    async def _step_scores(self, path: SearchPath, answer: _Answer) -> tuple[float, ...]:
        scorer, tokenizer = self._services.scorer, self._services.tokenizer
        if scorer is None:
            prompt_ids, *ids = (
                tokenizer.encode(text, add_special_tokens=False) for text in (self._prompt, path.text, answer.text)
            )
            before, added = map(ScoredPart, ids, (path.step_scores, answer.step_scores))
            return tuple(joined_scores(prompt_ids, before, added, self._services.rule))
        request = score_request(self._prompt, path.text + answer.text, self._services.names_prompt)
        _, step_scores = await scorer.post(request, read_score, ticket=self._ticket)
        if step_scores is None:
            raise UserError("/score does not return all_scores, which a search by steps needs")
        return tuple(step_scores)
