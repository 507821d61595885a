"""Batching of the transformers engine, and its sampler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xbai.engine import SamplingParams, load_engine
from xbai.engine.hf.sampling import BatchSampler
from xbai.engine.sample import Sample


def sampler(seeds: range, vocab_size: int, **params: float) -> BatchSampler:
    chosen = SamplingParams(max_tokens=4, **params)
    samples = [Sample(f"r/{seed}", seed, [0], chosen, seed) for seed in seeds]
    return BatchSampler(samples, vocab_size, torch.device("cpu"))


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, float("-inf")])
    tokens, log_probs = sampler(range(4000), 4, temperature=0.5)(logits.expand(4000, 4))
    expected = (logits / 0.5).softmax(-1)
    assert tokens.bincount(minlength=4) / 4000 == pytest.approx(expected, abs=0.03)
    assert log_probs.exp() == pytest.approx(expected[tokens], abs=1e-6)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {2, 3}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.7}, {2, 3}),
        ({"top_p": 0.7, "top_k": 1}, {3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep_the_most_likely(params: dict, kept: set[int]) -> None:
    logits = torch.tensor([0.1, 0.1, 0.2, 0.6]).log()
    tokens, log_probs = sampler(range(300), 4, **params)(logits.expand(300, 4))
    assert set(tokens.tolist()) == kept
    assert log_probs == pytest.approx(logits[tokens], abs=1e-6)


def test_repetition_penalty_acts_on_prompt_and_response() -> None:
    penalized = sampler(range(1), 3, temperature=0, repetition_penalty=2.0)
    logits = torch.tensor([[3.0, 2.0, -1.0]])
    # Token 0 is the prompt's: 3 / 2 < 2. Then token 1 is seen too: 2 / 2 < 3 / 2.
    assert [penalized(logits)[0].item() for _ in range(2)] == [1, 0]


def test_budgets_split_the_queue_without_changing_results(tiny_model_dir: Path) -> None:
    prompts = [[1] * 5, [2] * 9, [3], [4, 5]]
    params = SamplingParams(n=3, max_tokens=12, seed=1)
    whole = load_engine("hf", tiny_model_dir).generate(prompts, params)
    for budget in ({"max_num_seqs": 2}, {"max_cache_slots": 50}, {"max_cache_slots": 1}):
        assert load_engine("hf", tiny_model_dir, **budget).generate(prompts, params) == whole


def test_finished_rows_leave_the_batch(tiny_model_dir: Path) -> None:
    engine = load_engine("hf", tiny_model_dir)
    rows: list[int] = []
    handle = engine._model.register_forward_hook(lambda module, args, output: rows.append(output.logits.shape[0]))
    lengths = [2, 2, 4, 20]
    params = [SamplingParams(max_tokens=length, ignore_eos=True, seed=1) for length in lengths]
    results = engine.generate([[1], [2, 3], [4], [5, 6, 7]], params)
    handle.remove()
    assert [len(completions[0].token_ids) for completions in results] == lengths
    assert rows == [4] * 2 + [2] * 2 + [1] * 16


def test_bfloat16_generates_and_scores(tiny_model_dir: Path) -> None:
    engine = load_engine("hf", tiny_model_dir, dtype="bfloat16")
    [[completion]] = engine.generate([[1, 2]], SamplingParams(max_tokens=5, log_probs=True), return_scores=True)
    assert len(completion.log_probs) == len(completion.token_ids)
    assert completion.step_scores is not None
