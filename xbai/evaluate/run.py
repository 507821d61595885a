"""The inference driver: questions in, several scored responses to each out.

Work is divided into requests for a few samples of one question. All questions are in flight at once, as far as the
services take them; a response is scored while others are still generated; every finished sample is kept at once, so
that a run that died goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from xbai.api_key import authorization
from xbai.benchmarks.base import Benchmark
from xbai.benchmarks.registry import get_benchmark
from xbai.engine.files import load_tokenizer
from xbai.errors import UserError
from xbai.evaluate.client import RequestRefusedError, RetryPolicy, ServicePool
from xbai.evaluate.progress import Progress
from xbai.evaluate.results import REFUSED, Sample, SampleKey, StoredQuestion
from xbai.evaluate.settings import RunSettings, digest_texts, model_identity, request_seed
from xbai.evaluate.step_search import StepSearchDriver
from xbai.evaluate.store import ResultStore
from xbai.prompts import prompt_text
from xbai.search.service_source import StepServices
from xbai.search.strategy import SearchOptions
from xbai.sprm import load_sprm_config

logger = logging.getLogger(__name__)

EFFORTS = {"low": 2, "medium": 8, "high": 32}
"""Candidates among which Best-of-N chooses."""


@dataclass(frozen=True)
class RunOptions:
    """What to run and how hard.

    Attributes:
        task, input_file, output_file, model_dir: benchmark, its questions, the results, the model (for its tokenizer).
        response_api_url, score_api_url: services, separated by commas.
        candidates: responses to each question.
        responses_per_request: samples of one `/generate` request.
        max_in_flight: requests in flight at one URL.
        score_source: `fused` (scores come with the responses), `service`, `none`, or `auto` (the service where
            a URL is given, else fused).
        total_parts, part: run only the questions whose index leaves `part` when divided by `total_parts`.
        max_questions: only the first so many.
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


@dataclass(frozen=True)
class GenerationRequest:
    """Some samples of one question, from `first_sample` on."""

    question: StoredQuestion
    first_sample: int
    count: int


def run(options: RunOptions) -> Path:
    """Generate and score everything that is not there yet; returns the result file.

    Raises:
        UserError: bad input, results of another run in the file, or services that stay away.
    """
    benchmark = get_benchmark(options.task)
    tokenizer = load_tokenizer(options.model_dir)
    every_question = [_stored(benchmark, tokenizer, question) for question in benchmark.read(options.input_file)]
    settings = RunSettings(
        task=options.task,
        model=model_identity(options.model_dir),
        questions=digest_texts([question.prompt for question in every_question]),
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        max_tokens=options.max_tokens,
        stop=options.stop,
        seed=options.seed,
        search=options.search.to_dict(),
    )
    questions = every_question[: options.max_questions][options.part :: options.total_parts]
    with ResultStore(options.output_file, settings, questions) as store:
        try:
            asyncio.run(_run(options, questions, store, tokenizer))
        except ExceptionGroup as group:
            raise _first_leaf(group) from group
        except KeyboardInterrupt:
            logger.warning("interrupted; run the same command again to go on")
            raise
        store.write_results()
    logger.info("results: %s", options.output_file)
    return Path(options.output_file)


def _stored(benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase, question: Any) -> StoredQuestion:
    prompt = prompt_text(tokenizer, benchmark.messages(question))
    return StoredQuestion(question.index, prompt, question.answer, {**question.meta, "question": question.prompt})


def _first_leaf(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def missing_requests(
    questions: Sequence[StoredQuestion], store: ResultStore, candidates: int, responses_per_request: int
) -> Iterator[GenerationRequest]:
    """The requests that complete every question's samples, none for those that are there."""
    for question in questions:
        sample = 0
        while sample < candidates:
            if (question.index, sample) in store:
                sample += 1
                continue
            # Requests begin at the same samples in every run, so that a seed gives the same samples after a restart.
            limit = min(candidates, (sample // responses_per_request + 1) * responses_per_request)
            count = next((i for i in range(1, limit - sample) if (question.index, sample + i) in store), limit - sample)
            yield GenerationRequest(question, sample, count)
            sample += count


async def _run(
    options: RunOptions, questions: Sequence[StoredQuestion], store: ResultStore, tokenizer: PreTrainedTokenizerBase
) -> None:
    searching = options.search.is_step_search
    at_once = 1 if searching else options.responses_per_request
    requests = list(missing_requests(questions, store, options.candidates, at_once))
    # A connection is needed for every request in flight; the pools bound those.
    unbounded = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=unbounded, headers=authorization(options.api_key)) as client:
        policy = ServicePool(options.response_api_url, "/generate", client, options.retry, options.max_in_flight)
        scorer = None
        if options.score_api_url:
            scorer = ServicePool(options.score_api_url, "/score", client, options.retry, options.max_in_flight)
        total = len(questions) * options.candidates
        with Progress(total, done=total - sum(request.count for request in requests)) as progress:
            fused = bool(requests) and await _use_fused_scores(options, policy)
            if searching:
                rule = load_sprm_config(options.model_dir, tokenizer).step_rule
                services = StepServices(policy, None if fused else scorer, options.sampling(), rule, tokenizer)
                await StepSearchDriver(options, store, services, progress).run(requests)
            else:
                scorer = None if options.score_source == "none" else scorer
                driver = Driver(options, store, policy, scorer, fused, progress)
                await driver.run(requests, {question.index: question for question in questions})


async def _use_fused_scores(options: RunOptions, policy: ServicePool) -> bool:
    offers = all(description.get("scores") for description in await policy.describe())
    if options.score_source in ("service", "none") or (options.score_source == "auto" and options.score_api_url):
        return False
    if not offers:
        raise UserError(
            f"--response_api_url {options.response_api_url}: the service offers no scores; "
            "give --score_api_url, or --score_source none"
        )
    return True


class Driver:
    """Keeps the services busy with requests, and what comes back in the store."""

    def __init__(
        self,
        options: RunOptions,
        store: ResultStore,
        policy: ServicePool,
        scorer: ServicePool | None,
        fused: bool,
        progress: Progress,
    ) -> None:
        self._options = options
        self._store = store
        self._policy = policy
        self._scorer = scorer
        self._fused = fused
        self._progress = progress
        self._failed_scores = 0

    async def run(self, requests: Sequence[GenerationRequest], questions: dict[int, StoredQuestion]) -> None:
        """Score what an earlier run left unscored, and do `requests`, all at once."""
        slots = asyncio.Semaphore(self._policy.capacity)
        async with asyncio.TaskGroup() as tasks:
            if self._scorer is not None:
                for key in self._store.unscored():
                    tasks.create_task(self._score(questions[key[0]].prompt, key, self._store.get(key).response))
            for request in requests:
                await slots.acquire()
                task = tasks.create_task(self._generate(request, tasks))
                task.add_done_callback(lambda _: slots.release())
        if self._failed_scores:
            logger.warning("%d scores could not be had; run the same command again to retry them", self._failed_scores)

    async def _generate(self, request: GenerationRequest, tasks: asyncio.TaskGroup) -> None:
        started = time.monotonic()
        try:
            answer = await self._policy.post(self._payload(request), weight=request.count)
        except RequestRefusedError as error:
            logger.warning("question %d is refused: %s", request.question.index, error)
            for sample in range(request.first_sample, request.first_sample + request.count):
                refused = Sample(request.question.index, sample, "", finish_reason=REFUSED, error=str(error))
                self._store.add(refused)
                self._progress.advance(0)
            return
        for sample in self._samples(request, answer, time.monotonic() - started):
            self._store.add(sample)
            self._progress.advance(sample.token_count)
            if sample.score is None and self._scorer is not None:
                tasks.create_task(self._score(request.question.prompt, sample.key, sample.response))

    def _payload(self, request: GenerationRequest) -> dict[str, Any]:
        payload = {
            "prefix_prompt": request.question.prompt,
            "response_num": request.count,
            "seed": request_seed(self._options.seed, request.question.index, request.first_sample),
            **self._options.sampling(),
        }
        return {**payload, "return_scores": True} if self._fused else payload

    def _samples(self, request: GenerationRequest, answer: dict[str, Any], seconds: float) -> Iterator[Sample]:
        texts = answer["results"]
        if len(texts) != request.count:
            raise UserError(f"/generate returned {len(texts)} responses where {request.count} were asked for")
        unknown = [None] * len(texts)
        columns = [answer.get(name) or unknown for name in ("finish_reasons", "token_counts", "scores", "step_scores")]
        for offset, (text, reason, tokens, score, steps) in enumerate(zip(texts, *columns, strict=True)):
            yield Sample(
                question=request.question.index,
                sample=request.first_sample + offset,
                response=text,
                finish_reason=reason,
                token_count=tokens,
                seconds=round(seconds, 3),
                score=score,
                step_scores=steps,
            )

    async def _score(self, prompt: str, key: SampleKey, response: str) -> None:
        payload = {"text": prompt + response, "prompt": prompt, "return_all_scores": True}
        try:
            answer = await self._scorer.post(payload)
        except RequestRefusedError as error:
            self._failed_scores += 1
            logger.warning("question %d, sample %d has no score: %s", *key, error)
            return
        self._store.add_score(key, answer["value"], answer.get("all_scores"))
