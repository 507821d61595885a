"""The score service, the trainer and a plain forward pass see the same steps and give them the same scores."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl.models.loading import build_joint_model, load_tokenizer
from verl.models.packing import layout_maker
from xbai.engine import Scorer
from xbai.sprm import load_score_head, load_sprm_config, step_feature_mask, trajectory_scores

ROWS = [(12, 90), (3, 7), (40, 1), (25, 200), (1, 60), (25, 199)]
"""Lengths of prompts and responses."""


@pytest.fixture
def batch(tiny_model_dir: Path) -> dict[str, Tensor]:
    """Rows as the trainer has them: prompts padded on the left, responses on the right, two with the same prompt."""
    rule = load_sprm_config(tiny_model_dir, load_tokenizer(tiny_model_dir)).step_rule
    draw = random.Random(0)
    prompts, responses = (max(lengths) for lengths in zip(*ROWS, strict=True))
    input_ids = torch.zeros(len(ROWS), prompts + responses, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(ROWS):
        ids = [
            draw.choice([*rule.step_ids, *(draw.randint(10, 200) for _ in range(8))]) for _ in range(prompt + response)
        ]
        columns = slice(prompts - prompt, prompts + response)
        input_ids[row, columns], attention_mask[row, columns] = torch.tensor(ids), 1
    input_ids[5, :prompts] = input_ids[3, :prompts]
    response_mask = attention_mask[:, prompts:]
    in_response = torch.cat([torch.zeros(len(ROWS), prompts, dtype=torch.int64), response_mask], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "response_mask": response_mask,
        "step_feature_mask": step_feature_mask(input_ids, in_response, rule),
    }


def plain_scores(folder: Path, rows: list[Tensor], masks: list[Tensor]) -> tuple[list[list[float]], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = load_score_head(folder, model.config.hidden_size, load_sprm_config(folder, load_tokenizer(folder)))
    steps, values = [], []
    for ids, mask in zip(rows, masks, strict=True):
        with torch.no_grad():
            logits = head(model(ids[None], output_hidden_states=True).hidden_states[-2])[0]
        steps.append(logits[mask].sigmoid().tolist())
        values.append(trajectory_scores(logits[None], mask[None]).item())
    return steps, values


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_service_trainer_and_plain_forward_agree(batch: dict[str, Tensor], tiny_model_dir: Path, packed: bool) -> None:
    attended, mask = batch["attention_mask"].bool(), batch["step_feature_mask"]
    rows = [ids[real] for ids, real in zip(batch["input_ids"], attended, strict=True)]
    expected, values = plain_scores(tiny_model_dir, rows, [row[real] for row, real in zip(mask, attended, strict=True)])
    assert sum(map(len, expected)) > 20

    scored = Scorer.from_folder(tiny_model_dir, dtype="float32").score(
        [ids.tolist() for ids in rows], [prompt for prompt, _ in ROWS]
    )
    config = load_sprm_config(tiny_model_dir, load_tokenizer(tiny_model_dir))
    model = build_joint_model(tiny_model_dir, sprm_config=config, packed=packed).eval()
    layout = layout_maker(packed, torch.device("cpu"))(batch)
    with torch.no_grad():
        logits = layout.restore_steps(model(layout).step_logits)
    trained = trajectory_scores(logits, mask)
    for row, (scores, value) in enumerate(zip(expected, values, strict=True)):
        assert scored[row].step_scores == pytest.approx(scores, abs=1e-5)
        assert scored[row].value == pytest.approx(value, abs=1e-5)
        assert logits[row][mask[row]].sigmoid().tolist() == pytest.approx(scores, abs=1e-5)
        assert trained[row].item() == pytest.approx(value, abs=1e-5)
