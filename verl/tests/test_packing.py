"""Packed rows are the padded rows: layouts, micro-batches, and the joint model on both."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import policy_section
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from verl.models.joint_model import JointModel, JointOutput
from verl.models.loading import attention_for, check_packable
from verl.models.packing import TokenLayout, packed_layout, padded_layout
from verl.trainer.config.schema import OWN_AGGREGATION
from verl.trainer.ppo.core_algos import Denominators
from verl.workers.actor.joint_loss import JointLoss, Totals
from verl.workers.batching.micro_batches import MicroBatching, RowSizes
from xbai.errors import UserError
from xbai.sprm import ScoreHead, ScoreTotals, StepCounts

VOCABULARY, PROMPT = 40, 8
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
}

Lengths = list[tuple[int, int]]
lengths_of_rows = st.lists(st.tuples(st.integers(1, PROMPT), st.integers(0, 12)), min_size=1, max_size=8)


def make_batch(lengths: Lengths, response_columns: int) -> dict[str, Tensor]:
    """Rows of a prompt and a response of the given lengths, every third response token a step."""
    columns = torch.arange(PROMPT + response_columns)
    prompts, responses = torch.tensor(lengths).T[..., None]
    attended = (columns >= PROMPT - prompts) & (columns < PROMPT + responses)
    torch.manual_seed(0)
    shape = (len(lengths), response_columns)
    return {
        "input_ids": torch.randint(1, VOCABULARY, attended.shape) * attended,
        "attention_mask": attended.long(),
        "position_ids": (attended.cumsum(1) - 1).clamp(min=0),
        "response_mask": attended[:, PROMPT:],
        "step_feature_mask": attended & (columns >= PROMPT - 1) & (columns % 3 == 1) & (responses > 1),
        "old_log_probs": -3 + 0.1 * torch.randn(shape),
        "ref_log_prob": -3 + 0.1 * torch.randn(shape),
        "advantages": torch.randn(shape),
        "old_step_logits": torch.randn(attended.shape),
        "correct": torch.tensor([float(row % 2) for row in range(len(lengths))]),
        "graded": torch.ones(len(lengths), dtype=torch.bool),
    }


@settings(max_examples=50, deadline=None)
@given(lengths_of_rows)
def test_both_layouts_hold_every_token_and_step_once(lengths: Lengths) -> None:
    batch = make_batch(lengths, 12)
    mask, features = batch["response_mask"], batch["step_feature_mask"]
    token_column, step_column = torch.rand(mask.shape), torch.rand(features.shape)
    for layout in (padded_layout(batch), packed_layout(batch)):
        ids = layout.backbone_inputs["input_ids"].flatten()
        assert layout.labels.tolist() == batch["input_ids"][:, PROMPT:][mask].tolist()
        before = batch["input_ids"][:, PROMPT - 1 : -1][mask]
        assert ids[layout.predictors].tolist() == before.tolist()
        assert ids[layout.features].tolist() == batch["input_ids"][features].tolist()
        assert torch.equal(layout.restore_tokens(layout.tokens(token_column)), token_column * mask)
        assert torch.equal(layout.restore_steps(layout.steps(step_column)), step_column * features)
        rows = torch.arange(len(lengths), dtype=torch.float)[:, None]
        assert torch.equal(layout.restore_tokens(layout.tokens(rows)), rows * mask)
    assert len(ids) == int(batch["attention_mask"].sum()), "no padding is computed"
    packing = layout.backbone_inputs["packing"]
    assert packing.cu_seqlens.diff().tolist() == [sum(row) for row in lengths]
    assert packing.max_seqlen == max(sum(row) for row in lengths)


def test_a_response_needs_a_prompt() -> None:
    batch = make_batch([(2, 3)], 3)
    batch["attention_mask"][:, :PROMPT] = 0
    with pytest.raises(ValueError, match="a token right before it"):
        packed_layout(batch)


@settings(max_examples=100, deadline=None)
@given(lengths_of_rows, st.booleans(), st.integers(20, 60), st.integers(0, 9))
def test_micro_batches_hold_every_row_once_within_the_budget(
    lengths: Lengths, packed: bool, budget: int, more: int
) -> None:
    sizes = RowSizes.of(make_batch(lengths, 12))
    assert list(zip(*sizes)) == lengths
    batching = MicroBatching(1, budget, packed)
    fewest = batching.fewest(sizes)
    assert fewest >= sum(map(sum, lengths)) / budget
    parts = batching.fill(sizes, fewest + more)
    assert len(parts) == fewest + more
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert sum(not part for part in parts) == max(0, fewest + more - len(lengths)), "no dummy where rows suffice"
    tokens = [batching.tokens(sizes, part) for part in parts]
    assert max(tokens) <= budget
    assert tokens == sorted(tokens, reverse=True)
    # What a forward pass over them really computes.
    batch = make_batch(lengths, 12)
    for part, expected in zip(parts, tokens):
        rows = {name: column[part] for name, column in batch.items()}
        if part:
            layout = packed_layout(rows) if packed else padded_layout(rows)
            assert layout.backbone_inputs["input_ids"].numel() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(100, 300))
def test_packed_micro_batches_are_few_and_even(lengths: list[int], budget: int) -> None:
    sizes = RowSizes([1] * len(lengths), [length - 1 for length in lengths])
    batching = MicroBatching(1, budget, packed=True)
    count = batching.fewest(sizes)
    assert count == 1 or (count - 1) * budget < 2 * sum(lengths)
    tokens = [sum(lengths[row] for row in part) for part in batching.fill(sizes, count)]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 5))
def test_a_fixed_number_of_rows_is_never_exceeded_and_the_longest_come_first(
    lengths: list[int], size: int, more: int
) -> None:
    sizes, batching = RowSizes([1] * len(lengths), [length - 1 for length in lengths]), MicroBatching(size)
    parts = batching.fill(sizes, batching.fewest(sizes) + more)
    assert max(map(len, parts)) <= size
    rows = [row for part in parts for row in part]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)


def test_a_row_over_the_budget_is_a_clear_error() -> None:
    batching = MicroBatching(1, 9, packed=True, key="ppo_max_token_len_per_gpu")
    with pytest.raises(
        UserError, match="ppo_max_token_len_per_gpu: a budget of 9 tokens is less than the 10 of one row"
    ):
        batching.fewest(RowSizes([4, 2], [6, 1]))


def make_model(name: str, packed: bool, **shape: object) -> JointModel:
    torch.manual_seed(0)
    model_class, config_class = MODELS[name]
    lm = model_class(config_class(**SHAPE, **shape))
    lm.set_attn_implementation(attention_for(torch.float32, packed))
    check_packable(lm)
    return JointModel(lm, ScoreHead(32, dropout=0.0))


def loss_of(
    model: JointModel, layout: TokenLayout, batch: dict[str, Tensor], policy_loss: str
) -> tuple[JointOutput, Tensor]:
    section = policy_section(
        {
            "actor.entropy_coeff": 0.01,
            "actor.use_kl_loss": True,
            "actor.kl_loss_coef": 0.1,
            "actor.loss": policy_loss,
            "rollout.response_length": batch["response_mask"].shape[1],
            "score.backbone_grad_scale": 0.5,
        }
    )
    output = model(layout, temperature=0.7, compute_entropy=True, backbone_grad_scale=0.5)
    mask = batch["response_mask"]
    score = ScoreTotals(StepCounts(4.0, 6.0), StepCounts(2.0, 3.0), pairs=12.0)
    totals = Totals(Denominators(float(mask.sum()), float(mask.any(-1).sum())), score)
    loss = JointLoss(section)(output, layout, batch, totals).loss
    model.zero_grad()
    loss.backward()
    return output, loss


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy_loss", OWN_AGGREGATION)
def test_packed_is_padded_in_loss_gradients_and_step_scores(name: str, policy_loss: str) -> None:
    # Rows of very different lengths, an empty response, one-token prompts.
    batch = make_batch([(8, 50), (1, 3), (5, 0), (1, 1), (3, 17), (1, 0)], 60)
    padded, packed = make_model(name, packed=False), make_model(name, packed=True)
    output, loss = loss_of(padded, padded_layout(batch), batch, policy_loss)
    packed_output, packed_loss = loss_of(packed, packed_layout(batch), batch, policy_loss)
    assert output.log_probs.shape == (71,)
    assert len(output.step_logits) > 10
    torch.testing.assert_close(packed_output, output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_output.step_logits.sigmoid(), output.step_logits.sigmoid(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    expected = {key: parameter.grad for key, parameter in padded.named_parameters()}
    assert any(gradient.abs().max() > 0.01 for gradient in expected.values())
    for key, parameter in packed.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[key], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_recomputed_layers_give_the_same_packed_gradients() -> None:
    batch = make_batch([(3, 9), (1, 2)], 9)
    plain, recomputed = make_model("qwen3", packed=True), make_model("qwen3", packed=True).train()
    recomputed.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, recomputed):
        loss_of(model, packed_layout(batch), batch, "ppo")
    for left, right in zip(plain.parameters(), recomputed.parameters()):
        torch.testing.assert_close(left.grad, right.grad)


@pytest.mark.parametrize(
    ("lm", "reason"),
    [
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=2)),
            "its attention does",
        ),
        (
            lambda: Qwen3NextForCausalLM(
                Qwen3NextConfig(
                    **SHAPE,
                    num_experts=2,
                    moe_intermediate_size=8,
                    layer_types=["linear_attention"] * 2 + ["full_attention"],
                )
            ),
            "its linear_attention layers do",
        ),
    ],
)
def test_a_model_whose_tokens_would_mix_is_refused(lm: object, reason: str) -> None:
    with pytest.raises(UserError, match=f"cannot compute packed sequences .{reason} not take them.: set .*=false"):
        check_packable(lm())


CORE = """
import importlib, sys
for name in ("ray", "omegaconf", "hydra", "tensordict", "vllm", "pandas", "datasets", "pyarrow"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
CORE_MODULES = (
    "verl.workers.actor.dp_actor",
    "verl.workers.critic",
    "verl.models.fsdp",
    "verl.optim.optimizers",
    "verl.optim.muon",
    "verl.models.loading",
    "verl.models.ulysses",
    "xbai.engine.packed_attention",
    "verl.trainer.ppo.core_algos",
    "xbai.engine.hf.engine",
    "xbai.engine.scorer",
    "xbai.files",
)


def test_the_core_imports_without_the_libraries_of_the_driver() -> None:
    done = subprocess.run([sys.executable, "-c", CORE, *CORE_MODULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
