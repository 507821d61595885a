"""Tags in vocabularies without a token for them, however their characters are shared out among tokens."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xbai.sprm import SPRMConfig, StepRule, load_sprm_config, step_feature_mask
from xbai.sprm.head import save_sprm_config
from xbai.sprm.tags import THINK_CLOSE, THINK_OPEN, tag_ends, tag_pieces

TEXTS = ["<think>", "</think>", "<", "</", "<thi", "<<think", "think", "nk>", ">", "/", ".\n\n", "a", "ink</"]


class Vocabulary:
    """Each text a token."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = sorted(set(texts))

    def get_vocab(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts)}

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(self.texts[i] for i in row) for row in rows]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=8).map("".join), st.data())
def test_a_tag_ends_with_the_token_of_its_last_character(text, data):
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=len(text)))})
    parts = [text[a:b] for a, b in pairwise(cuts)]
    vocabulary = Vocabulary([*parts, *TEXTS])
    ids = torch.tensor([[vocabulary.texts.index(part) for part in parts]])
    pieces = tag_pieces(vocabulary)
    for tag in (THINK_OPEN, THINK_CLOSE):
        ends = [at + len(tag) for at in range(len(text)) if text.startswith(tag, at)]
        is_end, goes_on = tag_ends(ids, tag, None, pieces)
        assert is_end[0].tolist() == [any(a < end <= b for end in ends) for a, b in pairwise(cuts)]
        assert goes_on[0].tolist() == [any(a < end < b for end in ends) for a, b in pairwise(cuts)]


@pytest.fixture(scope="module")
def bytes_and_merges(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with merges like those of common vocabularies in place of the tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    merges = [("<", "/"), ("t", "h"), ("i", "n"), ("in", "k"), ("th", "ink"), (">", newline), (".", "</")]
    vocabulary = {text: i for i, text in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([".\n\n"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_steps_are_those_of_a_vocabulary_with_the_tags(tiny_tokenizer, bytes_and_merges):
    pieces = ["<think>", "</think>", "<", "think>", ".\n\n", ".\n\n", ".", "\n", "a", "so "]
    generator, counted = random.Random(0), 0
    with_tags, without = StepRule.from_tokenizer(tiny_tokenizer), StepRule.from_tokenizer(bytes_and_merges)
    assert (without.think_open_id, without.think_close_id) == (None, None)
    for _ in range(500):
        prompt, response = ("".join(generator.choices(pieces, k=generator.randint(1, 8))) for _ in range(2))
        steps = [
            step_offsets(prompt, response, tokenizer, rule)
            for tokenizer, rule in ((tiny_tokenizer, with_tags), (bytes_and_merges, without))
        ]
        assert steps[0] == steps[1]
        counted += len(steps[0])
    assert counted > 100


def step_offsets(prompt: str, response: str, tokenizer: PreTrainedTokenizerFast, rule: StepRule) -> list[int]:
    """Where in the response's text the counted step tokens begin."""
    prompt_ids, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, response))
    mask = step_feature_mask(
        torch.tensor([prompt_ids + ids]), torch.arange(len(prompt_ids) + len(ids))[None] >= len(prompt_ids), rule
    )
    steps = (mask[0].nonzero().flatten() + 1 - len(prompt_ids)).tolist()
    return [len(tokenizer.decode(ids[:step])) for step in steps]


def test_a_stored_rule_gets_its_pieces_from_the_tokenizer(tmp_path, bytes_and_merges):
    config = SPRMConfig(StepRule.from_tokenizer(bytes_and_merges))
    assert config.step_rule.tag_pieces
    save_sprm_config(tmp_path, config)
    assert "tag_pieces" not in (tmp_path / "sprm_config.json").read_text(encoding="utf-8")
    assert load_sprm_config(tmp_path, bytes_and_merges) == config


def test_own_tokens_need_no_pieces(tiny_tokenizer):
    rule = StepRule.from_tokenizer(tiny_tokenizer)
    assert rule.tag_pieces == ()
    ids = torch.tensor([[rule.think_open_id, rule.think_close_id]])
    assert tag_ends(ids, THINK_OPEN, rule.think_open_id, ())[0].tolist() == [[True, False]]
    assert not tag_ends(ids, THINK_CLOSE, None, ())[0].any()
