"""Scores that come with the tokens are those of a pass over the finished sequences, whatever the scheduler does."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from xbai.engine import Engine, SamplingParams, Scorer, load_engine
from xbai.errors import UserError
from xbai.sprm import (
    HiddenStateTap,
    ScoreHead,
    SPRMConfig,
    StepRule,
    aggregate,
    load_score_head,
    load_sprm_config,
    observed_inputs,
    save_score_head,
    shift_head,
    standardize_head,
)

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

MAX_MODEL_LEN = 512
CACHE_BLOCKS, BLOCK_TOKENS = 10, 128
STEP_IDS = tuple(range(40, 90))
NO_TAG = -1
"""No token: random responses do not end their thinking."""
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.fixture(scope="module")
def make_model(tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_model(config_class, tied=False, seed=0, opinion=3.0, dtype=float32) -> folder`: random, of tokens that are
    about equally likely, many of which end a step; the more of an opinion its head has, the further its scores are from
    one half."""

    def make(
        config_class: type[PreTrainedConfig],
        tied: bool = False,
        seed: int = 0,
        opinion: float = 3.0,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        config = config_class(
            vocab_size=len(tiny_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=MAX_MODEL_LEN,
            tie_word_embeddings=tied,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=tiny_tokenizer.eos_token_id,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
        folder = tmp_path_factory.mktemp(config.model_type)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            model.model.norm.weight.data *= 0.1
            head = {name: opinion * weight for name, weight in ScoreHead(64).state_dict().items()}
        model.to(dtype).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        save_score_head(folder, head, SPRMConfig(StepRule("en", STEP_IDS, NO_TAG, NO_TAG)))
        return folder

    return make


def crowded_engine(folder: Path, dtype: str = "float32", **options: Any) -> Engine:
    """An engine whose cache holds a few sequences, and whose iterations hold a prompt and a piece of another."""
    config = AutoConfig.from_pretrained(folder)
    bytes_per_token = 2 * config.num_hidden_layers * config.head_dim * getattr(torch, dtype).itemsize
    return load_engine(
        "vllm",
        folder,
        dtype=dtype,
        kv_cache_memory_bytes=CACHE_BLOCKS * BLOCK_TOKENS * bytes_per_token,
        max_num_batched_tokens=MAX_MODEL_LEN,
        enable_chunked_prefill=True,
        **options,
    )


def differences(engine: Engine, scorer: Scorer, count: int = 16, most_tokens: int = 180) -> tuple[float, float]:
    """The largest difference of a step's and of a response's score between the engine and `scorer`."""
    generator = random.Random(0)
    common = [generator.randrange(5, 200) for _ in range(BLOCK_TOKENS + 20)]
    requests = []
    for number in range(count):
        prompt = common[: generator.randrange(1, len(common))] + [5 + number] * generator.randrange(1, 90)
        # Among requests that want neither scores nor log-probs, or both.
        params = SamplingParams(
            n=2, max_tokens=generator.randrange(1, most_tokens), ignore_eos=True, log_probs=number % 3 == 0
        )
        samples = engine.samples(prompt, params, return_scores=number % 4 != 3)
        for sample in samples:
            engine.add(sample)
        requests.append((prompt, params, samples))
    results = {}
    while engine.has_unfinished():
        results.update(engine.step())
    of_steps, of_responses, values = [], [], []
    for number, (prompt, params, samples) in enumerate(requests):
        sampled = [results[sample] for sample in samples]
        assert all((one.log_probs is not None) == params.log_probs for one in sampled)
        if number % 4 == 3:
            assert all(one.step_scores is one.step_ends is one.step_log_probs is None for one in sampled)
            continue
        expected = scorer.score([prompt + one.token_ids for one in sampled], [len(prompt)] * len(sampled))
        for one, other in zip(sampled, expected, strict=True):
            assert [len(prompt) + end - 2 for end in one.step_ends] == other.positions
            assert len(one.step_scores) == len(one.step_ends)
            assert (one.step_log_probs is not None) == params.log_probs
            of_steps += [abs(a - b) for a, b in zip(one.step_scores, other.step_scores)]
            of_responses.append(abs(aggregate(one.step_scores) - other.value))
            values += one.step_scores
    assert len(values) > 40
    assert torch.tensor(values).std() > 0.04
    return max(of_steps), max(of_responses)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.long) for name in ("llama", "qwen2")), "qwen3"]
)
def test_scores_of_a_crowded_engine_are_those_of_a_second_pass(
    make_model: Callable[..., Path], preemptions: list[str], name: str
) -> None:
    tied = name == "qwen2"
    folder = make_model(CONFIGS[name], tied)
    engine = crowded_engine(folder)
    assert max(differences(engine, Scorer.from_folder(folder))) < 1e-4
    assert preemptions
    assert engine.cached_prompt_tokens
    assert engine.scorer is None

    other = make_model(CONFIGS[name], tied, seed=1)
    head = torch.load(other / "score_module.pt", weights_only=True)
    weights = dict(AutoModelForCausalLM.from_pretrained(other).named_parameters())
    weights |= {f"score_head.{name}": weight for name, weight in head.items()}
    engine.update_weights(weights.items(), check=True)
    scorer = Scorer.from_folder(other)
    assert max(differences(engine, scorer)) < 1e-4
    # Of a sequence that was not generated, by a scorer that begins with the weights the engine has now.
    sequence = list(range(5, 200))
    assert engine.score([sequence], [3])[0].step_scores == pytest.approx(scorer.score([sequence], [3])[0].step_scores)
    engine.close()


def test_a_standardised_head_scores_alike_in_engine_and_scorer(make_model: Callable[..., Path]) -> None:
    """Of a model that has a huge coordinate, by a head that makes up for it."""
    folder = make_model(Qwen3Config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.embed_tokens.weight.data[:, 7] += 40.0
    model.save_pretrained(folder)
    config = load_sprm_config(folder, None)
    head = load_score_head(folder, 64, config)
    ids = torch.randint(5, 200, (4, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), HiddenStateTap(model) as tap, observed_inputs(head) as moments:
        model.model(input_ids=ids)
        features = tap.take()
        assert ((before := head(features)) > 0).all() or (before < 0).all()
    assert moments.standardization.mean[7] > 20 * moments.standardization.deviation[7]
    standardize_head(head, moments)
    with torch.no_grad():
        shift_head(head, -head(features).mean().item())
    save_score_head(folder, head.state_dict(), config)
    engine = crowded_engine(folder)
    assert max(differences(engine, Scorer.from_folder(folder), count=6, most_tokens=60)) < 1e-4
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_of_a_compiled_model(make_model: Callable[..., Path], preemptions: list[str], name: str) -> None:
    folder = make_model(CONFIGS[name])
    engine = crowded_engine(folder, enforce_eager=False)
    assert engine._llm.vllm_config.compilation_config.mode, "vLLM compiles"
    assert max(differences(engine, Scorer.from_folder(folder))) < 1e-4
    assert preemptions
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("processes", [1, 2])
def test_scores_of_an_engine_in_processes_of_its_own(
    make_model: Callable[..., Path], name: str, processes: int
) -> None:
    folder = make_model(CONFIGS[name])
    engine = crowded_engine(folder, tensor_parallel_size=processes, distributed_executor_backend="mp")
    assert len(engine._worker_processes) == processes
    # Two processes meet many times a token, each spinning while it waits for a core: a token takes up to a second.
    assert max(differences(engine, Scorer.from_folder(folder), most_tokens=50)) < 1e-4
    with pytest.raises(UserError, match="only an engine of ranks that share a process group takes new ones"):
        engine.update_weights(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    engine.close()


@pytest.mark.parametrize(("opinion", "tolerance"), [pytest.param(1.0, 1e-2, marks=pytest.mark.long), (3.0, 9e-2)])
def test_scores_in_half_precision(make_model: Callable[..., Path], opinion: float, tolerance: float) -> None:
    """Of a head as training begins with it, the two ways to compute a response's score agree within 1e-2.

    Neither is the right one: each rounds the features to 8 bits in an order of its own, and is as far from what float32
    makes of the same weights as the other. Three times the head's weights are nine times the slope on those features.
    """
    folder = make_model(Qwen3Config, opinion=opinion, dtype=torch.bfloat16)
    engine = crowded_engine(folder, "bfloat16")
    reference, exact = (Scorer.from_folder(folder, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert differences(engine, reference, most_tokens=50)[1] < tolerance
    assert differences(engine, exact, most_tokens=50)[1] < tolerance
    engine.close()


def test_a_model_that_cannot_score_as_it_generates_takes_a_second_pass(
    make_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model(MistralConfig)
    engine = crowded_engine(folder)
    assert "second forward pass: MistralForCausalLM is none of Llama" in caplog.text
    assert max(differences(engine, Scorer.from_folder(folder), count=6)) < 1e-4
    assert engine.scorer is not None
    engine.close()
