"""The policy service: `POST /generate`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI, Request

from xbai.aggregation import aggregate
from xbai.calibration import ScoreChance
from xbai.engine import Completion, SamplingParams, load_engine
from xbai.engine.files import check_model_folder
from xbai.engine.tensor_parallel import check_tensor_parallel_size, visible_gpus_that_share
from xbai.errors import UserError
from xbai.serve.app import Service
from xbai.serve.budgeted import chance_beside, complete_budgeted
from xbai.serve.engine_thread import EngineThread
from xbai.serve.errors import ServiceError
from xbai.serve.limits import Limits
from xbai.serve.options import PolicyOptions
from xbai.serve.schemas import GenerateRequest, GenerateResponse
from xbai.serve.server import listen, serve
from xbai.sprm.head import SCORE_MODULE_FILE

ENGINE_OPTIONS = ("dtype", "max_model_len", "tensor_parallel_size", "gpu_memory_utilization")
"""Those that `load_engine` takes; None leaves its default."""


def run_policy_service(options: PolicyOptions) -> None:
    """Run the policy service until SIGTERM or SIGINT.

    Raises:
        UserError: the port is taken, or the model cannot be loaded.
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
    limits = Limits.of(options)
    with listen(options.ip, options.port) as listener:
        thread = EngineThread(lambda: load_engine(options.engine, model_path, with_scores=options.with_scores, **given))
        serve(create_policy_app(thread, model_path, limits), listener)


def create_policy_app(thread: EngineThread, model_name: str, limits: Limits) -> FastAPI:
    """The ASGI application; it starts and stops `thread`."""
    service = Service("XBai policy service", model_name, thread, limits, ["/generate", "/score"], log_probs=True)
    service.metrics.watch("xbai_engine_samples_waiting", "Samples before the engine", lambda: len(thread.queue))
    service.metrics.watch("xbai_engine_samples_begun", "Samples in the engine", lambda: len(thread.begun))

    own_chance = chance_beside(model_name)

    # The README of XBai o4 gives its client this path of the policy service.
    @service.app.post("/score", **service.route(), response_model_exclude_none=True, include_in_schema=False)
    @service.app.post("/generate", **service.route(), response_model_exclude_none=True)
    async def generate(body: GenerateRequest, request: Request) -> GenerateResponse:
        """Sample `response_num` responses to a prompt."""
        with service.admission.admit(body.response_num):
            return await service.answer(request, _generate(service, thread, body, request, own_chance))

    return service.app


async def _generate(
    service: Service, thread: EngineThread, body: GenerateRequest, request: Request, own_chance: ScoreChance | None
) -> GenerateResponse:
    for field in ("return_scores", "budget"):
        if getattr(body, field) and thread.model.step_rule is None:
            raise ServiceError(422, f"{field}: this model has no score head")
    (prompt_ids,) = await service.encode(body.prefix_prompt)
    if len(prompt_ids) >= (most := thread.model.max_model_len):
        raise ServiceError(413, f"prefix_prompt: {len(prompt_ids)} tokens leave no room in the model's {most}")
    client = request.client.host if request.client else ""
    samples = thread.samples(prompt_ids, _sampling_params(body), body.return_scores or body.budget is not None)
    if body.budget is None:
        completions = await thread.complete(samples, client)
    else:
        completions = await complete_budgeted(thread, samples, body.budget, own_chance, client)
    response = _response(completions, body.return_scores, body.return_log_probs)
    generated = sum(response.token_counts)
    request.state.log |= {"responses": body.response_num, "prompt_tokens": len(prompt_ids), "tokens": generated}
    service.metrics.prompt_tokens.inc(len(prompt_ids))
    service.metrics.generated_tokens.inc(generated)
    for score in response.scores or ():
        if score is not None:
            service.metrics.scores.observe(score)
    for reason in response.finish_reasons:
        service.metrics.responses.labels(reason).inc()
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
        scores=[_score(completion) for completion in completions] if return_scores else None,
        step_scores=step_scores,
        mean_log_probs=[_mean(completion.log_probs) for completion in completions] if return_log_probs else None,
        step_ends=[completion.step_ends or [] for completion in completions] if return_scores else None,
        step_log_probs=(
            [completion.step_log_probs or [] for completion in completions]
            if return_scores and return_log_probs
            else None
        ),
    )


def _score(completion: Completion) -> float | None:
    is_whole = completion.finish_reason not in ("pruned", "not_begun")
    return aggregate(completion.step_scores or []) if is_whole else None


def _mean(log_probs: list[float] | None) -> float | None:
    return sum(log_probs) / len(log_probs) if log_probs else None
