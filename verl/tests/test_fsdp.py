"""Loading and sharding: what a model is loaded in, kept in and computes with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import adam, fsdp_section
from transformers import AutoModelForCausalLM

from verl.models.fsdp import create_mesh, named_full_tensors, shard_model
from verl.models.loading import attention_for, build_joint_model, loading_dtype
from verl.models.packing import padded_layout
from verl.optim.optimizers import JointOptimizer
from verl.workers.placed_model import PlacedModel

IDS = torch.arange(1, 9)[None]
BATCH = {
    "input_ids": IDS,
    "attention_mask": torch.ones_like(IDS),
    "position_ids": torch.arange(8)[None],
    "response_mask": torch.ones(1, 7, dtype=torch.bool),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sixteen_bits_are_widened_after_sharding(
    process_group: None, make_tiny_model: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(make_tiny_model(tied=tied), dtype=torch.bfloat16).save_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = build_joint_model(folder, loading_dtype(folder, torch.float32))
    assert model.lm.dtype == torch.bfloat16
    model = shard_model(model, create_mesh(), stored_dtype=torch.float32).eval()
    assert model.lm.config.dtype == torch.float32
    found = dict(named_full_tensors(model))
    assert found.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.named_parameters())

    log_probs = model(padded_layout(BATCH)).log_probs
    logits = expected(IDS).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(log_probs, logits.gather(-1, IDS[0, 1:, None]).squeeze(-1))
    log_probs.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_what_is_not_trained_stays_as_it_was_loaded(
    process_group: None, tiny_model_dir: Path, tmp_path: Path, compute: str
) -> None:
    folder, fsdp_config = tmp_path / "half", fsdp_section(compute_dtype=compute)
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(folder)
    models = [build_joint_model(folder, loading_dtype(folder, torch.float32)) for _ in range(2)]
    frozen = PlacedModel(models[0], fsdp_config).model.eval()
    widened = PlacedModel(models[1], fsdp_config, lambda model: JointOptimizer(model, adam(lr=1.0))).model.eval()
    assert {weight.dtype for weight in frozen.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in widened.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(frozen(padded_layout(BATCH)).log_probs, widened(padded_layout(BATCH)).log_probs)


def test_only_whole_sixteen_bit_checkpoints_are_loaded_so(tiny_model_dir: Path) -> None:
    assert loading_dtype(tiny_model_dir, torch.float32) == torch.float32
    assert loading_dtype(tiny_model_dir, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(
    ("available", "dtype", "chosen"),
    [
        (True, torch.bfloat16, "flash_attention_2"),
        (True, torch.float32, "sdpa"),
        (False, torch.bfloat16, "sdpa"),
    ],
)
def test_flash_attention_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch, available: bool, dtype: torch.dtype, chosen: str
) -> None:
    monkeypatch.setattr("verl.models.loading.is_flash_attn_2_available", lambda: available)
    assert attention_for(dtype) == chosen
