"""The wire format: defaults as published, bounds, and what is refused."""

import math

import pytest
from pydantic import ValidationError

from xbai.serve.schemas import GenerateRequest, GenerateResponse, ScoreBatchRequest, ScoreRequest


def test_generate_defaults_are_the_published_ones() -> None:
    request = GenerateRequest.model_validate_json('{"prefix_prompt": "x"}')
    assert request.model_dump() == {
        "prefix_prompt": "x",
        "max_tokens": 1024,
        "response_num": 8,
        "stop": None,
        "stop_token_ids": None,
        "temperature": 0.8,
        "seed": None,
        "top_p": 0.95,
        "top_k": -1,
        "repetition_penalty": 1.05,
        "return_scores": False,
        "return_log_probs": False,
        "budget": None,
        "answer_once": False,
    }


@pytest.mark.parametrize(
    "field",
    [
        '"temperature": NaN',
        '"temperature": Infinity',
        '"temperature": -1',
        '"temperature": "hot"',
        '"top_p": 0',
        '"top_p": 1.1',
        '"repetition_penalty": 0',
        '"max_tokens": 0',
        '"max_tokens": 1e400',
        '"response_num": 0',
        '"response_num": 1025',
        '"response_num": 2.5',
        '"response_num": true',
        '"seed": -1',
        '"seed": 9223372036854775808',
        '"stop": ""',
        '"stop": [1]',
        '"top-p": 0.5',
        '"prefix_prompt": ""',
        '"prefix_prompt": "\\ud800"',
        '"prefix_prompt": null',
    ],
)
def test_generate_refuses(field: str) -> None:
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate_json('{"prefix_prompt": "x", ' + field + "}")


@pytest.mark.parametrize(("stop", "expected"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b"))])
def test_stop_may_be_one_text_or_several(stop: str | list[str] | None, expected: tuple[str, ...]) -> None:
    assert GenerateRequest(prefix_prompt="x", stop=stop).stop_texts() == expected


def test_responses_carry_no_nan() -> None:
    with pytest.raises(ValidationError):
        GenerateResponse(results=["a"], finish_reasons=["stop"], token_counts=[1], scores=[math.nan])


@pytest.mark.parametrize("body", ["{}", '{"text": ""}', '{"text": "x", "return_all_scores": "yes"}', "[]", '"x"'])
def test_score_refuses(body: str) -> None:
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate_json(body)


@pytest.mark.parametrize("body", ['{"texts": []}', '{"texts": [""]}', '{"texts": "x"}'])
def test_score_batch_refuses(body: str) -> None:
    with pytest.raises(ValidationError):
        ScoreBatchRequest.model_validate_json(body)
