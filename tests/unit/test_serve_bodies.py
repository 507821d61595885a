"""Reading bodies: as `json.loads` does, but never more values than a request can have."""

from __future__ import annotations

import asyncio
import json
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from clocks import cpu_seconds
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.serve import bodies
from xbai.serve.bodies import LARGE_BODY_BYTES, MAX_BODY_KEYS, MAX_BODY_VALUES, parse_body
from xbai.serve.errors import MAX_PROBLEM_CHARS, MAX_PROBLEMS, ServiceError, list_problems
from xbai.serve.schemas import MAX_BATCH_TEXTS, MAX_STOP_TOKENS, GenerateRequest, ScoreBatchRequest

TRICKY = '", [{" [[,,]] \\" \\\\" 😀 " \\n{'
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(deadline=None)
@given(VALUES, st.sampled_from(["utf-8", "utf-16", "utf-32-be"]), st.booleans(), st.booleans())
def test_as_json_loads(value: Any, encoding: str, ascii_only: bool, large: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    body = (text + " " * LARGE_BODY_BYTES * large).encode(encoding, "surrogatepass")
    assert parse_body(body) == json.loads(body) == value


@settings(deadline=None)
@given(st.text(alphabet='[]{}",:\\u12 .-eE+nNul'), st.booleans())
def test_what_is_no_json_is_refused_as_json_loads_refuses_it(text: str, large: bool) -> None:
    text += " " * LARGE_BODY_BYTES * large
    try:
        expected = json.loads(text)
    except ValueError as error:
        with pytest.raises(json.JSONDecodeError, match=f"^{re.escape(str(error))}$"):
            parse_body(text.encode())
    else:
        assert repr(parse_body(text.encode())) == repr(expected), "NaN differs from itself"


def values(value: Any) -> int:
    """How many there are, counted on the value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(values, inner))


@pytest.mark.parametrize("item", [1, "", TRICKY, [], {"a": 1}, ["x", 2]])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_bound_is_on_values_not_on_what_strings_hold(item: Any, ascii_only: bool) -> None:
    most = [item] * ((MAX_BODY_VALUES - 1) // values(item))
    assert parse_body(json.dumps(most, ensure_ascii=ascii_only).encode()) == most
    more = [*most, item]
    with pytest.raises(ServiceError, match=f"more than {MAX_BODY_VALUES} values") as refused:
        parse_body(json.dumps(more, ensure_ascii=ascii_only).encode())
    assert refused.value.status == 422


@pytest.mark.parametrize("number", ["9" * 500, "0." + "9" * 500, "1" + "0" * 500 + "e-500", "-" + "1" * 500])
def test_an_endless_number_is_refused(number: str) -> None:
    padding = " " * LARGE_BODY_BYTES
    with pytest.raises(ServiceError, match="a number of more characters"):
        parse_body(f'{{"seed": {number}{padding}}}'.encode())
    assert parse_body(f'{{"seed": {number[:390]}{padding}}}'.encode()) == json.loads(f'{{"seed": {number[:390]}}}')


def test_an_honest_large_body_costs_little_more_than_its_json() -> None:
    text = 'Let x be 3, so that "f(x)" = 9.\n\nThen [we] see {it}, and 2, 3 follow.\n\n'
    for request in ({"prefix_prompt": text * 13_000}, {"texts": [text * 200] * 64}, {"texts": [text * 12] * 1024}):
        body = json.dumps(request).encode()
        pairs = [(cpu_seconds(parse_body, body), cpu_seconds(json.loads, body)) for _ in range(20)]
        ours, plain = map(min, zip(*pairs))
        assert ours < 2.5 * plain


def test_the_largest_requests_that_the_schemas_take_are_read() -> None:
    everything = {name: field.default for name, field in GenerateRequest.model_fields.items()}
    text = TRICKY * 1000
    largest = everything | {"prefix_prompt": text, "stop": [TRICKY] * 16, "stop_token_ids": [1] * MAX_STOP_TOKENS}
    assert GenerateRequest.model_validate(parse_body(json.dumps(largest).encode())).model_dump() == largest
    batch = {"texts": [text] * MAX_BATCH_TEXTS, "return_all_scores": True, "prompt": TRICKY}
    assert ScoreBatchRequest.model_validate(parse_body(json.dumps(batch).encode())).model_dump() == batch


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' * 2_000_000,
        b"[" * 10_000_000,
        b'{"text":"' + b"\\" * 10_000_000,
        b'"' * 10_000_000,
        b'"a",' * 2_000_000,
        b"[" + b"1," * 7_000_000,
        b"[" + b"[]," * 5_000_000,
        b'{"a":' + b"9" * 15_000_000,
    ],
)
def test_what_is_no_request_is_refused_at_once(body: bytes) -> None:
    def refuse() -> None:
        with pytest.raises((ServiceError, json.JSONDecodeError)):
            parse_body(body)

    assert cpu_seconds(refuse) < 1


def test_the_event_loop_has_its_turn_between_two_large_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, most = 0, 0

    class Parser(ThreadPoolExecutor):
        def submit(self, *work: Any) -> Future:
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            return super().submit(*work)

    def parse(body: bytes) -> Any:
        nonlocal waiting
        time.sleep(0.01)
        waiting -= 1
        return parse_body(body)

    monkeypatch.setattr(bodies, "_PARSER", Parser(1))
    monkeypatch.setattr(bodies, "parse_body", parse)
    app = FastAPI()
    app.router.route_class = bodies.BodyRoute
    app.state.parsing = asyncio.Lock()

    @app.post("/")
    async def length(texts: list[str]) -> int:
        return len(texts)

    async def post_all() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            answers = await asyncio.gather(*(client.post("/", json=["x" * LARGE_BODY_BYTES] * n) for n in range(1, 9)))
            return [answer.json() for answer in answers]

    assert asyncio.run(post_all()) == list(range(1, 9))
    assert most == 1, "the parser is not given the next body while it has one"


def test_more_keys_than_any_request_has_are_refused() -> None:
    fields = {f"field {number}": number for number in range(MAX_BODY_KEYS)}
    assert parse_body(json.dumps(fields).encode()) == fields
    with pytest.raises(ServiceError, match=f"more than {MAX_BODY_KEYS} keys"):
        parse_body(json.dumps({**fields, "one more": 0}).encode())


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ServiceError, match="nested too deeply"):
        parse_body(b"[" * 3000 + b"]" * 3000)


def test_problems_are_few_and_short() -> None:
    assert list_problems(["a: wrong", "b: missing"]) == "a: wrong; b: missing"
    many = list_problems([f"{number}" for number in range(MAX_PROBLEMS + 5)])
    assert many.split("; ")[-2:] == [f"{MAX_PROBLEMS - 1}", "and 5 more"]
    assert len(list_problems(["x" * 10_000_000])) < MAX_PROBLEM_CHARS + 10
    assert list_problems(["\ud800: extra"]) == "\\ud800: extra"
