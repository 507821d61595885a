"""The models that bench/serving.py measures, and what is put to them; all of it random, and the same every time."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from xbai.benchmarks.tiny_model import make_tokenizer, write_tiny_model
from xbai.engine.files import read_config
from xbai.sprm import ScoreHead, SPRMConfig, StepRule, save_score_head

MODELS = ("tiny", "0.5b")
TOKENS_PER_STEP = 16
LETTERS = "bcdfghjklmnpqrstvwxz"
"""Each is a token by itself: none of the tokenizer's words is written with them alone."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured of a model.

    Attributes:
        prompts: of a call of `generate`, one response each.
        prompt_tokens, response_tokens: of each, also of a request to the policy service.
        repeats: turns of the ways to generate.
        text_tokens: shortest and longest text to score.
        texts: least of a round, and of a client one.
        rounds: turns of the score service and the reference, at each number of clients.
        requests: least to the policy service at each number of clients, and of a client two.
    """

    prompts: int
    prompt_tokens: int
    response_tokens: int
    repeats: int
    text_tokens: tuple[int, int]
    texts: int
    rounds: int
    requests: int


ON_GPU = Sizes(64, 128, 256, 12, (200, 600), 64, 5, 64)
ON_CPU = {
    "tiny": Sizes(16, 32, 96, 16, (200, 600), 96, 5, 64),
    "0.5b": Sizes(8, 32, 24, 16, (32, 96), 4, 3, 8),
}


def default_sizes(model: str) -> Sizes:
    """Sizes that this kind of machine gets through in a few minutes."""
    return ON_GPU if torch.cuda.is_available() else ON_CPU[model]


def write_model(name: str, folder: Path) -> None:
    """Save a model with a score head for which about every 16th token ends a step."""
    tokenizer = make_tokenizer()
    if name == "tiny":
        write_tiny_model(folder)
    else:
        config = Qwen2Config(
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=32_768,
            rope_theta=1_000_000.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = read_config(folder)
    rule = replace(
        StepRule.from_tokenizer(tokenizer),
        step_ids=tuple(range(TOKENS_PER_STEP - 1, config.vocab_size, TOKENS_PER_STEP)),
    )
    torch.manual_seed(1)
    # Three times as sure as at the start of a training, so that the scores of two texts differ.
    head = {name: 3 * weight for name, weight in ScoreHead(config.hidden_size).state_dict().items()}
    save_score_head(folder, head, SPRMConfig(rule))


def random_prompt_ids(vocabulary: int, count: int, tokens: int) -> list[list[int]]:
    """Prompts of random token ids."""
    rng = random.Random(0)
    return [[rng.randrange(vocabulary) for _ in range(tokens)] for _ in range(count)]


def random_text(rng: random.Random, tokens: int) -> str:
    """A text of so many tokens, without a chat header: all of it is scored."""
    return "".join(rng.choices(LETTERS, k=tokens))
