"""The scorer loads what it needs and scores mixed lengths as one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from xbai.engine import PromptTooLong, Scorer
from xbai.errors import UserError
from xbai.sprm import aggregate

PROMPT = "<|im_start|>user\nHi.\n\nBye<|im_end|>\n<|im_start|>assistant\n"
PROMPT_TOKENS = len("user\nHiBye\nassistant\n") + 4
TEXTS = [
    f"{PROMPT}<think>\nOne.\n\nTwo.\n\n</think>\n\nThree.\n\nFour",
    "One.\n\nTwo.\n\n",
    "no step",
    "a.\n\n" * 40,
]


@pytest.fixture(scope="module")
def scorer(tiny_model_dir: Path) -> Scorer:
    return Scorer.from_folder(tiny_model_dir, dtype="float32")


@pytest.fixture
def sequences(tiny_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tiny_tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("tied", [False, True])
def test_features_equal_hidden_states_of_the_full_model(
    make_tiny_model: Callable[..., Path], sequences: list[list[int]], tied: bool
) -> None:
    folder = make_tiny_model(tied=tied)
    scorer = Scorer.from_folder(folder, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ids in map(torch.tensor, sequences):
        with torch.no_grad():
            expected = model(ids[None], output_hidden_states=True).hidden_states[-2]
            assert torch.equal(scorer.backbone(ids[None]).last_hidden_state, expected)


def test_last_layer_and_lm_head_are_not_loaded(scorer: Scorer) -> None:
    names = [name for name, _ in scorer.backbone.named_parameters()]
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}
    assert {name.split(".")[0] for name in names} == {"embed_tokens", "layers"}


def test_batches_of_any_size_give_the_same_scores(
    scorer: Scorer, tiny_model_dir: Path, sequences: list[list[int]]
) -> None:
    starts = [PROMPT_TOKENS, 0, 0, 0]
    together = scorer.score(sequences, starts)
    assert [len(result.step_scores) for result in together] == [2, 2, 0, 40]
    assert together[2].value == 0.0
    small = Scorer.from_folder(tiny_model_dir, dtype="float32", max_batch_tokens=100)
    for ids, start, result, other in zip(sequences, starts, together, small.score(sequences, starts), strict=True):
        [alone] = scorer.score([ids], [start])
        assert result.token_ids == ids
        assert result.value == pytest.approx(aggregate(result.step_scores), abs=1e-6)
        for same in (alone, other):
            assert same.positions == result.positions
            assert same.step_scores == pytest.approx(result.step_scores, abs=1e-5)


def test_only_steps_of_the_response_count(scorer: Scorer, sequences: list[list[int]]) -> None:
    step = scorer.step_rule.step_ids[0]
    conversation = sequences[0]
    [found] = scorer.score([conversation], [PROMPT_TOKENS])
    assert [conversation[position + 1] for position in found.positions] == [step, step]
    tail = conversation[conversation.index(step) + 1 :]
    [without_prompt] = scorer.score([tail], [0])
    assert len(without_prompt.positions) == 2
    # Without the end of thinking in the response, all of it counts; the prompt's step does not.
    close = conversation.index(scorer.step_rule.think_close_id)
    [opened] = scorer.score([conversation[:close] + conversation[close + 1 :]], [PROMPT_TOKENS])
    assert len(opened.positions) == 3


def test_a_sequence_beyond_the_context_is_refused(scorer: Scorer) -> None:
    with pytest.raises(PromptTooLong, match="513 tokens"):
        scorer.score([[1] * 513], [0])
    with pytest.raises(UserError, match="at least one token"):
        scorer.score([[1], []], [0, 0])


def test_bfloat16_is_close_to_float32(scorer: Scorer, tiny_model_dir: Path, sequences: list[list[int]]) -> None:
    half = Scorer.from_folder(tiny_model_dir, dtype="bfloat16")
    for exact, rounded in zip(scorer.score(sequences, [0] * 4), half.score(sequences, [0] * 4), strict=True):
        assert rounded.value == pytest.approx(exact.value, abs=0.02)
