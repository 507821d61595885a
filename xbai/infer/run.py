"""The inference run: questions in, several scored responses to each out.

Work is divided into requests for a few samples of one question. All questions are in flight at once, as far as the
services take them; a response is scored while others are still generated; every finished sample is kept at once, so
that a run that died goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xbai.benchmarks.base import Benchmark, Question
from xbai.benchmarks.registry import get_benchmark
from xbai.calibration import Calibration
from xbai.client.pool import ServicePool, open_client
from xbai.client.wire import ServedModel
from xbai.errors import UserError, first_error
from xbai.infer.driver import Driver, Services
from xbai.infer.options import RunOptions
from xbai.infer.progress import Progress, Tally
from xbai.infer.running_grades import RunningGrades
from xbai.infer.schedule import GenerationRequest, Schedule, missing_requests
from xbai.infer.store import ResultStore, check_result_file
from xbai.model_folder import load_chat_tokenizer, load_tokenizer
from xbai.model_identity import is_same_model, model_identity
from xbai.prompts import prompt_text
from xbai.results.lines import StoredQuestion
from xbai.results.run_budget import RunBudget
from xbai.results.settings import RunSettings, check_calibration, digest_texts
from xbai.search.rule import Rule

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerBase

    from xbai.search.expander import StepSource

logger = logging.getLogger(__name__)

SYNC_INTERVAL_S = 1.0
GRADING_PATIENCE_S = 10.0
"""How long the end of a run waits for the accuracy to be complete."""


def run(options: RunOptions) -> Path:
    """Generate and score everything that is not there yet; returns the result file.

    Raises:
        UserError: bad input, results of another run in the file, services that stay away, or that failed on some.
        KeyboardInterrupt: Ctrl-C; what is finished is kept.
    """
    api_key = options.api_key.read()
    benchmark = get_benchmark(
        options.task, release=options.release, start_date=options.start_date, end_date=options.end_date
    )
    check_result_file(options.output_file)
    tokenizer = (load_tokenizer if options.search.is_step_search else load_chat_tokenizer)(options.model_dir)
    questions = {question.index: question for question in benchmark.read(options.input_file)}
    stored = [_stored(benchmark, tokenizer, question) for question in questions.values()]
    settings = RunSettings(
        task=options.task,
        model=model_identity(options.model_dir),
        questions=digest_texts([question.prompt for question in stored]),
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        max_tokens=options.max_tokens,
        stop=options.stop,
        seed=options.seed,
        search=options.search.to_dict(),
    )
    if (budget := run_budget(options, settings)) is not None:
        settings = replace(settings, budget=budget.to_settings())
    ours = stored[: options.max_questions][options.part :: options.total_parts]
    with ResultStore(options.output_file, settings, ours) as store:
        logger.info("results will be in %s; until the run ends, in %s", store.path, store.journal_path)
        try:
            work = _run(options, api_key, ours, store, tokenizer, benchmark, questions, budget)
            failed = _run_until_interrupted(work)
        except ExceptionGroup as group:
            raise first_error(group) from group
        except KeyboardInterrupt:
            logger.warning("interrupted: %d samples are kept; run the same command again to go on", len(store))
            raise
        store.write_results()
    if failed:
        raise UserError(
            f"{options.output_file}: {failed} samples are missing, on which the service failed each time "
            "(see above); run the same command again to ask for them"
        )
    logger.info("results: %s", options.output_file)
    return Path(options.output_file)


def _run_until_interrupted(main: Coroutine[Any, Any, int]) -> int:
    """`asyncio.run` whose task is cancelled by Ctrl-C, which it then raises; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(main)

    async def cancelled_by_interrupt() -> int:
        task = asyncio.ensure_future(main)

        def interrupt() -> None:
            signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        return await task

    before = signal.getsignal(signal.SIGINT)
    try:
        return asyncio.run(cancelled_by_interrupt())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _stored(benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase, question: Question) -> StoredQuestion:
    prompt = prompt_text(tokenizer, benchmark.messages(question), question.place)
    return StoredQuestion(question.index, prompt, question.answer, {**question.meta, "question": question.prompt})


async def _run(
    options: RunOptions,
    api_key: str | None,
    stored: Sequence[StoredQuestion],
    store: ResultStore,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    questions: Mapping[int, Question],
    budget: RunBudget | None,
) -> int:
    """Do what is missing of the `stored` questions; returns on how many samples the services failed each time."""
    requests = list(missing_requests(stored, store, options.candidates, options.request_size))
    total = len(store) + sum(len(request.missing) for request in requests)
    if len(store):
        logger.info("%d of %d samples are there already", len(store), total)
    tally = Tally(options.group_size)
    async with (
        open_client(api_key) as client,
        _synced(store),
        RunningGrades(benchmark, questions, store, tally) as grades,
    ):
        services = await _services(options, store, client, requests, budget, benchmark.data_source)
        done = store.complete() + (store.unscored() if services.scorer is None else [])
        for key in done if requests else ():
            grades.add(key)
        with Progress(total, len(done), tally) as progress:
            driver = Driver(options, services, store, progress, grades.add)
            if options.search.is_step_search:
                await driver.search(requests, _step_source(options, services, tokenizer))
            else:
                await driver.run(Schedule(requests), {question.index: question.prompt for question in stored})
            await grades.settle(GRADING_PATIENCE_S)
    return driver.failed


async def _services(
    options: RunOptions,
    store: ResultStore,
    client: httpx.AsyncClient,
    requests: Sequence[GenerationRequest],
    budget: RunBudget | None,
    data_source: str,
) -> Services:
    """What is asked, once it is sure that it serves the models that made what is there."""
    policy = ServicePool(options.response_api_url, "/generate", client, options.retry, options.max_in_flight)
    scorer = policy_model = scorer_model = None
    if requests:
        policy_model = await policy.served_model(f"--response_api_url {options.response_api_url}")
        _say_what_is_not_known("--response_api_url", policy_model, options.further_sampling())
        store.record(policy=policy_model.identity)
    asks_scorer = store.unscored() or (requests and options.score_source != "fused")
    if options.score_api_url and options.score_source != "none" and asks_scorer:
        scorer = ServicePool(options.score_api_url, "/score", client, options.retry, options.max_in_flight)
        scorer_model = await scorer.served_model(f"--score_api_url {options.score_api_url}")
        _say_what_is_not_known("--score_api_url", scorer_model, {})
    fused = policy_model is not None and use_fused_scores(options, policy_model, scorer_model)
    if budget is not None and policy_model is not None:
        _check_budget(options, budget, fused, policy_model)
    for model in (policy_model if fused else None, scorer_model):
        if model is not None:
            store.record(scorer=model.identity, lang=model.lang)
    return Services(
        policy,
        scorer,
        fused,
        log_probs=policy_model is not None and policy_model.log_probs,
        names_prompt=scorer_model is not None and scorer_model.is_ours,
        budget={} if budget is None else budget.to_request(data_source),
    )


def _check_budget(options: RunOptions, budget: RunBudget, fused: bool, policy: ServedModel) -> None:
    place = f"{budget.options}: --response_api_url {options.response_api_url}"
    if not fused:
        raise UserError(f"{place} does not return the scores of --score_api_url, and chooses by its own")
    ours = model_identity(options.model_dir)
    if budget.chance and not (policy.identity and is_same_model(policy.identity, ours)):
        raise UserError(f"{place} serves {policy.identity}, but the calibration is that of {ours}")


def _step_source(
    options: RunOptions, services: Services, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str, int], StepSource]:
    # Here, because they come with torch, and whole responses need none.
    from xbai.search.service_source import ServiceSource, StepServices
    from xbai.sprm import load_sprm_config

    rule = load_sprm_config(options.model_dir, tokenizer).step_rule
    scorer = None if services.fused else services.scorer
    step_services = StepServices(services.policy, scorer, options.sampling(), rule, tokenizer, services.names_prompt)
    return partial(ServiceSource, step_services)


def _say_what_is_not_known(option: str, model: ServedModel, sampling: Mapping[str, Any]) -> None:
    ignored = " ".join(f"--{name} {value}" for name, value in sampling.items())
    if not model.is_ours:
        logger.warning(
            "%s: the service does not say which model it serves, so that is not checked%s",
            option,
            f"; it may know nothing of {ignored}" if ignored else "",
        )


def run_budget(options: RunOptions, settings: RunSettings) -> RunBudget | None:
    """The budget that is asked for, with the calibration that lies beside the model.

    Raises:
        UserError: there is none, or it is of another model or temperature.
    """
    if (rule := options.rule) is None and not options.answer_once:
        return None
    budget = RunBudget(rule or Rule(), options.group_size, answers_once=options.answer_once)
    if not budget.rule.needs_chance:
        return budget
    calibration = Calibration.read(options.model_dir)
    made = {**settings.to_dict(), "policy": settings.model, "scorer": settings.model}
    check_calibration(calibration, made, f"--budget {rule}")
    return replace(budget, chance=calibration.chance)


@asynccontextmanager
async def _synced(store: ResultStore) -> AsyncIterator[None]:
    """Put what the store has written onto the disk every second, without holding up the event loop."""

    async def sync() -> None:
        while True:
            await asyncio.sleep(SYNC_INTERVAL_S)
            try:
                await asyncio.to_thread(store.journal.sync)
            except UserError as error:
                # The last one, as the store is closed, decides.
                logger.warning("%s", error)

    task = asyncio.create_task(sync())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def use_fused_scores(options: RunOptions, policy: ServedModel, scorer: ServedModel | None) -> bool:
    """Whether scores come with the responses.

    Raises:
        UserError: they are to come so, but the policy service offers none.
    """
    if options.score_source in ("service", "none"):
        return False
    if options.score_source == "auto" and scorer is not None:
        return policy.gives_scores_of(scorer)
    if not policy.scores:
        raise UserError(
            f"--response_api_url {options.response_api_url}: the service offers no scores; "
            "give --score_api_url, or --score_source none"
        )
    return True
