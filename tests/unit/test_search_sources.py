"""Where continuations come from: what pauses generation, which scores count, and a real engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from xbai.client.pool import RequestFailedError, RequestTooLongError, ServicePool
from xbai.client.replicas import RetryPolicy
from xbai.engine import Engine, SamplingParams, load_engine
from xbai.infer.driver import Driver, Services
from xbai.infer.options import RunOptions
from xbai.infer.progress import Progress, Tally
from xbai.infer.schedule import missing_requests
from xbai.results.lines import Sample, StoredQuestion
from xbai.search.expander import Continuation, Expander, SearchLimits
from xbai.search.options import SearchOptions
from xbai.search.path import ROOT, SearchPath
from xbai.search.service_source import ServiceSource, StepServices
from xbai.search.strategy import search_response
from xbai.seeds import sample_seed
from xbai.sprm import StepRule, step_feature_mask
from xbai.sprm.steps import ScoredPart, joined_scores

T = TypeVar("T")

PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Engine:
    return load_engine("hf", tiny_model_dir, with_scores=True)


@pytest.fixture(scope="module")
def rule(tiny_tokenizer: PreTrainedTokenizerFast) -> StepRule:
    return StepRule.from_tokenizer(tiny_tokenizer)


class EnginePolicy:
    """`/generate` by an engine in this process, of letters and steps: any text of theirs has one encoding."""

    def __init__(self, engine: Engine, rule: StepRule, monkeypatch: pytest.MonkeyPatch) -> None:
        head, tokenizer = engine._model.lm_head, engine.tokenizer
        weight = head.weight.detach().clone()
        kept = torch.full((engine.vocab_size,), float("-inf"))
        kept[[*tokenizer.encode("abcdefghij</think>"), tokenizer.eos_token_id]] = 0.0
        # So often that there are steps to choose among.
        kept[list(rule.step_ids)] = 3.0
        monkeypatch.setattr(head, "forward", lambda hidden: hidden @ weight.T + kept)
        self.engine = engine
        self.generated = 0

    async def post(self, payload: dict[str, Any], read: Callable[[bytes], T], ticket: int) -> T:
        params = SamplingParams(
            max_tokens=payload["max_tokens"],
            seed=payload["seed"],
            stop_token_ids=payload.get("stop_token_ids", ()),
        )
        prompt_ids = self.engine.tokenizer.encode(payload["prefix_prompt"])
        [[one]] = self.engine.generate([prompt_ids], params, return_scores=payload["return_scores"])
        self.generated += len(one.token_ids)
        answer = {
            "results": [one.text],
            "finish_reasons": [one.finish_reason],
            "token_counts": [len(one.token_ids)],
            "step_scores": [one.step_scores],
        }
        return read(json.dumps(answer).encode())


@pytest.mark.parametrize("name", ["beam", "dvts", "mcts"])
def test_a_search_scores_as_the_whole_response_is_scored(
    name: str, engine: Engine, rule: StepRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = EnginePolicy(engine, rule, monkeypatch)
    services = StepServices(policy, None, {}, rule, engine.tokenizer)
    options = SearchOptions(name, beam_width=2, expand=2, token_budget=200)

    def search(prompt: str) -> tuple[SearchPath, int]:
        return asyncio.run(search_response(options, ServiceSource(services, prompt, 0), 40, seed=0))

    found = {prompt: search(prompt) for prompt in (PROMPT, "one ", "two ")}
    assert sum(spent for _, spent in found.values()) == policy.generated
    assert any(len(path.step_scores) > 1 for path, _ in found.values())
    for prompt, (path, spent) in found.items():
        prompt_ids, ids = engine.tokenizer.encode(prompt), engine.tokenizer.encode(path.text)
        (scored,) = engine.score([prompt_ids + ids], [len(prompt_ids)])
        assert path.step_scores == pytest.approx(scored.step_scores, abs=1e-5)
        assert path.token_count == len(ids) + (path.finish_reason == "stop") <= 40
        assert spent <= 200
    assert search(PROMPT) == found[PROMPT]


def test_an_engine_pauses_after_a_step_token(engine: Engine, rule: StepRule, monkeypatch: pytest.MonkeyPatch) -> None:
    services = StepServices(EnginePolicy(engine, rule, monkeypatch), None, {}, rule, engine.tokenizer)

    def write(to_end: bool, start: SearchPath) -> SearchPath:
        return asyncio.run(ServiceSource(services, PROMPT, 0).write_on(start, 60, to_end, seed=1)).path

    paused = write(False, ROOT)
    assert paused.open
    assert paused.text.endswith(".\n\n")
    assert paused.text.count(".\n\n") == 1
    assert write(True, ROOT).token_count > paused.token_count
    assert write(False, SearchPath("</think>", 1)).text.count(".\n\n") > 1


@pytest.mark.parametrize(
    ("before", "added"),
    [
        ("<think>one.\n\n", "two.\n\n"),
        ("<think>one.\n\n", "</think>answer.\n\nmore.\n\n"),
        ("<think>one.\n\n", "two.\n\n</think>answer.\n\n"),
        ("<think>one.\n\n</think>two.\n\n", "three.\n\n<think>four.\n\n"),
        ("", "<think>one.\n\ntwo.\n\n</think>answer.\n\n"),
        ("one.\n\n", "two.\n\nthree.\n\n"),
        ("one.\n\n", "two</think>answer.\n\n"),
        ("one.\n\n", "two.\n\n<think>three.\n\n"),
        ("one.\n\n", ".\n\ntwo.\n\n"),
        ("one.\n\n</think>", "answer.\n\n"),
    ],
)
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT + "<think>\n", PROMPT + "<think>\n</think>"])
def test_scores_of_two_parts_are_those_of_the_whole(
    prompt: str, before: str, added: str, tiny_tokenizer: PreTrainedTokenizerFast, rule: StepRule
) -> None:
    prompt_ids, first, second = (tiny_tokenizer.encode(text) for text in (prompt, before, added))

    def scored(begun: list[int], written: list[int]) -> ScoredPart:
        ids = begun + written
        mask = step_feature_mask(torch.tensor([ids]), torch.arange(len(ids))[None] >= len(begun), rule)
        return ScoredPart(written, [1 / (1 + position) for position in mask[0].nonzero().flatten().tolist()])

    whole = scored(prompt_ids, first + second).step_scores
    assert joined_scores(prompt_ids, scored(prompt_ids, first), scored(prompt_ids + first, second), rule) == whole


class ScriptedPolicy:
    """`/generate` of a model that would write `text` and end; cuts and counts as the service does."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
        self.tokens = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.generated = 0
        self.payloads: list[dict[str, Any]] = []

    async def post(self, payload: dict[str, Any], read: Callable[[bytes], T], ticket: int) -> T:
        self.payloads.append(payload)
        begun = len(self.tokenizer.encode(payload["prefix_prompt"].removeprefix(self.prompt)))
        text, count = "", 0
        reason, step_scores = "length", []
        for token in [*self.tokens[begun:], None]:
            if count == payload["max_tokens"]:
                break
            count += 1
            if token is None:
                reason = "stop"
                break
            text += token
            if token == ".\n\n" and count > 1:
                step_scores.append(0.5)
            if self.tokenizer.encode(token)[0] in payload.get("stop_token_ids", ()):
                reason = "stop_token"
                break
        self.generated += count
        scores = {"step_scores": [step_scores]} if payload.get("return_scores") else {}
        answer = {"results": [text], "finish_reasons": [reason], "token_counts": [count], **scores}
        return read(json.dumps(answer).encode())


class ScriptedScorer:
    """`/score` that gives every step 0.5."""

    async def post(self, payload: dict[str, Any], read: Callable[[bytes], T], ticket: int) -> T:
        steps = payload["text"].removeprefix(payload["prompt"]).count(".\n\n")
        return read(json.dumps({"value": 0.5, "all_scores": [0.5] * steps}).encode())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("text", ["one.\n\ntwo.\n\nthe end", "only", "a.\n\nb.\n\n</think>so.\n\nit is"])
def test_a_service_response_is_written_step_by_step_and_whole(
    text: str, fused: bool, tiny_tokenizer: PreTrainedTokenizerFast, rule: StepRule
) -> None:
    policy = ScriptedPolicy(text, tiny_tokenizer, PROMPT)
    services = StepServices(policy, None if fused else ScriptedScorer(), {}, rule, tiny_tokenizer)

    async def write() -> list[SearchPath]:
        paths, spent = [ROOT], 0
        while paths[-1].open:
            continuation = await ServiceSource(services, PROMPT, 0).write_on(paths[-1], 80, False, seed=1)
            paths.append(continuation.path)
            spent += continuation.spent
        assert spent == policy.generated
        return paths

    paths = asyncio.run(write())
    steps = [step + ".\n\n" for step in text.split("</think>")[0].split(".\n\n")[:-1]]
    assert [path.text for path in paths[1 : len(steps) + 1]] == ["".join(steps[: i + 1]) for i in range(len(steps))]
    assert (paths[-1].text, paths[-1].finish_reason) == (text, "stop")
    assert paths[-1].token_count == len(tiny_tokenizer.encode(text)) + 1
    assert paths[-1].step_scores == (0.5,) * text.count(".\n\n")
    assert all(("return_scores" in payload) is fused for payload in policy.payloads)


def test_a_context_that_is_full_ends_a_response(tiny_tokenizer: PreTrainedTokenizerFast, rule: StepRule) -> None:
    class Refusing:
        async def post(self, payload: dict[str, Any], read: Callable[[bytes], T], ticket: int) -> T:
            raise RequestTooLongError("413: prefix_prompt: 512 tokens leave no room in the model's 512")

    source = ServiceSource(StepServices(Refusing(), None, {}, rule, tiny_tokenizer), PROMPT, 0)
    begun = SearchPath("begun", 5)
    assert asyncio.run(source.write_on(begun, 10, False, 0)).path.finish_reason == "length"
    with pytest.raises(RequestTooLongError):
        asyncio.run(source.write_on(ROOT, 10, False, 0))


def test_what_the_score_service_cannot_take_ends_a_response_and_refuses_no_question(
    tiny_tokenizer: PreTrainedTokenizerFast, rule: StepRule
) -> None:
    class ShortScorer(ScriptedScorer):
        async def post(self, payload: dict[str, Any], read: Callable[[bytes], T], ticket: int) -> T:
            if payload["text"].count(".\n\n") > steps:
                raise RequestTooLongError("413: too long for the scorer")
            return await super().post(payload, read, ticket)

    policy = ScriptedPolicy("one.\n\ntwo.\n\nthe end", tiny_tokenizer, PROMPT)
    services = StepServices(policy, ShortScorer(), {}, rule, tiny_tokenizer)
    steps = 1
    path, spent = asyncio.run(
        search_response(SearchOptions("beam", beam_width=1, expand=1), ServiceSource(services, PROMPT, 0), 80, 0)
    )
    assert (path.text, path.finish_reason, path.step_scores) == ("one.\n\n", "length", (0.5,))
    assert spent == policy.generated
    steps = 0
    with pytest.raises(RequestFailedError, match="no score for what the response begins with: 413"):
        asyncio.run(ServiceSource(services, PROMPT, 0).write_on(ROOT, 80, False, 0))


def test_searches_end_one_after_the_other_while_the_service_stays_busy(
    tiny_tokenizer: PreTrainedTokenizerFast, rule: StepRule, tmp_path: Path
) -> None:
    searches, steps, expand, slots = 20, 10, 4, 4
    asked = answered = running = 0
    total_s = busy_s = 0.0
    ended_after: list[int] = []

    async def generate(request: httpx.Request) -> httpx.Response:
        nonlocal asked, answered, running, total_s, busy_s
        asked += 1
        running += 1
        seconds = 0.02 if asked % expand == 0 else 0.002
        await asyncio.sleep(seconds / 2)
        total_s += seconds
        busy_s += seconds * running
        await asyncio.sleep(seconds / 2)
        running -= 1
        answered += 1
        step = json.loads(request.content)["prefix_prompt"].count(".\n\n") + 1
        finish = "stop" if step == steps else "stop_token"
        answer = {"results": ["one.\n\n"], "finish_reasons": [finish], "token_counts": [2], "step_scores": [[0.5]]}
        return httpx.Response(200, json=answer)

    class Store:
        def add(self, sample: Sample) -> None:
            ended_after.append(answered)

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(generate)) as client:
            pool = ServicePool("http://a", "/generate", client, RetryPolicy(), max_in_flight=slots)
            services = StepServices(pool, None, {}, rule, tiny_tokenizer)
            options = RunOptions(
                "make10", "", "", "", "http://a", search=SearchOptions("dvts", beam_width=1, expand=expand)
            )
            progress = Progress(searches, 0, Tally())
            driver = Driver(options, Services(pool, None, True), Store(), progress, on_complete=lambda key: None)
            question = StoredQuestion(0, PROMPT, "", {})
            await driver.search(list(missing_requests([question], (), searches, 1)), partial(ServiceSource, services))

    asyncio.run(run())
    work = steps * expand
    assert answered == searches * work
    assert ended_after[0] <= 4 * work, "the first search does not wait for the others"
    assert all(after <= (number + 5) * work for number, after in enumerate(ended_after)), "nor any for later ones"
    assert busy_s > 0.6 * slots * total_s, "later searches fill the slots that the first leaves; alone, each fills 1.8"


def test_what_a_failed_search_had_asked_for_is_cancelled() -> None:
    cancelled = []

    class Failing:
        async def write_on(self, path: SearchPath, max_tokens: int, to_end: bool, seed: int) -> Continuation:
            if not cancelled and seed == first_seed:
                raise RequestFailedError("a time-out")
            try:
                return await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(seed)
                raise

    first_seed = sample_seed(0, 0)
    with pytest.raises(RequestFailedError, match="a time-out"):
        asyncio.run(Expander(Failing(), SearchLimits(100), seed=0).extend([ROOT] * 3))
    assert len(cancelled) == 2
