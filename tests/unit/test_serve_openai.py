"""OpenAI's routes around an engine that says what the test wants, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from clocks import PATIENCE_S, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_engine import Script, ScriptedEngine

from xbai.calibration import ScoreChance
from xbai.engine import Completion, SamplingParams
from xbai.errors import UserError
from xbai.serve import app as service_app
from xbai.serve import policy
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.openai.desk import candidates_of
from xbai.serve.options import OpenAIOptions
from xbai.serve.policy import create_policy_app
from xbai.serve.reflection import Answer, Question
from xbai.serve.thinking import split_thinking
from xbai.sprm.steps import step_ends, step_positions

ASK: list[Any] = [{"role": "user", "content": "Which?"}]
BEST = 5
"""The candidate whose steps score highest, where there are so many."""


def scores_of(index: int) -> float:
    """Lower the further from the best."""
    return 0.9 - 0.01 * abs(index - BEST)


def thinker(prompt: str, index: int) -> tuple[str, float]:
    """Thinks, and answers by its number; what follows a thinking answers by that one's."""
    if prompt.endswith("</think>"):
        return f"\n\nIt is {prompt.rpartition('I am ')[2].partition('.')[0]}.", 0.5
    return f"<think>\nI am {index}.\n\nYes.\n\n</think>\n\nIt is {index}.", scores_of(index)


Start = Callable[..., tuple[str, ScriptedEngine]]


@pytest.fixture
def start(serve_app: Callable[..., str], tiny_model_dir: Path) -> Start:
    def start(
        script: Script = thinker, limits: Limits | None = None, scores: bool = True, **options: Any
    ) -> tuple[str, ScriptedEngine]:
        engine = ScriptedEngine(tiny_model_dir, script, scores)
        thread = EngineThread(lambda: engine)
        app = create_policy_app(thread, "models/wise", limits or Limits(), OpenAIOptions(**options))
        url = serve_app(app)
        wait_until(lambda: thread.ready, "the engine is loaded")
        return url, engine

    return start


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


def ask(url: str, **fields: Any) -> Any:
    return client_of(url).chat.completions.create(**{"model": "wise", "messages": ASK, **fields})


def refused(url: str, kind: type[openai.APIStatusError] = openai.BadRequestError, **fields: Any) -> dict[str, Any]:
    """The body of a refusal."""
    with pytest.raises(kind) as error:
        ask(url, **fields)
    return error.value.body


@pytest.mark.parametrize(
    ("fields", "candidates"),
    [
        ({}, 2),
        ({"reasoning_effort": "none"}, 1),
        ({"reasoning_effort": "minimal"}, 1),
        ({"reasoning_effort": "low"}, 2),
        ({"reasoning_effort": "medium"}, 8),
        ({"reasoning_effort": "high"}, 32),
        ({"model": "wise-high"}, 32),
        ({"model": "wise-high", "reasoning_effort": "medium"}, 8),
        ({"reasoning_effort": "high", "extra_body": {"candidates": 5}}, 5),
    ],
)
def test_an_effort_is_a_number_of_candidates(start: Start, fields: dict[str, Any], candidates: int) -> None:
    url, engine = start()
    answer = ask(url, **fields)
    best = min(BEST, candidates - 1)
    message = answer.choices[0].message
    assert (message.content, message.reasoning) == (f"It is {best}.", f"I am {best}.\n\nYes.")
    assert answer.choices[0].finish_reason == "stop" and answer.model == fields.get("model", "wise")
    # The best one alone answers.
    assert len(engine.begun) == candidates + (candidates > 1)


def test_every_candidate_is_counted_and_shown_on_request(start: Start) -> None:
    url, engine = start()
    answer = ask(url, reasoning_effort="medium", extra_body={"return_candidates": True})
    usage, shown = answer.usage, answer.candidates
    count = lambda text: len(engine.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    thought = count("<think>\nI am 5.\n\nYes.\n\n</think>")
    assert usage.completion_tokens == 8 * thought + count("\n\nIt is 5.") + 1
    assert usage.completion_tokens_details.reasoning_tokens == 8 * thought
    prompt = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    assert usage.prompt_tokens == count(prompt) and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert [one["reasoning"] for one in shown] == [f"I am {i}.\n\nYes." for i in range(8)]
    assert [one["score"] for one in shown] == pytest.approx([scores_of(i) for i in range(8)])
    assert [one["chosen"] for one in shown] == [i == BEST for i in range(8)]
    assert shown[BEST]["content"] == "It is 5." and shown[0]["content"] == ""
    assert shown[0]["step_scores"] == pytest.approx([scores_of(0)] * 2) and shown[0]["finish_reason"] == "stop_token"
    assert [one["steps"] for one in shown] == [[f"I am {i}.", "\n\nYes."] for i in range(8)]
    assert not hasattr(ask(url), "candidates")


def test_generate_answers_once_on_request(start: Start) -> None:
    url, engine = start()
    body = {"prefix_prompt": "Which?", "response_num": 8, "answer_once": True, "return_scores": True}
    answer = httpx.post(f"{url}/generate", json=body, timeout=PATIENCE_S).json()
    thoughts = [f"<think>\nI am {i}.\n\nYes.\n\n</think>" for i in range(8)]
    assert answer["chosen"] == BEST and len(engine.begun) == 9
    assert answer["results"] == [f"{text}\n\nIt is 5." if i == BEST else text for i, text in enumerate(thoughts)]
    assert answer["scores"] == pytest.approx([scores_of(i) for i in range(8)])
    assert answer["step_ends"][BEST] == answer["step_ends"][0]
    counts = answer["token_counts"]
    assert counts[BEST] == counts[0] + len(engine.tokenizer.encode("\n\nIt is 5.", add_special_tokens=False)) + 1
    assert "chosen" not in httpx.post(f"{url}/generate", json={**body, "answer_once": False}, timeout=PATIENCE_S).json()


@pytest.mark.parametrize("thinks", [True, False])
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.text(st.sampled_from("ab <é🙂\n."), max_size=9), max_size=5), rest=st.text(min_size=1, max_size=9)
)
def test_steps_begin_what_is_thought(
    tiny_tokenizer: Any, tiny_model_dir: Path, thinks: bool, steps: list[str], rest: str
) -> None:
    engine = ScriptedEngine(tiny_model_dir, thinker)
    text = "".join(f"{step}.\n\n" for step in steps) + rest
    ids = tiny_tokenizer.encode(f"<think>{text}</think>\n\nYes" if thinks else text, add_special_tokens=False)
    ends = step_ends(step_positions(ids, 0, engine.step_rule), 0)
    completion = Completion(ids, engine.detokenize(ids), "stop", step_scores=[0.5] * len(ends), step_ends=ends)
    question = Question("", [1], SamplingParams())
    answer = Answer([completion], 0, completion, split_thinking("", completion.text))
    (shown,) = candidates_of(question, [answer], engine.detokenize)
    assert len(shown["steps"]) == len(ends)
    assert (shown["reasoning"] or shown["content"]).startswith("".join(shown["steps"]))
    for step, end in zip(shown["steps"], ends):
        assert engine.detokenize(ids[:end]).rstrip().endswith(step.strip())


def test_whole_responses_on_request(start: Start) -> None:
    url, engine = start()
    extra = {"answer_once": False, "return_candidates": True}
    answer = ask(url, reasoning_effort="medium", extra_body=extra)
    assert answer.choices[0].message.content == "It is 5."
    assert [one["content"] for one in answer.candidates] == [f"It is {i}." for i in range(8)]
    assert len(engine.begun) == 8


@pytest.mark.parametrize("text", ["Plain {}.\n\nYes.\n\nTrue.", "</think> {}.\n\nYes.\n\nTrue."])
def test_a_model_that_does_not_think_is_judged_by_whole_responses(start: Start, text: str) -> None:
    def plain(prompt: str, index: int) -> tuple[str, float]:
        # What follows the stray tag is all that is left to say.
        rest = text.partition("</think>")[2]
        return (rest if prompt.endswith("</think>") else text).format(index), scores_of(index)

    url, _ = start(plain)
    message = ask(url, reasoning_effort="medium").choices[0].message
    assert message.reasoning is None and message.content.endswith("True.")


def test_a_candidate_without_room_loses_to_one_that_ended(start: Start) -> None:
    def rambling(prompt: str, index: int) -> tuple[str, float]:
        said, score = thinker(prompt, index)
        return (said, score) if index != BEST or prompt.endswith("</think>") else ("<think>" + "x.\n\n" * 200, score)

    url, engine = start(rambling)
    answer = ask(url, reasoning_effort="medium", max_tokens=100)
    assert answer.choices[0].message.content in ("It is 4.", "It is 6.")
    assert answer.choices[0].finish_reason == "stop"
    short = ask(url, reasoning_effort="medium", max_completion_tokens=10)
    assert short.choices[0].finish_reason == "length" and short.choices[0].message.content == ""
    at_its_tag = len(engine.tokenizer.encode("<think>\nI am 5.\n\nYes.\n\n</think>", add_special_tokens=False))
    none_left = ask(url, reasoning_effort="medium", max_completion_tokens=at_its_tag)
    assert none_left.choices[0].finish_reason == "length" and none_left.choices[0].message.reasoning.endswith("Yes.")


@pytest.mark.parametrize("effort", ["none", "medium"])
@pytest.mark.parametrize("once", [True, False])
def test_a_stream_says_what_the_whole_says(start: Start, effort: str, once: bool) -> None:
    url, _ = start()
    fields = {"reasoning_effort": effort, "extra_body": {"answer_once": once, "return_candidates": True}}
    whole = ask(url, **fields)
    chunks = list(ask(url, stream=True, stream_options={"include_usage": True}, **fields))
    first, *middle, end, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in middle]
    said = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
    content = [delta.content for delta in deltas if delta.content]
    message = whole.choices[0].message
    assert (said, "".join(content)) == (message.reasoning, message.content)
    # The answer comes as it is written, where it is written last.
    assert (len(content) > 5) == (once or effort == "none")
    assert end.choices[0].finish_reason == "stop" and usage.choices == [] and usage.usage == whole.usage
    assert end.candidates == whole.candidates


def test_progress_is_told_to_those_who_ask(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xbai.serve.progress.INTERVAL_S", 0.0)
    url, _ = start()
    fields = {"reasoning_effort": "medium", "stream": True}
    chunks = list(ask(url, stream_options={"include_progress": True}, **fields))
    told = [chunk.progress for chunk in chunks if hasattr(chunk, "progress")]
    assert all(chunk.choices[0].delta.content is None for chunk in chunks if hasattr(chunk, "progress"))
    assert [one["tokens"] for one in told] == sorted({one["tokens"] for one in told})
    assert told[0]["best_score"] is None and told[-1]["best_score"] == pytest.approx(scores_of(BEST))
    assert {(one["candidates"], one["begun"]) for one in told} == {(8, 8)} and told[-1]["done"] == 8
    assert [len(one["step_scores"]) for one in told[-1]["each"]] == [2] * 8
    assert not [chunk for chunk in ask(url, **fields) if hasattr(chunk, "progress") or hasattr(chunk, "event")]


def test_open_webui_reads_how_far_it_is(start: Start) -> None:
    url, _ = start(openwebui_status=True)
    events = [chunk.event for chunk in ask(url, reasoning_effort="medium", stream=True) if hasattr(chunk, "event")]
    assert {event["type"] for event in events} == {"status"}
    assert events[-1]["data"] == {"description": "chose the best of 8 candidates", "done": True}
    assert not any(event["data"]["done"] for event in events[:-1])


def test_a_silent_stream_shows_that_it_is_alive(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_app, "SILENCE_S", 0.05)
    url, engine = start()
    engine.gate.clear()
    body = {"model": "wise", "messages": ASK, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        assert next(line for line in lines if line.startswith(":"))
        engine.gate.set()
        rest = [line for line in lines if line]
    data = [line.removeprefix("data: ") for line in rest if not line.startswith(":")]
    assert data[-1] == "[DONE]" and all(json.loads(line)["choices"] for line in data[:-1])


def test_who_leaves_frees_all_candidates(start: Start) -> None:
    url, engine = start()
    for stream in (True, False):
        engine.gate.clear()
        body = {"model": "wise", "messages": ASK, "stream": stream, "reasoning_effort": "high"}

        def ask_and_leave(body: dict[str, Any] = body) -> None:
            with httpx.Client(timeout=httpx.Timeout(PATIENCE_S, read=1.0)) as client:
                if not body["stream"]:
                    with pytest.raises(httpx.ReadTimeout):
                        client.post(f"{url}/v1/chat/completions", json=body)
                    return
                with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                    lines = response.iter_lines()  # Which hangs up as soon as nobody holds it.
                    assert next(lines)
                    wait_until(lambda: len(engine.running) == 32, "all candidates have begun")

        ask_and_leave()
        wait_until(lambda: not engine.running, "they are forgotten")
        engine.gate.set()
    assert "xbai_queue_items 0.0" in httpx.get(f"{url}/metrics").text
    assert ask(url).choices[0].message.content == "It is 1."


def test_an_async_client_may_leave_too(start: Start) -> None:
    url, engine = start()

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="wise", messages=ASK, stream=True, reasoning_effort="high"
            )
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()

    asyncio.run(leave())
    wait_until(lambda: not engine.running, "the rest of the answer is forgotten")


def test_many_at_once(start: Start) -> None:
    url, _ = start()
    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda i: ask(url, stream=bool(i % 2), reasoning_effort="low"), range(64)))
    for i, answer in enumerate(answers):
        if i % 2:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == "It is 1."
        else:
            assert answer.choices[0].message.content == "It is 1."


def test_choices_are_as_many_as_asked_for(start: Start) -> None:
    url, engine = start()
    answer = ask(url, n=3, seed=1, reasoning_effort="low", extra_body={"return_candidates": True})
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, "It is 1.") for i in range(3)]
    assert [(one["choice"], one["index"]) for one in answer.candidates] == [(c, i) for c in range(3) for i in range(2)]
    seeds = [sample.seed for sample in engine.begun if sample.prompt_ids[-1] != engine.step_rule.think_close_id]
    assert len(set(seeds)) == 6
    ask(url, seed=1, reasoning_effort="low")
    assert {sample.seed for sample in engine.begun[-3:-1]} <= set(seeds), (
        "one choice draws what the first of several does"
    )


def test_fields_of_sampling_reach_the_engine(start: Start) -> None:
    url, engine = start()
    extra = {"top_k": 7, "repetition_penalty": 1.5}
    ask(url, temperature=0.3, top_p=0.5, stop=["zz"], seed=-1, max_tokens=99, reasoning_effort="none", extra_body=extra)
    params = engine.begun[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.3, 0.5, 7, 1.5)
    assert (params.stop, params.max_tokens) == (("zz",), 99)
    ask(url, temperature=None, top_p=None, max_tokens=None, reasoning_effort="none", extra_body={"top_k": None})
    default = engine.begun[-1].params
    assert (default.temperature, default.top_p, default.top_k, default.repetition_penalty) == (0.8, 0.95, -1, 1.05)
    assert default.max_tokens == engine.max_model_len - len(engine.begun[-1].prompt_ids)
    assert ask(url, stop="is", reasoning_effort="none").choices[0].message.content == "It"
    streamed = ask(url, stop="is", reasoning_effort="none", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "It"


def test_a_conversation_reaches_the_template(start: Start) -> None:
    url, engine = start()
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "One"}, {"type": "text", "text": " or two?"}],
            "name": "x",
        },
        {"role": "assistant", "content": "One.", "reasoning": "long", "reasoning_content": "thought"},
        {"role": "user", "content": "Sure?"},
    ]
    ask(url, messages=messages, reasoning_effort="none")
    turns = [("system", "Be brief."), ("user", "One or two?"), ("assistant", "One."), ("user", "Sure?")]
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert engine.tokenizer.decode(engine.begun[-1].prompt_ids) == prompt


LIBRECHAT = {
    "model": "wise", "user": "65f0", "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0,
    "stream": True, "messages": [{"role": "user", "content": "Which?"}], "stop": [], "tools": [], "logit_bias": {},
}  # fmt: skip
OPEN_WEBUI = {
    "stream": True, "model": "wise-medium", "messages": ASK, "params": {}, "files": [], "features": {},
    "variables": {"{{USER_NAME}}": "x"}, "session_id": "s", "chat_id": "c", "id": "i", "tool_ids": [],
    "background_tasks": {"title_generation": True}, "stream_options": {"include_usage": True},
    "metadata": {"task": None}, "logprobs": False, "n": 1, "response_format": {"type": "text"},
}  # fmt: skip
TITLE = {
    "model": "wise", "stream": False, "max_completion_tokens": 1000, "metadata": {"task": "title_generation"},
    "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title with an emoji."}],
}  # fmt: skip


@pytest.mark.parametrize("body", [LIBRECHAT, OPEN_WEBUI, TITLE], ids=["LibreChat", "Open WebUI", "title"])
def test_chat_programs_are_answered(start: Start, body: dict[str, Any]) -> None:
    url, _ = start()
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
    assert response.status_code == 200
    if not body["stream"]:
        assert response.json()["choices"][0]["message"]["content"] == "It is 1."
        return
    *chunks, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    deltas = [choice["delta"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
    best = BEST if body["model"] == "wise-medium" else 1
    assert done == "[DONE]" and "".join(delta.get("content", "") for delta in deltas) == f"It is {best}."


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"n": 2, "stream": True}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"extra_body": {"candidates": 0}}, "candidates"),
        ({"extra_body": {"budget": {"rule": "stop"}}}, "budget.rule"),
    ],
)
def test_a_refusal_names_the_field(start: Start, fields: dict[str, Any], param: str) -> None:
    url, engine = start()
    body = refused(url, **fields)
    assert body["param"] == param and body["type"] == "invalid_request_error" and body["code"]
    assert param.split(".")[0] in body["message"]
    assert not engine.begun


def test_an_unknown_effort_is_told_which_there_are(start: Start) -> None:
    url, _ = start()
    body = refused(url, reasoning_effort="extreme")
    assert body["code"] == "unsupported_value" and "none, minimal, low, medium, high" in body["message"]
    body = refused(url, openai.NotFoundError, model="gpt-4")
    assert body["code"] == "model_not_found" and "wise-high" in body["message"]


def test_too_long_a_prompt_is_known_by_its_code(start: Start) -> None:
    url, _ = start()
    assert refused(url, messages=[{"role": "user", "content": "x" * 600}])["code"] == "context_length_exceeded"


def test_models_are_listed_by_effort(start: Start) -> None:
    url, _ = start(served_model_name="sage")
    client = client_of(url)
    assert [model.id for model in client.models.list()] == ["sage", "sage-low", "sage-medium", "sage-high"]
    assert client.models.retrieve("sage-low").id == "sage-low"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_model_without_scores_answers_without_a_choice(start: Start) -> None:
    url, engine = start(scores=False)
    assert ask(url).choices[0].message.content == "It is 0."
    assert refused(url, reasoning_effort="low")["param"] == "reasoning_effort"
    assert refused(url, extra_body={"candidates": 2})["param"] == "candidates"
    assert len(engine.begun) == 1
    assert [model.id for model in client_of(url).models.list()] == ["wise"]


def test_a_default_effort_and_another_name_for_thinking(start: Start) -> None:
    url, engine = start(effort="medium", reasoning_field="reasoning_content")
    message = ask(url).choices[0].message
    assert message.reasoning_content == "I am 5.\n\nYes." and not hasattr(message, "reasoning")
    chunks = ask(url, stream=True)
    said = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert said == "I am 5.\n\nYes." and len(engine.begun) == 2 * 9


def test_an_effort_may_have_a_budget(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "chance_beside", lambda path: ScoreChance(1.0, 0.0))
    url, engine = start(effort_budget="stop:0.885/1")
    answer = ask(url, reasoning_effort="high", extra_body={"return_candidates": True})
    # The fifth is the first whose chance is high enough.
    assert answer.choices[0].message.content == "It is 4." and len(engine.begun) == 5 + 1
    assert [one["finish_reason"] for one in answer.candidates[4:6]] == ["stop_token", "not_begun"]
    assert answer.candidates[5]["score"] is None
    ask(url, extra_body={"candidates": 8})
    assert len(engine.begun) == 6 + 9, "who names a number gets it"
    given = {"budget": {"rule": "stop:0.86/2", "chance": {"slope": 1.0, "intercept": 0.0}}}
    assert ask(url, reasoning_effort="high", extra_body=given).choices[0].message.content == "It is 3."


def test_a_rule_that_compares_answers_has_them(start: Start) -> None:
    url, engine = start()
    rule = {"rule": "majority:0.9/4", "data_source": "math"}
    answer = ask(url, reasoning_effort="medium", extra_body={"budget": rule, "return_candidates": True})
    assert all(one["content"] for one in answer.candidates)
    assert len(engine.begun) == 8


@pytest.mark.parametrize(
    ("rule", "why"), [("stop:0.9", "no calibration"), ("majority:0.9", "compares answers"), ("x", "write stop")]
)
def test_a_budget_that_cannot_be_followed_is_refused_at_the_start(start: Start, rule: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        start(effort_budget=rule)


def test_errors_of_the_service_have_openais_form(start: Start) -> None:
    url, engine = start(limits=Limits(api_key="secret", max_pending=8, max_body_bytes=4096))
    for key, kind in (("wrong", openai.AuthenticationError), ("secret", openai.NotFoundError)):
        with pytest.raises(kind) as error:
            client_of(url, key).post("/nowhere", cast_to=dict)
        assert error.value.body["message"]
    client = client_of(url, "secret")
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(model="wise", messages=[{"role": "user", "content": "x" * 8192}])
    assert error.value.status_code == 413 and error.value.body["type"] == "invalid_request_error"
    engine.gate.clear()
    waiting = threading.Thread(
        target=lambda: client.chat.completions.create(model="wise", messages=ASK, reasoning_effort="medium")
    )
    waiting.start()
    wait_until(lambda: len(engine.running) == 8, "the candidates of one have begun")
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model="wise", messages=ASK, stream=True)
    assert full.value.response.headers["retry-after"] and full.value.body["type"] == "rate_limit_error"
    engine.gate.set()
    waiting.join(PATIENCE_S)
    malformed = httpx.post(
        f"{url}/v1/chat/completions", content=b"{", headers={"Authorization": "Bearer secret"}, timeout=PATIENCE_S
    )
    assert malformed.status_code == 400 and malformed.json()["error"]["type"] == "invalid_request_error"


def test_a_stream_that_takes_too_long_ends_with_an_error(start: Start) -> None:
    url, engine = start(limits=replace(Limits(), request_timeout_s=0.3))
    engine.gate.clear()
    with pytest.raises(openai.APIError, match=r"no answer within 0\.3 s"):
        list(ask(url, stream=True))
    wait_until(lambda: not engine.running, "the candidates are forgotten")
    with pytest.raises(openai.InternalServerError):
        ask(url)


def test_responses(start: Start) -> None:
    url, _ = start()
    client = client_of(url)
    made = client.responses.create(
        model="wise", input="Which?", reasoning={"effort": "medium"}, instructions="Be brief."
    )
    assert made.output_text == "It is 5." and made.status == "completed" and made.instructions == "Be brief."
    reasoning, message = made.output
    assert reasoning.content[0].text == "I am 5.\n\nYes." and message.role == "assistant"
    chat = ask(url, reasoning_effort="medium", messages=[{"role": "system", "content": "Be brief."}, *ASK])
    assert made.usage.input_tokens == chat.usage.prompt_tokens
    assert made.usage.output_tokens == chat.usage.completion_tokens
    details, of_chat = made.usage.output_tokens_details, chat.usage.completion_tokens_details
    assert details.reasoning_tokens == of_chat.reasoning_tokens
    cut = client.responses.create(model="wise", input="Which?", max_output_tokens=10)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("effort", ["none", "medium"])
def test_a_stream_of_a_response(start: Start, effort: str) -> None:
    url, _ = start()
    with client_of(url).responses.stream(model="wise", input="Which?", reasoning={"effort": effort}) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events if event.type != "response.output_text.delta"] == sorted(
        event.sequence_number for event in events if event.type != "response.output_text.delta"
    )
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed" and "response.reasoning_text.delta" in kinds
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text == ("It is 0." if effort == "none" else "It is 5.")


def test_a_conversation_of_responses(start: Start) -> None:
    url, engine = start()
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "One?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Two."}]},
        {"role": "user", "content": "Sure?"},
    ]
    client = client_of(url)
    client.responses.create(model="wise", input=items, reasoning={"effort": "none"})
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Sure?")]
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert engine.tokenizer.decode(engine.begun[-1].prompt_ids) == prompt
    for fields, param in (
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"input": "x", "reasoning": {"effort": "xhigh"}}, "reasoning.effort"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(**{"model": "wise", **fields})
        assert error.value.body["param"] == param
