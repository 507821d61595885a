"""Which models score as they generate, and how a response's steps are found among its tokens."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, Qwen2Config, Qwen3Config

from xbai.engine.files import read_config
from xbai.engine.fused_scores import FusedHead, obstacle
from xbai.errors import UserError
from xbai.model_folder import load_tokenizer
from xbai.sprm import SPRMConfig, StepRule, load_sprm_config
from xbai.sprm.steps import step_scores

RULE = StepRule("en", step_ids=(7,), think_open_id=1, think_close_id=2)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({}, None),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "model_impl": "vllm"}, None),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config"),
        ({"enable_lora": True}, "enable_lora"),
        ({"model_impl": "transformers"}, "model_impl"),
    ],
)
def test_what_changes_the_forward_pass_is_named(options: dict, culprit: str | None) -> None:
    config = Qwen2Config(architectures=["Qwen2ForCausalLM"])
    expected = None if culprit is None else f"{culprit} changes the forward pass"
    assert obstacle(config, options) == expected


def test_models_without_a_fused_class_and_without_a_layer_to_read_are_named() -> None:
    assert obstacle(MistralConfig(architectures=["MistralForCausalLM"]), {}).startswith("MistralForCausalLM is none of")
    assert obstacle(Qwen3Config(architectures=["Qwen3ForCausalLM"], num_hidden_layers=1), {}) is not None


def test_the_head_travels_in_arguments_beside_those_of_the_user(tiny_model_dir: Path) -> None:
    config = read_config(tiny_model_dir)
    head = FusedHead(load_sprm_config(tiny_model_dir, load_tokenizer(tiny_model_dir)), str(tiny_model_dir))
    options = {"hf_overrides": {"rope_theta": 5}, "additional_config": {"mine": 1}}
    arguments = head.engine_arguments(config, options)
    assert arguments["hf_overrides"] == {"rope_theta": 5, "architectures": ["FusedQwen3ForCausalLM"]}
    assert arguments["additional_config"]["mine"] == 1
    assert FusedHead.from_additional_config(arguments["additional_config"]) == head


@pytest.mark.parametrize("from_folder", [False, True])
def test_the_head_is_float32_whatever_the_model_is_built_in(tiny_model_dir: Path, from_folder: bool) -> None:
    sprm_config = load_sprm_config(tiny_model_dir, load_tokenizer(tiny_model_dir))
    torch.set_default_dtype(torch.bfloat16)
    try:
        head = FusedHead(sprm_config, str(tiny_model_dir) if from_folder else None).build(64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in head.parameters()} == {torch.float32}
    if from_folder:
        stored = torch.load(tiny_model_dir / "score_module.pt", weights_only=True)
        assert all(torch.equal(weight, stored[name]) for name, weight in head.state_dict().items())


def test_a_head_of_another_size_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match="expected a score head of shapes"):
        FusedHead(SPRMConfig(RULE), str(tiny_model_dir)).build(65)


@pytest.mark.parametrize(
    ("prompt_ids", "token_ids", "steps"),
    [
        ([5], [5, 7], [1]),
        ([7], [7, 5, 7, 7, 5], [2]),
        ([5, 5], [5, 7, 1, 7, 5, 7, 2, 5, 7], [5]),
        ([5, 1], [5, 7, 2, 5, 7], [1]),
        ([5, 1, 2], [5, 7, 1, 5, 7, 2, 5, 7], [4]),
        ([5], [5], []),
    ],
)
def test_the_score_of_a_step_came_with_its_token(prompt_ids: list[int], token_ids: list[int], steps: list[int]) -> None:
    step_logits = [0.5 * position - 1 for position in range(len(token_ids))]
    expected = torch.tensor([step_logits[position] for position in steps]).sigmoid().tolist()
    scores, ends = step_scores(prompt_ids, token_ids, step_logits, RULE)
    assert scores == pytest.approx(expected)
    assert ends == [position + 1 for position in steps]


def test_vllm_finds_the_models_in_each_of_its_processes() -> None:
    plugins = {plugin.name: plugin.value for plugin in entry_points(group="vllm.general_plugins")}
    assert plugins["xbai"] == "xbai.engine.fused_scores:register_models"
