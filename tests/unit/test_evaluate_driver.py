"""The driver of whole responses: what is kept of each answer, and what ends the run."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from xbai.benchmarks.base import Question
from xbai.benchmarks.registry import get_benchmark
from xbai.client import replicas
from xbai.client.pool import ServicePool
from xbai.client.replicas import RetryPolicy
from xbai.errors import UserError
from xbai.infer.driver import Driver, Services
from xbai.infer.options import RunOptions
from xbai.infer.progress import Progress, Tally
from xbai.infer.running_grades import RunningGrades
from xbai.infer.schedule import Schedule, missing_requests
from xbai.infer.store import ResultStore
from xbai.results.lines import REFUSED, Sample, StoredQuestion
from xbai.results.settings import RunSettings

SETTINGS = RunSettings("make10", "m", "q", 0.8, 0.95, -1, 1.05, 64, (), 0)
QUESTIONS = [StoredQuestion(i, f"<p{i}>", str(i), {}) for i in range(2)]

Answer = Callable[[dict], httpx.Response]


def sampled(payload: dict) -> httpx.Response:
    """As the service samples: the text follows from the request's seed and the place in it."""
    texts = [f"{payload['seed']}/{i}" for i in range(payload["response_num"])]
    return httpx.Response(200, json={"results": texts})


def drive(
    path: Path, candidates: int, response_num: int = 4, answer: Answer = sampled, score: Answer | None = None
) -> ResultStore:
    routes = {"/generate": answer, "/score": score}

    async def run(store: ResultStore) -> None:
        transport = httpx.MockTransport(lambda request: routes[request.url.path](json.loads(request.content)))
        async with httpx.AsyncClient(transport=transport) as client:
            policy, scorer = (
                ServicePool("http://a", route, client, RetryPolicy(patience_s=0.1), max_in_flight=2) for route in routes
            )
            progress = Progress(candidates, 0, Tally())
            services = Services(policy, scorer if score else None, False)
            options = RunOptions("make10", "", "", "", "http://a", seed=0)
            driver = Driver(options, services, store, progress, lambda key: None)
            requests = list(missing_requests(QUESTIONS, store, candidates, response_num))
            await driver.run(Schedule(requests), {question.index: question.prompt for question in QUESTIONS})

    store = ResultStore(path, SETTINGS, QUESTIONS)
    with store:
        asyncio.run(run(store))
        store.write_results()
    return store


def responses(path: Path) -> list[list[str]]:
    return [json.loads(line)["output"]["solution_lst"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_that_is_extended_holds_what_a_longer_one_does(tmp_path: Path) -> None:
    whole, extended = tmp_path / "whole.jsonl", tmp_path / "extended.jsonl"
    drive(whole, 8)
    for candidates in (1, 3, 6, 8):
        drive(extended, candidates)
    assert responses(extended) == responses(whole)
    assert len({text for texts in responses(whole) for text in texts}) == 16


def test_a_question_that_is_too_long_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    def answer(payload: dict) -> httpx.Response:
        if payload["prefix_prompt"] == "<p0>":
            return httpx.Response(413, json={"detail": "600 tokens"})
        return sampled(payload)

    path = tmp_path / "out.jsonl"
    drive(path, 2, answer=answer)
    refused, answered = (json.loads(line)["output"] for line in path.read_text(encoding="utf-8").splitlines())
    assert refused["finish_reason_lst"] == [REFUSED] * 2
    assert refused["error_lst"] == ["413: 600 tokens"] * 2
    assert len(set(answered["solution_lst"])) == 2


def test_a_refusal_that_is_not_of_the_text_ends_the_run_and_is_not_kept(tmp_path: Path) -> None:
    def answer(payload: dict) -> httpx.Response:
        if payload["prefix_prompt"] == "<p0>":
            return httpx.Response(422, json={"detail": "return_scores: this model has no score head"})
        return sampled(payload)

    path = tmp_path / "out.jsonl"
    with pytest.raises(ExceptionGroup) as caught:
        drive(path, 2, answer=answer)
    (error,) = caught.value.exceptions
    assert isinstance(error, UserError)
    assert str(error) == "http://a/generate: 422: return_scores: this model has no score head"
    assert not path.exists()
    assert REFUSED not in Path(f"{path}.journal").read_text(encoding="utf-8")


def test_a_score_service_that_is_gone_costs_only_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replicas, "RETRY_BASE_S", 0.02)
    scored = httpx.Response(200, json={"value": 0.5, "all_scores": [0.5]})
    texts = []

    def score_once(payload: dict) -> httpx.Response:
        texts.append(payload["text"])
        if len(texts) > 1:
            raise httpx.ConnectError("gone")
        return scored

    path = tmp_path / "out.jsonl"
    drive(path, 8, answer=sampled, score=score_once)
    scores = [
        score
        for line in path.read_text(encoding="utf-8").splitlines()
        for score in json.loads(line)["output"]["score_lst"]
    ]
    assert (len(scores), scores.count(None)) == (16, 15)
    assert len(set(texts)) <= 3, "the others are not asked for"
    assert caplog.text.count("no more scores are asked for: no answer from http://a for 0.1 s") == 1
    assert "15 scores could not be had; run the same command again to retry them" in caplog.text
    drive(path, 8, answer=lambda payload: pytest.fail("all responses are there"), score=lambda payload: scored)
    scores = [
        score
        for line in path.read_text(encoding="utf-8").splitlines()
        for score in json.loads(line)["output"]["score_lst"]
    ]
    assert scores == [0.5] * 16


def test_grading_that_fails_is_said_and_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    benchmark = get_benchmark("make10")

    def fail(question: Question, response: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(benchmark, "grade_request", fail)

    async def run(store: ResultStore) -> None:
        store.add(Sample(0, 0, "text"), Sample(0, 1, "text"))
        async with RunningGrades(benchmark, {0: Question(0, "p", "1 2", {})}, store, Tally()) as grades:
            grades.add((0, 0))
            grades.add((0, 1))
            async with asyncio.timeout(60):
                await grades.settle(600.0)

    with ResultStore(tmp_path / "out.jsonl", SETTINGS, QUESTIONS) as store, caplog.at_level(logging.WARNING):
        asyncio.run(run(store))
    assert "the accuracy so far is no longer known: a bug" in caplog.text
