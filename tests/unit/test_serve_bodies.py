"""Reading bodies: as `json.loads` does, but never more values than a request can have."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.serve.bodies import MAX_BODY_KEYS, MAX_BODY_TOKENS, parse_body
from xbai.serve.errors import MAX_PROBLEM_CHARS, MAX_PROBLEMS, ServiceError, list_problems
from xbai.serve.schemas import MAX_BATCH_TEXTS, MAX_STOP_TOKENS, GenerateRequest, ScoreBatchRequest

TRICKY = '", [{" [[,,]] \\" \\\\" 😀 " \\n{'
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(deadline=None)
@given(VALUES, st.sampled_from(["utf-8", "utf-16", "utf-32-be"]), st.booleans())
def test_as_json_loads(value: Any, encoding: str, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode(encoding, "surrogatepass")
    assert parse_body(body) == json.loads(body) == value


def tokens(value: Any) -> int:
    """Strings, openings and commas of a value's JSON, counted on the value."""
    if isinstance(value, str):
        return 1
    if isinstance(value, dict):
        return max(1, len(value)) + sum(1 + tokens(item) for item in value.values())
    return max(1, len(value)) + sum(map(tokens, value)) if isinstance(value, list) else 0


@pytest.mark.parametrize("item", [1, "", TRICKY, [], {"a": 1}, ["x", 2]])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_bound_is_on_values_not_on_what_strings_hold(item: Any, ascii_only: bool) -> None:
    each = tokens([item, item]) - tokens([item])
    most = [item] * (MAX_BODY_TOKENS // each)
    while tokens(most) > MAX_BODY_TOKENS:
        most.pop()
    assert parse_body(json.dumps(most, ensure_ascii=ascii_only).encode()) == most
    with pytest.raises(ServiceError, match=f"more than {MAX_BODY_TOKENS} keys and values") as refused:
        parse_body(json.dumps([*most, item], ensure_ascii=ascii_only).encode())
    assert refused.value.status == 422


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
    ],
)
def test_what_is_no_request_is_refused_at_once(body: bytes) -> None:
    started = time.process_time()
    with pytest.raises((ServiceError, json.JSONDecodeError)):
        parse_body(body)
    assert time.process_time() - started < 1.0


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
