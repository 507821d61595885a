"""The step rule against a plain, token-by-token reading of its definition."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.errors import UserError
from xbai.sprm import StepRule, split_response, step_feature_mask

STEP, OTHER_STEP, OPEN, CLOSE, WORD = 1, 2, 3, 4, 5
RULE = StepRule("zh", (STEP, OTHER_STEP), OPEN, CLOSE)


def plain_feature_positions(ids: list[int], start: int, stop: int, rule: StepRule) -> list[int]:
    prompt_tags = [i for i in ids[:start] if i in (rule.think_open_id, rule.think_close_id)]
    first = start
    if prompt_tags[-1:] != [rule.think_open_id] and rule.think_open_id in ids[start:stop]:
        first = ids.index(rule.think_open_id, start, stop) + 1
    last = ids.index(rule.think_close_id, first, stop) if rule.think_close_id in ids[first:stop] else stop
    steps = [t for t in range(first, last) if ids[t] in rule.step_ids]
    return [t - 1 for t in steps if t != first and ids[t - 1] not in rule.step_ids]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([STEP, OTHER_STEP, OPEN, CLOSE, WORD, WORD]), min_size=1, max_size=24), st.data())
def test_mask_equals_plain_definition(ids, data):
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    left = data.draw(st.integers(0, 3))
    padded = torch.tensor([[STEP] * left + ids + [STEP] * 3])
    response = torch.zeros_like(padded, dtype=torch.bool)
    response[0, left + start : left + stop] = True
    mask = step_feature_mask(padded, response, RULE)
    assert (mask[0].nonzero().flatten() - left).tolist() == plain_feature_positions(ids, start, stop, RULE)


def test_rows_do_not_influence_each_other():
    rows = torch.randint(1, 6, (64, 30), generator=torch.Generator().manual_seed(0))
    response = torch.ones_like(rows, dtype=torch.bool)
    together = step_feature_mask(rows, response, RULE)
    alone = torch.cat([step_feature_mask(rows[i : i + 1], response[:1], RULE) for i in range(64)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("prompt", "response", "counted"),
    [
        ([OPEN], [WORD, STEP, CLOSE, WORD, STEP], [1]),
        ([OPEN, WORD, CLOSE], [WORD, STEP, CLOSE, WORD, STEP], [1]),
        ([OPEN, WORD, CLOSE], [WORD, STEP, WORD, STEP], [1, 3]),
        ([OPEN, WORD, CLOSE, WORD, OPEN], [WORD, STEP, OPEN, WORD, STEP, CLOSE, WORD, STEP], [1, 4]),
        ([WORD], [WORD, STEP, OPEN, WORD, STEP, CLOSE, WORD, STEP], [4]),
        ([WORD], [WORD, STEP, CLOSE, WORD, STEP, OPEN, WORD, STEP], [7]),
        ([WORD], [OPEN, STEP, OTHER_STEP, WORD, STEP, OPEN, STEP, CLOSE], [4, 6]),
        ([OPEN], [STEP, STEP, WORD, STEP], [3]),
        ([OPEN], [CLOSE, WORD, STEP], []),
        ([], [OPEN, CLOSE, WORD, STEP], []),
    ],
)
def test_where_thinking_begins_and_ends(prompt, response, counted):
    ids = torch.tensor([prompt + response])
    mask = step_feature_mask(ids, torch.arange(ids.shape[1])[None] >= len(prompt), RULE)
    assert (mask[0].nonzero().flatten() + 1 - len(prompt)).tolist() == counted


def test_a_rule_without_tags_reads_the_whole_response():
    ids = torch.tensor([[WORD, OPEN, WORD, STEP, CLOSE, WORD, STEP]])
    mask = step_feature_mask(ids, torch.ones_like(ids, dtype=torch.bool), StepRule("en", (STEP,)))
    assert mask[0].nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize(
    ("text", "response"), [("ab:\n\nc", "\nc"), ("a:\nb:\nc", "c"), ("a:\n", ""), ("abc:", "abc:"), ("", "")]
)
def test_response_follows_the_last_generation_prompt(text, response):
    for rule, expected in ((StepRule("en", (1,), generation_prompt=":\n"), response), (StepRule("en", (1,)), text)):
        prompt, found = split_response(text, rule)
        assert (prompt + found, found) == (text, expected)


@pytest.mark.parametrize(
    ("text", "response"),
    [
        ("Q A:<think>\nso", "so"),
        ("Q A:<think>so", "<think>so"),
        ("Q A:so", "so"),
        ("A:<think>\na Q A:so", "so"),
        ("A:a Q A:<think>\n<think>\nso", "<think>\nso"),
        ("<think>\nso", "<think>\nso"),
    ],
)
def test_a_text_may_lack_the_tag_that_the_generation_prompt_opens(text, response):
    prompt, found = split_response(text, StepRule("en", (1,), generation_prompt="A:<think>\n"))
    assert (prompt + found, found) == (text, response)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content }}{% if add_generation_prompt %}A:\n{% endif %}", "A:\n"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}A:{% else %}<end>{% endif %}", ""),
        ("{{ messages[0].content }}", ""),
    ],
)
def test_generation_prompt_is_what_the_template_adds(tiny_tokenizer, template, expected):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    assert StepRule.from_tokenizer(tokenizer).generation_prompt == expected


class FakeTokenizer:
    """The few methods a rule needs, over an explicit vocabulary of whole texts."""

    chat_template = None

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def get_vocab(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.texts.index(text)] if text in self.texts else [self.texts.index(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[i] for i in ids)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [self.decode(row) for row in rows]


def test_en_rule_is_the_single_delimiter_token():
    tokenizer = FakeTokenizer(["a", ".\n\n", "<think>", *"</think>"])
    rule = StepRule.from_tokenizer(tokenizer, "en")
    assert (rule.step_ids, rule.think_open_id, rule.think_close_id) == ((1,), 2, None)
    assert StepRule.from_dict(rule.to_dict()).with_tag_pieces(tokenizer) == rule


def test_en_rule_without_the_token_names_the_alternative():
    with pytest.raises(UserError, match="lang=zh"):
        StepRule.from_tokenizer(FakeTokenizer([".", "\n", *"<think>/"]), "en")


def test_zh_rule_is_the_short_delimiter_family():
    yes = ["\n", "。", "\n\n", "。\n\n", "a\n", "!。", "\n。\n"]
    no = ["a", "ab\n", "\n\n\n\n", "ab", "。ab"]
    rule = StepRule.from_tokenizer(FakeTokenizer(yes + no + [*"<think>/"]), "zh")
    assert rule.step_ids == tuple(range(len(yes)))


def test_unknown_language_is_named():
    with pytest.raises(UserError, match="lang='fr'"):
        StepRule.from_tokenizer(FakeTokenizer(["a"]), "fr")
