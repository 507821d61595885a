"""A model, rows and settings that ranks on CPU are done with at once; test modules are also their ranks' programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from verl.trainer.config.compose import compose_config
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import YAML, ActorRolloutRefConfig, AdamConfig, PPOConfig, TrainedPlacement
from verl.trainer.config.validation import validated

VOCABULARY, PROMPT, RESPONSE = 40, 6, 10
PROMPT_LENGTHS, RESPONSE_LENGTHS = (3, 5, 4, 2, 1, 5, 3, 4), (4, 9, 1, 7, 6, 8, 2, 9)
ROWS = len(PROMPT_LENGTHS)


def tiny_lm(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """A random Qwen3 whose tokens matter to each other; `changes` are of its configuration."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.15,
    }
    return Qwen3ForCausalLM(Qwen3Config(**shape | changes))


def padded_rows(generator: Generator) -> dict[str, Tensor]:
    """Model inputs [ROWS, PROMPT + RESPONSE] and `response_mask` of random rows of unequal lengths."""
    columns = torch.arange(PROMPT + RESPONSE)
    prompts, responses = (torch.tensor(lengths)[:, None] for lengths in (PROMPT_LENGTHS, RESPONSE_LENGTHS))
    attention_mask = (columns >= PROMPT - prompts) & (columns < PROMPT + responses)
    return {
        "input_ids": torch.randint(1, VOCABULARY, attention_mask.shape, generator=generator) * attention_mask,
        "attention_mask": attention_mask.long(),
        "position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0),
        "response_mask": attention_mask[:, PROMPT:],
    }


def ppo_config(overrides: Sequence[str]) -> PPOConfig:
    """The defaults with overrides; nothing is looked for on this machine."""
    return validated(PPOConfig, compose_config(YAML, overrides), YAML)


@cache
def ppo_defaults(*overrides: str) -> PPOConfig:
    """`ppo_config` without data and a model, for what needs a section of it."""
    return ppo_config(["data.train_files=none", "actor_rollout_ref.model.path=none", *overrides])


def adam(**changes: Any) -> AdamConfig:
    """An optimiser for a few steps."""
    return with_values(ppo_defaults().critic.optim, {"lr": 1e-3, **changes})


def fsdp_section(**changes: Any) -> TrainedPlacement:
    """How a trained model is placed."""
    return with_values(ppo_defaults().actor_rollout_ref.actor.fsdp_config, changes)


def policy_section(changes: Mapping[str, Any]) -> ActorRolloutRefConfig:
    """The policy's settings, without a KL to a reference unless `changes` has one."""
    small = {"actor.use_kl_loss": False, "actor.optim.lr": 1e-3, "score.optim.lr": 1e-3}
    return with_values(ppo_defaults().actor_rollout_ref, small | dict(changes))


def lasting(metrics: Mapping[str, float]) -> dict[str, float]:
    """What was logged of a step that does not depend on the clock."""
    return {name: value for name, value in metrics.items() if not name.startswith(("timing_s/", "perf/"))}
