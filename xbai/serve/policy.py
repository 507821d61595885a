"""The policy service: `POST /generate`, and OpenAI's routes; as one server with the score service: `xbai serve`."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI, Request

from xbai.calibration import ScoreChance
from xbai.engine import Completion, Engine, SamplingParams, load_engine
from xbai.engine.tensor_parallel import check_tensor_parallel_size, visible_gpus_that_share
from xbai.errors import UserError
from xbai.model_folder import check_model_folder
from xbai.serve.app import Service
from xbai.serve.budgeted import chance_beside, complete_budgeted
from xbai.serve.engine_thread import EngineThread
from xbai.serve.errors import ServiceError
from xbai.serve.limits import Limits
from xbai.serve.openai.routes import OPENAI_ROUTES, add_openai_routes
from xbai.serve.options import OpenAIOptions, PolicyOptions
from xbai.serve.page import PAGE_ROUTES, add_page
from xbai.serve.reflection import Question, reflect
from xbai.serve.schemas import GenerateRequest, GenerateResponse
from xbai.serve.score import SCORE_ROUTES, add_score_routes
from xbai.serve.server import listen, serve
from xbai.sprm.head import SCORE_MODULE_FILE

ENGINE_OPTIONS = ("dtype", "max_model_len", "tensor_parallel_size", "gpu_memory_utilization")
"""Those that `load_engine` takes; None leaves its default."""


def run_policy_service(
    options: PolicyOptions, with_score_routes: bool = False, listener: socket.socket | None = None
) -> None:
    """Run the policy service until SIGTERM or SIGINT.

    Args:
        with_score_routes: it answers `POST /score` and `POST /score_batch` as the score service does.
        listener: where, instead of the options' address.

    Raises:
        UserError: the port is taken, or the model cannot be loaded.
    """
    load, limits = engine_loader(options), Limits.of(options)
    with listener or listen(options.ip, options.port) as listener:
        app = create_policy_app(EngineThread(load), options.model_path, limits, options.openai, with_score_routes)
        serve(app, listener)


def engine_loader(options: PolicyOptions) -> Callable[[], Engine]:
    """What loads the engine that is asked for.

    Raises:
        UserError: options that the model or this machine cannot follow.
    """
    model_path = options.model_path
    config = check_model_folder(model_path)
    if options.with_scores and not (Path(model_path) / SCORE_MODULE_FILE).is_file():
        raise UserError(f"--with_scores: {model_path} has no {SCORE_MODULE_FILE}; leave it out, or serve another model")
    given = {name: value for name in ENGINE_OPTIONS if (value := getattr(options, name)) is not None}
    if options.engine != "hf" and find_spec("vllm") is not None:
        if (size := given.get("tensor_parallel_size")) is not None:
            check_tensor_parallel_size(size, config, f"--tensor_parallel_size {size}")
        given["tensor_parallel_size"] = size or visible_gpus_that_share(config)
    return partial(load_engine, options.engine, model_path, with_scores=options.with_scores, **given)


def create_policy_app(
    thread: EngineThread,
    model_name: str,
    limits: Limits,
    openai: OpenAIOptions | None = None,
    with_score_routes: bool = False,
) -> FastAPI:
    """The ASGI application; it starts and stops `thread`.

    Raises:
        UserError: options that the model cannot follow.
    """
    openai = openai or OpenAIOptions()
    routes = ["/generate", *OPENAI_ROUTES, *SCORE_ROUTES]
    open_routes = PAGE_ROUTES if openai.page else ()
    service = Service(
        "XBai policy service", model_name, thread, limits, routes, log_probs=True, open_routes=open_routes
    )
    service.metrics.watch("xbai_engine_samples_waiting", "Samples before the engine", lambda: len(thread.queue))
    service.metrics.watch("xbai_engine_samples_begun", "Samples in the engine", lambda: len(thread.begun))

    own_chance = chance_beside(model_name)

    @service.app.post("/generate", **service.route(), response_model_exclude_none=True)
    async def generate(body: GenerateRequest, request: Request) -> GenerateResponse:
        """Sample `response_num` responses to a prompt."""
        with service.admission.admit(body.response_num):
            return await service.answer(request, _generate(service, thread, body, request, own_chance))

    if with_score_routes:
        add_score_routes(service, thread)
    else:
        # The README of XBai o4 gives its client this path of the policy service.
        alias = service.app.post("/score", **service.route(), response_model_exclude_none=True, include_in_schema=False)
        alias(generate)
    name = Path(model_name).resolve().name
    add_openai_routes(service, thread, openai, name, own_chance)
    if openai.page:
        add_page(service.app)
    return service.app


async def _generate(
    service: Service, thread: EngineThread, body: GenerateRequest, request: Request, own_chance: ScoreChance | None
) -> GenerateResponse:
    for field in ("return_scores", "budget", "answer_once"):
        if getattr(body, field) and thread.model.step_rule is None:
            raise ServiceError(422, f"{field}: this model has no score head")
    prompt_ids = await service.encode_prompt("prefix_prompt", body.prefix_prompt)
    client = request.client.host if request.client else ""
    params, chosen = _sampling_params(body), None
    if body.answer_once:
        question = Question(
            body.prefix_prompt,
            prompt_ids,
            params,
            budget=body.budget,
            return_scores=body.return_scores,
            client=client,
        )
        answer = await reflect(thread, question, own_chance)
        completions, chosen = list(answer.candidates), answer.chosen
        completions[chosen] = answer.response
    else:
        samples = thread.samples(prompt_ids, params, body.return_scores or body.budget is not None)
        completions = (await complete_budgeted(thread, samples, body.budget, own_chance, client)).results()
    response = _response(completions, body.return_scores, body.return_log_probs)
    response.chosen = chosen
    service.count(request, len(prompt_ids), completions, sum(response.token_counts))
    return response


def _sampling_params(body: GenerateRequest) -> SamplingParams:
    return SamplingParams(
        n=body.response_num,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k or -1,
        repetition_penalty=body.repetition_penalty,
        stop=body.stop_texts(),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        seed=body.seed,
        log_probs=body.return_log_probs,
    )


def _response(completions: list[Completion], return_scores: bool, return_log_probs: bool) -> GenerateResponse:
    step_scores = [completion.step_scores or [] for completion in completions] if return_scores else None
    return GenerateResponse(
        results=[completion.text for completion in completions],
        finish_reasons=[completion.finish_reason for completion in completions],
        token_counts=[completion.generated for completion in completions],
        scores=[completion.score for completion in completions] if return_scores else None,
        step_scores=step_scores,
        mean_log_probs=[_mean(completion.log_probs) for completion in completions] if return_log_probs else None,
        step_ends=[completion.step_ends or [] for completion in completions] if return_scores else None,
        step_log_probs=(
            [completion.step_log_probs or [] for completion in completions]
            if return_scores and return_log_probs
            else None
        ),
    )


def _mean(log_probs: list[float] | None) -> float | None:
    return sum(log_probs) / len(log_probs) if log_probs else None
