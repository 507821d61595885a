"""The inference run: questions in, several scored responses to each out.

Work is divided into requests for a few samples of one question. All questions are in flight at once, as far as the
services take them; a response is scored while others are still generated; every finished sample is kept at once, so
that a run that died goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xbai.benchmarks.base import Benchmark, Question
from xbai.benchmarks.registry import get_benchmark
from xbai.engine.files import load_tokenizer
from xbai.errors import UserError
from xbai.evaluate.client import RetryPolicy, ServicePool, open_client
from xbai.evaluate.driver import Driver, Services
from xbai.evaluate.interrupt import run_until_interrupted
from xbai.evaluate.progress import Progress
from xbai.evaluate.results import StoredQuestion
from xbai.evaluate.running_grades import RunningGrades
from xbai.evaluate.schedule import Schedule, missing_requests
from xbai.evaluate.settings import RunSettings, digest_texts
from xbai.evaluate.step_search import StepSearchDriver
from xbai.evaluate.store import ResultStore
from xbai.evaluate.tally import Tally
from xbai.model_identity import model_identity
from xbai.prompts import prompt_text
from xbai.search.service_source import StepServices
from xbai.search.strategy import SearchOptions
from xbai.sprm import load_sprm_config

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EFFORTS = {"low": 2, "medium": 8, "high": 32}
"""Candidates among which Best-of-N chooses."""

SYNC_INTERVAL_S = 1.0
GRADING_PATIENCE_S = 10.0
"""How long the end of a run waits for the accuracy to be complete."""


@dataclass(frozen=True)
class RunOptions:
    """What to run and how hard.

    Attributes:
        task, input_file, output_file, model_dir: benchmark, its questions, the results, the model (for its tokenizer).
        response_api_url, score_api_url: services, separated by commas.
        candidates: responses to each question.
        best_of: among how many of them the score chooses, for the accuracy so far.
        responses_per_request: samples of one `/generate` request.
        max_in_flight: requests in flight at one URL.
        score_source: `fused` (scores come with the responses), `service`, `none`, or `auto` (fused where the policy
            service offers the scores that the score service gives, or there is no URL of one; else the service).
        total_parts, part: run only the questions whose index leaves `part` when divided by `total_parts`.
        max_questions: only the first so many.
        selection: the part of a benchmark that has releases or dates (see `LiveCodeBench`).
        search: how a response is found; `candidates` counts the searches, where it is one that chooses by steps.
        api_key: what the services ask for, if anything.
    """

    task: str
    input_file: str
    output_file: str
    model_dir: str
    response_api_url: str
    score_api_url: str | None = None
    candidates: int = 1
    best_of: int = 1
    responses_per_request: int = 8
    max_in_flight: int = 32
    score_source: str = "auto"
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = -1
    repetition_penalty: float = 1.05
    max_tokens: int = 32768
    stop: tuple[str, ...] = ()
    seed: int | None = 0
    total_parts: int = 1
    part: int = 0
    max_questions: int | None = None
    selection: Mapping[str, str | None] = field(default_factory=dict)
    search: SearchOptions = field(default_factory=SearchOptions)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not 0 <= self.part < self.total_parts:
            raise UserError(f"--part {self.part}: must be from 0 to {self.total_parts - 1} (--total_parts - 1)")
        if self.score_source not in ("auto", "fused", "service", "none"):
            raise UserError(f"--score_source {self.score_source!r}: use auto, fused, service or none")
        if self.score_source == "service" and not self.score_api_url:
            raise UserError("--score_source service needs --score_api_url")
        if self.score_source == "none" and self.search.is_step_search:
            raise UserError(
                f"--score_source none: --search {self.search.name} is guided by scores; use fused or service"
            )

    def sampling(self) -> dict[str, Any]:
        """The sampling fields of a `/generate` request."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "stop": list(self.stop) or None,
        }


def run(options: RunOptions) -> Path:
    """Generate and score everything that is not there yet; returns the result file.

    Raises:
        UserError: bad input, results of another run in the file, services that stay away, or that failed on some.
        KeyboardInterrupt: Ctrl-C; what is finished is kept.
    """
    benchmark = get_benchmark(options.task, **options.selection)
    tokenizer = load_tokenizer(options.model_dir)
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
    ours = stored[: options.max_questions][options.part :: options.total_parts]
    with ResultStore(options.output_file, settings, ours) as store:
        logger.info("results will be in %s; until all is there, in %s", store.path, store.journal_path)
        inference = Inference(options, ours, store, tokenizer, benchmark, questions)
        try:
            run_until_interrupted(inference.run())
        except ExceptionGroup as group:
            raise _first_leaf(group) from group
        except KeyboardInterrupt:
            logger.warning("interrupted: %d samples are kept; run the same command again to go on", len(store))
            raise
        store.write_results()
    if inference.failed:
        raise UserError(
            f"{options.output_file}: {inference.failed} samples are missing, on which the service failed each time "
            "(see above); run the same command again to ask for them"
        )
    logger.info("results: %s", options.output_file)
    return Path(options.output_file)


def _stored(benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase, question: Question) -> StoredQuestion:
    prompt = prompt_text(tokenizer, benchmark.messages(question))
    return StoredQuestion(question.index, prompt, question.answer, {**question.meta, "question": question.prompt})


def _first_leaf(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@dataclass
class Inference:
    """One run's event loop.

    Attributes:
        stored: the questions to run.
        questions: the benchmark's, by index.
        failed: samples on which the services failed each time.
    """

    options: RunOptions
    stored: list[StoredQuestion]
    store: ResultStore
    tokenizer: PreTrainedTokenizerBase
    benchmark: Benchmark
    questions: Mapping[int, Question]
    failed: int = 0

    async def run(self) -> None:
        """Do what is missing."""
        options, store = self.options, self.store
        at_once = 1 if options.search.is_step_search else options.responses_per_request
        requests = list(missing_requests(self.stored, store, options.candidates, at_once))
        done, missing = len(store.complete()), sum(request.count for request in requests)
        total = len(store) + missing
        if len(store):
            logger.info("%d of %d samples are there already", len(store), total)
        tally = Tally(options.best_of)
        async with (
            open_client(options.api_key) as client,
            _synced(store),
            RunningGrades(self.benchmark, self.questions, store, tally) as grades,
        ):
            for key in store.complete() if requests else ():
                grades.add(key)
            services = await self._services(client, any_request=bool(requests))
            with Progress(total, done, tally) as progress:
                if options.search.is_step_search:
                    driver = StepSearchDriver(options, store, self._step_services(services), progress, grades.add)
                    await driver.run(requests)
                else:
                    driver = Driver(services, store, progress, grades.add, options.sampling(), options.seed)
                    await driver.run(Schedule(requests), {question.index: question.prompt for question in self.stored})
                await grades.settle(GRADING_PATIENCE_S)
        self.failed = driver.failed

    async def _services(self, client: httpx.AsyncClient, any_request: bool) -> Services:
        options = self.options
        policy = ServicePool(options.response_api_url, "/generate", client, options.retry, options.max_in_flight)
        scorer = None
        if options.score_api_url and options.score_source != "none":
            scorer = ServicePool(options.score_api_url, "/score", client, options.retry, options.max_in_flight)
        fused = any_request and await use_fused_scores(options, policy, scorer)
        return Services(policy, scorer, fused)

    def _step_services(self, services: Services) -> StepServices:
        rule = load_sprm_config(self.options.model_dir, self.tokenizer).step_rule
        scorer = None if services.fused else services.scorer
        return StepServices(services.policy, scorer, self.options.sampling(), rule, self.tokenizer)


async def use_fused_scores(options: RunOptions, policy: ServicePool, scorer: ServicePool | None) -> bool:
    """Whether scores come with the responses.

    Raises:
        UserError: they are to come so, but the policy service offers none; or its copies serve different models.
    """
    described = await policy.describe()
    models = {description.get("model") for description in described}
    if len(models) > 1:
        raise UserError(
            f"--response_api_url {options.response_api_url}: the copies serve different models "
            f"({', '.join(sorted(map(str, models)))})"
        )
    offers = all(description.get("scores") for description in described)
    if options.score_source in ("service", "none"):
        return False
    if options.score_source == "auto" and scorer is not None:
        return offers and _same_scores([*described, *await scorer.describe()])
    if not offers:
        raise UserError(
            f"--response_api_url {options.response_api_url}: the service offers no scores; "
            "give --score_api_url, or --score_source none"
        )
    return True


def _same_scores(described: list[dict[str, Any]]) -> bool:
    """All serve one model, whose steps they find by one rule."""
    kinds = {(description.get("model"), description.get("lang")) for description in described}
    return len(kinds) == 1 and None not in kinds.pop()


@asynccontextmanager
async def _synced(store: ResultStore) -> AsyncIterator[None]:
    """Put what the store has written onto the disk every second, without holding up the event loop."""

    async def sync() -> None:
        while True:
            await asyncio.sleep(SYNC_INTERVAL_S)
            await asyncio.to_thread(store.sync)

    task = asyncio.create_task(sync())
    try:
        yield
    finally:
        task.cancel()
