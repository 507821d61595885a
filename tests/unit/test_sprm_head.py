"""The score head's published form and its files."""

import json

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from xbai.errors import UserError
from xbai.sprm import HiddenStateTap, ScoreHead, SPRMConfig, StepRule, load_score_head, save_score_head
from xbai.sprm.head import load_sprm_config

CONFIG = SPRMConfig(StepRule("en", (3,), 4, 5, "<|im_start|>assistant\n"))


@pytest.mark.parametrize(("hidden_size", "millions"), [(1536, 4.7), (5120, 52.4)])
def test_published_sizes_and_keys(hidden_size, millions):
    with torch.device("meta"):
        head = ScoreHead(hidden_size)
    assert list(head.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_head_computes_the_published_formula():
    head = ScoreHead(8).eval()
    x = torch.randn(2, 5, 8)
    hidden = torch.relu(x @ head[0].weight.T + head[0].bias)
    assert torch.allclose(head(x), (hidden @ head[3].weight.T + head[3].bias)[..., 0], atol=1e-6)
    assert head(x.bfloat16()).dtype == torch.float32


def test_normalised_features_make_the_scale_irrelevant():
    head = ScoreHead(8, normalize_features=True).eval()
    x = torch.randn(4, 8)
    assert torch.allclose(head(x), head(100 * x), atol=1e-4)


def test_round_trip_beside_a_model(tmp_path):
    head = ScoreHead(8).eval()
    save_score_head(tmp_path, head.state_dict(), CONFIG)
    assert load_sprm_config(tmp_path, tokenizer=None) == CONFIG
    loaded = load_score_head(tmp_path, 8, CONFIG)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), head(x))
    assert not loaded.training


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"score_module\.pt: no such file"):
        load_score_head(tmp_path, 8, CONFIG)
    save_score_head(tmp_path, ScoreHead(16).state_dict(), CONFIG)
    with pytest.raises(UserError, match=r"score_module\.pt: expected a score head of shapes"):
        load_score_head(tmp_path, 8, CONFIG)
    with pytest.raises(UserError, match="trained with lang=en"):
        load_sprm_config(tmp_path, tokenizer=None, lang="zh")
    (tmp_path / "sprm_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"sprm_config\.json: not a valid"):
        load_sprm_config(tmp_path, tokenizer=None)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(tmp_path, kept):
    save_score_head(tmp_path, ScoreHead(8).state_dict(), CONFIG)
    path = tmp_path / "score_module.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=r"score_module\.pt: cut off, or no state dict"):
        load_score_head(tmp_path, 8, CONFIG)


@pytest.mark.parametrize("content", [[1, 2], {"0.weight": 1.0}, ScoreHead(8)])
def test_a_file_of_something_else_is_named(tmp_path, content):
    torch.save(content, tmp_path / "score_module.pt")
    with pytest.raises(UserError, match=r"score_module\.pt: cut off, or no state dict"):
        load_score_head(tmp_path, 8, CONFIG)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "3.weight", "3.bias"])
def test_weights_that_are_not_finite_are_named(tmp_path, name, value):
    weights = ScoreHead(8).state_dict()
    weights[name].view(-1)[-1] = value
    save_score_head(tmp_path, weights, CONFIG)
    with pytest.raises(UserError, match=rf"^{tmp_path}/score_module.pt: {name} holds weights that are not finite"):
        load_score_head(tmp_path, 8, CONFIG)


def changed(**changes):
    return {**CONFIG.to_dict(), **changes}


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        {},
        {"step_rule": []},
        {"step_rule": {}},
        changed(dropout="half"),
        changed(dropout=7),
        changed(dropout=True),
        changed(normalize_features="no"),
        changed(more=1),
        changed(step_rule={**CONFIG.step_rule.to_dict(), "step_ids": "abc"}),
        changed(step_rule={**CONFIG.step_rule.to_dict(), "step_ids": [None]}),
        changed(step_rule={**CONFIG.step_rule.to_dict(), "step_ids": [1.5]}),
        changed(step_rule={**CONFIG.step_rule.to_dict(), "think_open_id": "<think>"}),
        changed(step_rule={**CONFIG.step_rule.to_dict(), "lang": ["en"]}),
        changed(step_rule={**CONFIG.step_rule.to_dict(), "generation_prompt": None}),
    ],
)
def test_a_configuration_of_another_form_is_named(tmp_path, content):
    (tmp_path / "sprm_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{tmp_path}/sprm_config.json: not a valid SPRM configuration") as refused:
        load_sprm_config(tmp_path, tokenizer=None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tap_reads_the_penultimate_hidden_state(checkpointing):
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 32, (2, 7))
    expected = model(ids, output_hidden_states=True).hidden_states[-2]
    with HiddenStateTap(model) as tap:
        model(ids)
        captured = tap.take()
        with pytest.raises(RuntimeError):
            tap.take()
    assert torch.equal(captured, expected)
    assert captured.requires_grad
