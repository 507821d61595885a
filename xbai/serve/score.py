"""The score service: `POST /score` and `POST /score_batch`."""

from __future__ import annotations

from fastapi import FastAPI, Request

from xbai.engine import Engine, Scored, Scorer
from xbai.engine.files import read_config, resolve_max_model_len
from xbai.errors import UserError
from xbai.model_folder import check_model_folder, load_tokenizer
from xbai.serve.app import Service
from xbai.serve.engine_thread import EngineThread
from xbai.serve.errors import ServiceError, list_problems
from xbai.serve.limits import Limits
from xbai.serve.options import ScoreOptions
from xbai.serve.schemas import ScoreBatchRequest, ScoreBatchResponse, ScoreRequest, ScoreResponse
from xbai.serve.scorer_thread import ScoreModel, ScorerThread
from xbai.serve.server import listen, serve
from xbai.sprm import StepRule, split_response

SCORE_ROUTES = ("/score", "/score_batch")


def run_score_service(options: ScoreOptions) -> None:
    """Run the score service until SIGTERM or SIGINT.

    Raises:
        UserError: the port is taken, `score_model_dim` is not the model's, or the model cannot be loaded.
    """
    model_path, expected = options.model_path, options.score_model_dim
    hidden_size = check_model_folder(model_path).get("hidden_size")
    if expected not in (None, hidden_size):
        raise UserError(f"--score_model_dim {expected}: {model_path} has hidden_size {hidden_size}")
    limits = Limits.of(options)
    with listen(options.ip, options.port) as listener:
        serve(create_score_app(ScorerThread(lambda: _load_scorer(options)), model_path, limits), listener)


def _load_scorer(options: ScoreOptions) -> ScoreModel:
    path = options.model_path
    scorer = Scorer.from_folder(path, dtype=options.dtype, lang=options.lang, max_batch_tokens=options.max_batch_tokens)
    return ScoreModel(scorer, load_tokenizer(path), resolve_max_model_len(options.max_model_len, read_config(path)))


def create_score_app(thread: ScorerThread, model_name: str, limits: Limits) -> FastAPI:
    """The ASGI application; it starts and stops `thread`."""
    service = Service("XBai score service", model_name, thread, limits, SCORE_ROUTES, log_probs=False)
    add_score_routes(service, thread)
    return service.app


def add_score_routes(service: Service, thread: ScorerThread | EngineThread) -> None:
    """Those of `SCORE_ROUTES`, answered by `thread`."""

    @service.app.post("/score", **service.route(), response_model_exclude_none=True)
    async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
        """The trajectory score of one text (prompt and response)."""
        with service.admission.admit(1):
            scored = await service.answer(request, _score(service, thread, {"text": body.text}, body.prompt, request))
        details = _details(scored) if body.return_all_scores else {}
        return ScoreResponse(value=scored[0].value, **{name: values[0] for name, values in details.items()})

    @service.app.post("/score_batch", **service.route(), response_model_exclude_none=True)
    async def score_batch(body: ScoreBatchRequest, request: Request) -> ScoreBatchResponse:
        """The trajectory scores of several texts. A text that cannot be scored refuses them all, and is named."""
        texts = {f"texts[{i}]": text for i, text in enumerate(body.texts)}
        with service.admission.admit(len(texts)):
            scored = await service.answer(request, _score(service, thread, texts, body.prompt, request))
        details = _details(scored) if body.return_all_scores else {}
        return ScoreBatchResponse(values=[item.value for item in scored], **details)


async def _score(
    service: Service, thread: ScorerThread | EngineThread, texts: dict[str, str], prompt: str | None, request: Request
) -> list[Scored]:
    """Score texts, given by the names that refusals call them."""
    if (rule := thread.model.step_rule) is None:
        raise ServiceError(422, "text: this model has no score head")
    tokenized = {name: await _tokenize(service, prompt, name, text, rule) for name, text in texts.items()}
    _check({name: ids for name, (ids, _) in tokenized.items()}, thread.model)
    sequences, starts = zip(*tokenized.values(), strict=True)
    client = request.client.host if request.client else ""
    scored = await thread.score(sequences, starts, client)
    tokens = sum(map(len, sequences))
    request.state.log |= {"texts": len(texts), "tokens": tokens}
    service.metrics.prompt_tokens.inc(tokens)
    for item in scored:
        service.metrics.scores.observe(item.value)
    return scored


def _details(scored: list[Scored]) -> dict[str, list[list]]:
    return {
        "all_scores": [item.step_scores for item in scored],
        "token_ids": [item.token_ids for item in scored],
        "score_positions": [item.positions for item in scored],
    }


def _check(sequences: dict[str, list[int]], model: ScoreModel | Engine) -> None:
    vocabulary = model.vocab_size
    too_long = [f"{name}: {len(ids)} tokens" for name, ids in sequences.items() if len(ids) > model.max_model_len]
    if too_long:
        raise ServiceError(413, f"{list_problems(too_long, ', ')}, the model takes {model.max_model_len}")
    for name, ids in sequences.items():
        if not ids or max(ids) >= vocabulary:
            raise ServiceError(
                422, f"{name}: needs at least one token, and none outside the model's vocabulary ({vocabulary})"
            )


async def _tokenize(
    service: Service, prompt: str | None, name: str, text: str, rule: StepRule
) -> tuple[list[int], int]:
    """Token ids and where the response begins."""
    if prompt is None:
        prompt, response = split_response(text, rule)
    elif text.startswith(prompt):
        response = text[len(prompt) :]
    else:
        raise ServiceError(422, f"prompt: {name} does not start with it")
    prompt_ids, response_ids = await service.encode(prompt, response)
    return prompt_ids + response_ids, len(prompt_ids)
