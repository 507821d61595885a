"""From messages to a prompt: what the template gets, where the response begins, and every failure as one line."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from xbai.errors import UserError
from xbai.prompts import TemplateRefusalError, chat_messages, is_far_longer, prompt_text
from xbai.sprm import StepRule

MESSAGES = [{"role": "user", "content": "Make 10 from 5 9 4"}]
CASES = [json.loads(line) for line in (Path(__file__).parents[1] / "cases" / "chat_templates.jsonl").open()]
REFUSES = "{{ raise_exception('System role not supported') }}"


def with_template(tokenizer: PreTrainedTokenizerFast, template: Any) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_prompt_ends_with_the_generation_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = prompt_text(tiny_tokenizer, MESSAGES)
    assert text == "<|im_start|>user\nMake 10 from 5 9 4<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("piece", ["x", "<|endoftext|>", "。", "a b"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_far_longer_has_more_tokens(tiny_tokenizer: PreTrainedTokenizerFast, piece: str, tokens: int) -> None:
    text = piece * (256 * tokens // len(piece) + 1)
    assert is_far_longer(text, tokens, tiny_tokenizer)
    assert len(tiny_tokenizer.encode(text, add_special_tokens=False)) > tokens
    assert not is_far_longer(text[: 256 * tokens], tokens, tiny_tokenizer)


def test_a_vocabulary_may_have_tokens_of_any_length(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens("=" * 1000)
    assert len(tokenizer.encode("=" * 2000, add_special_tokens=False)) == 2
    assert not is_far_longer("=" * 2000, 2, tokenizer)
    assert is_far_longer("=" * 2001, 2, tokenizer)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_template_gets_what_it_takes_or_says_where_and_why_not(
    case: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer, before = with_template(tiny_tokenizer, case["template"]), copy.deepcopy(case["messages"])
    if "prompt" in case:
        assert prompt_text(tokenizer, case["messages"], "a.jsonl:3") == case["prompt"]
    else:
        with pytest.raises(UserError) as caught:
            prompt_text(tokenizer, case["messages"], "a.jsonl:3")
        said = str(caught.value)
        assert said.startswith("a.jsonl:3") and case["error"] in said and "\n" not in said
        assert isinstance(caught.value, TemplateRefusalError) == ("refuses" in case["error"])
    assert case["messages"] == before


def test_templates_by_name(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    named = {"default": "{{ messages[0].content }}", "tool_use": REFUSES}
    assert prompt_text(with_template(tiny_tokenizer, named), MESSAGES) == "Make 10 from 5 9 4"
    with pytest.raises(UserError, match=r"^a\.jsonl:3: the chat template fails: ValueError: .*multiple chat templates"):
        prompt_text(with_template(tiny_tokenizer, {"tool_use": REFUSES}), MESSAGES, "a.jsonl:3")


def test_what_a_template_says_is_cut_off(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, "{{ raise_exception('no ' ~ messages[0].content) }}")
    with pytest.raises(TemplateRefusalError) as caught:
        prompt_text(tokenizer, [{"role": "user", "content": "x" * 10_000}])
    assert len(str(caught.value)) < 400


def test_messages_are_the_same_read_twice() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]},
    ]
    read = chat_messages(messages, "here")
    assert read == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    ]
    assert chat_messages(read, "here") == read


@pytest.mark.parametrize(
    "template",
    [
        REFUSES,
        "{% if not add_generation_prompt %}{{ raise_exception('the last one must answer') }}{% endif %}A:",
    ],
)
def test_a_template_that_refuses_a_bare_question_does_not_say_what_opens_a_response(
    template: str, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        rule = StepRule.from_tokenizer(with_template(tiny_tokenizer, template))
    assert rule.generation_prompt == ""
    assert len(caplog.messages) == 1 and "the chat template refuses it: " in caplog.text


def test_a_template_that_wants_a_system_message_gets_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('needs a system message') }}{% endif %}"
    rule = StepRule.from_tokenizer(with_template(tiny_tokenizer, wants + tiny_tokenizer.chat_template))
    assert rule == StepRule.from_tokenizer(tiny_tokenizer)
    assert rule.generation_prompt


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages|shout }}", "{{ messages[0].x.y }}"])
def test_a_broken_template_gives_no_step_rule(template: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="the chat template fails"):
        StepRule.from_tokenizer(with_template(tiny_tokenizer, template))
