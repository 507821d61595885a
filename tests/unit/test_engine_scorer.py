"""The scorer loads what it needs, and scores packed sequences of mixed lengths as the whole model would one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, PreTrainedConfig, PreTrainedTokenizerFast

from xbai.engine import PromptTooLong, Scored, Scorer, load_engine, packed_attention
from xbai.engine import scorer as scorer_module
from xbai.errors import UserError
from xbai.sprm import (
    ScoreHead,
    SPRMConfig,
    StepRule,
    aggregate,
    load_score_head,
    load_sprm_config,
    save_score_head,
    step_feature_mask,
)

PROMPT = "<|im_start|>user\nHi.\n\nBye<|im_end|>\n<|im_start|>assistant\n"
PROMPT_TOKENS = len("user\nHiBye\nassistant\n") + 4
TEXTS = [
    f"{PROMPT}<think>\nOne.\n\nTwo.\n\n</think>\n\nThree.\n\nFour",
    "One.\n\nTwo.\n\n",
    "no step",
    "a.\n\n" * 40,
    f"{PROMPT}<think>\nOne.\n\nThree.\n\nFour",
    f"{PROMPT}<think>\nOne.\n\nTwo.\n\n</think>\n\nThree.\n\nFour",
    "One.\n\nTwo.\n\nThree.\n\n",
]
STARTS = [PROMPT_TOKENS, 0, 0, 0, PROMPT_TOKENS, PROMPT_TOKENS, 0]
STEPS = [2, 2, 0, 40, 2, 2, 3]


@pytest.fixture(scope="module")
def scorer(tiny_model_dir: Path) -> Scorer:
    return Scorer.from_folder(tiny_model_dir, dtype="float32")


@pytest.fixture
def sequences(tiny_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tiny_tokenizer.encode(text) for text in TEXTS]


def plain_scores(
    folder: Path, tokenizer: PreTrainedTokenizerFast, sequences: list[list[int]], starts: list[int]
) -> list[list[float]]:
    """Step scores by the whole model, a text at a time, with all hidden states and logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = load_sprm_config(folder, tokenizer)
    head = load_score_head(folder, model.config.hidden_size, config)
    scores = []
    for ids, start in zip(sequences, starts, strict=True):
        row = torch.tensor([ids])
        mask = step_feature_mask(row, torch.arange(len(ids))[None] >= start, config.step_rule)
        with torch.no_grad():
            hidden = model(row, output_hidden_states=True).hidden_states[-2]
            scores.append(head(hidden)[mask].sigmoid().tolist())
    return scores


def assert_scores(found: list[Scored], expected: list[list[float]], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for result, scores in zip(found, expected, strict=True):
        assert result.step_scores == pytest.approx(scores, abs=tolerance)
        assert result.value == pytest.approx(aggregate(scores), abs=tolerance)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_batch_tokens", [None, 100, 1])
def test_scores_equal_those_of_the_whole_model(
    make_tiny_model: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    sequences: list[list[int]],
    tied: bool,
    max_batch_tokens: int | None,
) -> None:
    folder = make_tiny_model(tied=tied)
    expected = plain_scores(folder, tiny_tokenizer, sequences, STARTS)
    assert [len(scores) for scores in expected] == STEPS
    found = Scorer.from_folder(folder, dtype="float32", max_batch_tokens=max_batch_tokens).score(sequences, STARTS)
    assert_scores(found, expected)
    assert [result.token_ids for result in found] == sequences
    with_engine = load_engine("hf", folder, dtype="float32", with_scores=True)
    before = with_engine.generate([sequences[1]], params := scoring_params())
    assert_scores(with_engine.score(sequences, STARTS), expected)
    assert with_engine.generate([sequences[1]], params) == before, "the engine generates as it did"


def scoring_params() -> object:
    from xbai.engine import SamplingParams

    return SamplingParams(max_tokens=8, temperature=0.0, log_probs=True)


def test_random_sequences_with_common_beginnings(
    scorer: Scorer, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    draw, step = random.Random(0), scorer.step_rule.step_ids[0]
    sequences = [[step]]
    for _ in range(30):
        begun = draw.choice(sequences)[: draw.randint(0, 60)]
        added = [draw.choice([step, draw.randint(1, 200), draw.randint(1, 200)]) for _ in range(draw.randint(1, 60))]
        sequences.append(begun + added)
    starts = [draw.randint(0, len(ids)) for ids in sequences]
    together = scorer.new_batch()
    assert all(together.add(ids, start) for ids, start in zip(sequences, starts, strict=True))
    assert len(together.packed) < 0.8 * sum(map(len, sequences))
    expected = plain_scores(tiny_model_dir, tiny_tokenizer, sequences, starts)
    assert_scores(scorer.run(together), expected)


def test_a_prefix_is_computed_once_and_nothing_after_the_last_step(scorer: Scorer) -> None:
    step = scorer.step_rule.step_ids[0]
    batch = scorer.new_batch()
    assert batch.add([5, 6, 7, step, 8, 9], 0)
    assert len(batch.packed) == 3
    assert batch.add([5, 6, 7, step, 8, step], 0)
    assert len(batch.packed) == 5
    assert batch.add([5, 6, 7, step, 8, step], 0)
    assert batch.add([5, 6], 0)
    assert len(batch.packed) == 5


def test_a_full_batch_takes_no_more_and_a_long_sequence_goes_alone(tiny_model_dir: Path) -> None:
    small = Scorer.from_folder(tiny_model_dir, max_batch_tokens=8)
    step = small.step_rule.step_ids[0]
    batch = small.new_batch()
    assert batch.add([*range(1, 13), step], 0)
    assert not batch.add([20, step], 0)
    assert len(small.run(batch)) == 1


def test_an_mlp_in_chunks_computes_the_same(
    scorer: Scorer, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scorer.score(sequences, STARTS)
    monkeypatch.setattr(scorer_module, "CHUNK_TOKENS", 7)
    assert_scores(scorer.score(sequences, STARTS), [result.step_scores for result in whole], 1e-6)


def test_a_model_that_cannot_be_packed_scores_one_by_one(
    tiny_model_dir: Path, sequences: list[list[int]], scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "why_not_packed", lambda model: "it is of another kind")
    single = Scorer.from_folder(tiny_model_dir, dtype="float32")
    batch = single.new_batch()
    assert batch.add(sequences[0], 0) and not batch.add(sequences[1], 0)
    expected = [result.step_scores for result in scorer.score(sequences, STARTS)]
    assert_scores(single.score(sequences, STARTS), expected)


@pytest.mark.parametrize(
    ("config_class", "options", "reason"),
    [
        (Gemma2Config, {}, "caps its scores"),
        (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None}, "has sinks"),
    ],
)
def test_attention_of_other_kinds_scores_one_by_one(
    config_class: type[PreTrainedConfig],
    options: dict,
    reason: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    sequences: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = {"vocab_size": len(tiny_tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512}
    tokens = {"bos_token_id": None, "eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_class(**sizes, **heads, **tokens, **options)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    save_score_head(tmp_path, ScoreHead(64).state_dict(), SPRMConfig(StepRule.from_tokenizer(tiny_tokenizer)))
    monkeypatch.setattr(scorer_module, "CHUNK_TOKENS", 7)
    found = Scorer.from_folder(tmp_path, dtype="float32").score(sequences, STARTS)
    assert reason in caplog.text
    assert_scores(found, plain_scores(tmp_path, tiny_tokenizer, sequences, STARTS))


def test_last_layer_and_lm_head_are_not_loaded(scorer: Scorer) -> None:
    names = [name for name, _ in scorer.backbone.named_parameters()]
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}
    assert {name.split(".")[0] for name in names} == {"embed_tokens", "layers"}


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_close_to_32(scorer: Scorer, tiny_model_dir: Path, sequences: list[list[int]], dtype: str) -> None:
    half = Scorer.from_folder(tiny_model_dir, dtype=dtype)
    assert {parameter.dtype for parameter in half.backbone.parameters()} == {getattr(torch, dtype)}
    for exact, rounded in zip(scorer.score(sequences, STARTS), half.score(sequences, STARTS), strict=True):
        assert rounded.value == pytest.approx(exact.value, abs=0.02)
