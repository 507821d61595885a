"""The score service: `POST /score` and `POST /score_batch`."""

from __future__ import annotations

from fastapi import FastAPI, Request

from xbai.engine import Scored
from xbai.serve.app import ERRORS, Service
from xbai.serve.engine_thread import ScoreModel, ScorerThread
from xbai.serve.errors import ServiceError
from xbai.serve.limits import Limits
from xbai.serve.schemas import ScoreBatchRequest, ScoreBatchResponse, ScoreRequest, ScoreResponse
from xbai.sprm import split_response


def create_score_app(thread: ScorerThread, model_name: str, limits: Limits) -> FastAPI:
    """The ASGI application; it starts and stops `thread`."""
    service = Service("XBai score service", model_name, thread, limits, ["/score", "/score_batch"])

    @service.app.post("/score", responses=ERRORS, response_model_exclude_none=True)
    async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
        """The trajectory score of one text (prompt and response)."""
        with service.admission.admit(1):
            (scored,) = await service.answer(request, _score(service, [(body.prompt, body.text)], request))
        if not body.return_all_scores:
            return ScoreResponse(value=scored.value)
        return ScoreResponse(
            value=scored.value,
            all_scores=scored.step_scores,
            token_ids=scored.token_ids,
            score_positions=scored.positions,
        )

    @service.app.post("/score_batch", responses=ERRORS)
    async def score_batch(body: ScoreBatchRequest, request: Request) -> ScoreBatchResponse:
        """The trajectory scores of several texts."""
        with service.admission.admit(len(body.texts)):
            scored = await service.answer(request, _score(service, [(None, text) for text in body.texts], request))
        return ScoreBatchResponse(values=[item.value for item in scored])

    return service.app


async def _score(service: Service, items: list[tuple[str | None, str]], request: Request) -> list[Scored]:
    thread: ScorerThread = service.thread
    tokenized = [await _tokenize(service, prompt, text) for prompt, text in items]
    for ids, _ in tokenized:
        _check(ids, thread.model)
    scored = await thread.score([ids for ids, _ in tokenized], [start for _, start in tokenized])
    tokens = sum(len(ids) for ids, _ in tokenized)
    request.state.log |= {"texts": len(items), "tokens": tokens}
    service.metrics.prompt_tokens.inc(tokens)
    service.metrics.observe_scores(item.value for item in scored)
    return scored


def _check(ids: list[int], model: ScoreModel) -> None:
    vocabulary = model.scorer.backbone.config.vocab_size
    if len(ids) > model.max_model_len:
        raise ServiceError(413, f"text: {len(ids)} tokens, the model takes {model.max_model_len}")
    if not ids or max(ids) >= vocabulary:
        raise ServiceError(
            422, f"text: needs at least one token, and none outside the model's vocabulary ({vocabulary})"
        )


async def _tokenize(service: Service, prompt: str | None, text: str) -> tuple[list[int], int]:
    """Token ids and where the response begins."""
    if prompt is None:
        prompt, response = split_response(text, service.thread.model.step_rule)
    elif text.startswith(prompt):
        response = text[len(prompt) :]
    else:
        raise ServiceError(422, "prompt: text does not start with it")
    prompt_ids, response_ids = await service.encode(prompt, response)
    return prompt_ids + response_ids, len(prompt_ids)
