"""Loading the joint model, and its one forward pass against transformers' own."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import adam
from transformers import PreTrainedTokenizerFast

from verl.models.fsdp import named_full_tensors
from verl.models.joint_model import JointModel
from verl.models.loading import build_joint_model, load_tokenizer, torch_dtype
from verl.models.packing import padded_layout
from verl.optim.optimizers import JointOptimizer, build_optimizer, build_schedule
from xbai.errors import UserError
from xbai.sprm import SPRMConfig, load_sprm_config


@pytest.fixture
def sprm_config(tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> SPRMConfig:
    return load_sprm_config(tiny_model_dir, tiny_tokenizer)


@pytest.fixture
def model(tiny_model_dir: Path, sprm_config: SPRMConfig) -> JointModel:
    return build_joint_model(tiny_model_dir, sprm_config=sprm_config).eval()


def forward(model: JointModel, **options: object) -> object:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 200, (2, 9), generator=generator)
    features = torch.zeros(2, 9, dtype=torch.bool)
    features[0, [4, 6]] = True
    layout = padded_layout(
        {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "position_ids": torch.arange(9).expand(2, -1),
            "response_mask": torch.ones(2, 5),
            "step_feature_mask": features,
        }
    )
    return model(layout, **options), input_ids, features


def test_one_pass_gives_what_transformers_gives(model: JointModel) -> None:
    output, input_ids, features = forward(model, temperature=0.5, compute_entropy=True)
    plain = model.lm(input_ids, output_hidden_states=True)
    log_softmax = (plain.logits[:, 3:-1] / 0.5).log_softmax(-1)
    log_probs = log_softmax.gather(-1, input_ids[:, 4:, None]).squeeze(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    torch.testing.assert_close(output.log_probs, log_probs.flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy, entropy.flatten(), rtol=1e-5, atol=1e-5)
    step_logits = model.score_head(plain.hidden_states[-2])[features]
    torch.testing.assert_close(output.step_logits, step_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-2])
def test_backbone_grad_scale_acts_on_the_backbone_only(model: JointModel, scale: float) -> None:
    def gradients(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        forward(model, backbone_grad_scale=scale)[0].step_logits.sum().backward()
        return model.lm.model.embed_tokens.weight.grad.clone(), model.score_head[0].weight.grad.clone()

    full, scaled = gradients(1.0), gradients(scale)
    assert full[0].abs().sum() > 0
    torch.testing.assert_close(scaled[0], full[0] * scale)
    torch.testing.assert_close(scaled[1], full[1])


def test_rows_without_tokens_and_steps_give_zero_gradients(model: JointModel) -> None:
    ids, nothing = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 4)
    batch = {"input_ids": ids, "attention_mask": ids, "position_ids": torch.arange(4)[None]}
    output = model(padded_layout({**batch, "response_mask": nothing[:, :2], "step_feature_mask": nothing}))
    (output.log_probs.sum() + output.step_logits.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_that_pads_is_trained_as_any_other(tied: bool, make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model(tied=tied)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = torch.tensor([[5, 9, 2, 7, 2], [3, 2, 8, 4, 6]])
    gradients = {}
    for pad in (2, 7, 11, None):
        (folder / "config.json").write_text(
            json.dumps({**config, "eos_token_id": 2, "pad_token_id": pad}), encoding="utf-8"
        )
        lm = build_joint_model(folder).lm
        lm(input_ids=rows, labels=rows).loss.backward()
        gradients[pad] = lm.get_input_embeddings().weight.grad
    assert gradients[None][[2, 7]].norm(dim=-1).min() > 1e-3
    assert all(torch.equal(gradient, gradients[None]) for gradient in gradients.values())


def test_names_for_weight_sync(model: JointModel, make_tiny_model: Callable[..., Path]) -> None:
    lm_names = {name for name, _ in model.lm.named_parameters()}
    names = dict(named_full_tensors(model, dtype=torch.bfloat16))
    assert names.keys() == lm_names | {f"score_head.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")}
    assert names["lm_head.weight"].dtype == torch.bfloat16
    assert names["score_head.0.weight"].dtype == torch.float32
    tied = build_joint_model(make_tiny_model(tied=True))
    assert "lm_head.weight" not in dict(named_full_tensors(tied))


def test_a_fresh_head_is_the_same_on_every_rank(tiny_model_dir: Path, sprm_config: SPRMConfig, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_model_dir / name)
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(build_joint_model(tmp_path, sprm_config=sprm_config).score_head)
    assert torch.equal(heads[0][0].weight, heads[1][0].weight)


def test_what_cannot_be_loaded_is_one_clear_line(tiny_model_dir: Path, sprm_config: SPRMConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; give a local"):
        build_joint_model(tmp_path)
    (tmp_path / "config.json").symlink_to(tiny_model_dir / "config.json")
    with pytest.raises(UserError, match=r"no model that transformers can load .*no file named model\.safetensors"):
        build_joint_model(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"score\.channel=1536, but the hidden size .* is 64"):
        build_joint_model(tiny_model_dir, sprm_config=sprm_config, channel=1536)
    with pytest.raises(UserError, match="'int8' is unknown"):
        torch_dtype("int8")


def rates(steps: int, total_steps: int | None = None, **changes: object) -> list[float]:
    config = adam(lr=1.0, **changes)
    optimizer = build_optimizer([("weight", torch.nn.Parameter(torch.zeros(1)))], config)
    schedule = build_schedule(optimizer, config, total_steps)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_schedules() -> None:
    assert rates(3) == [1.0, 1.0, 1.0]
    assert rates(4, lr_warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]
    assert rates(4, lr_warmup_steps_ratio=0.4, total_steps=10) == [0.25, 0.5, 0.75, 1.0]
    cosine = rates(6, warmup_style="cosine", min_lr_ratio=0.2, total_steps=4)
    assert cosine == pytest.approx([1.0, 0.2 + 0.8 * 0.853553, 0.6, 0.2 + 0.8 * 0.146447, 0.2, 0.2], abs=1e-5)
    assert rates(5, warmup_style="cosine", num_cycles=1, total_steps=4)[-1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="need total_steps"):
        rates(1, warmup_style="cosine")


def test_an_eight_bit_optimizer_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"optim\.name=Adam8bit needs torchao"):
        build_optimizer([], adam(name="Adam8bit"))


@pytest.mark.parametrize("poisoned", ["lm", "score_head"])
def test_a_gradient_that_is_not_finite_skips_both_updates(
    model: JointModel, poisoned: str, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = JointOptimizer(model, adam(lr=1.0), adam(lr=1.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(getattr(model, poisoned).parameters()).grad[0] = float("nan")
    with caplog.at_level(logging.WARNING):
        assert optimizer.step(max_norm=1.0)["skipped"] == 1
    assert "update skipped" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    metrics = optimizer.step(max_norm=1.0)
    assert metrics["skipped"] == 0
    assert metrics["grad_norm/score"] == pytest.approx(sum(p.numel() for p in model.score_head.parameters()) ** 0.5)
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
