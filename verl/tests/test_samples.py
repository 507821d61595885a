"""The samples of a step: a line a response, and no line where a column is not of all responses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ppo_defaults

from verl import DataProto
from verl.trainer.config.fields import with_values
from verl.trainer.ppo.samples import Samples, rows_to_show
from verl.workers.reward_manager import Reward
from xbai.errors import UserError


@pytest.fixture
def batch(tiny_tokenizer) -> DataProto:
    prompt, responses = tiny_tokenizer.encode("hi"), [tiny_tokenizer.encode(text) for text in ("one", "two")]
    width = max(map(len, responses))
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in responses])
    padded = torch.tensor([row + [tiny_tokenizer.pad_token_id] * (width - len(row)) for row in responses])
    prompts = torch.tensor([[tiny_tokenizer.pad_token_id, *prompt]] * 2)
    attended = torch.cat([torch.arange(prompts.shape[1]).expand(2, -1) > 0, mask], dim=1)
    return DataProto.from_dict(
        {"prompts": prompts, "responses": padded, "response_mask": mask, "attention_mask": attended.long()}
    )


def make_reward(batch: DataProto, notes: list[str]) -> Reward:
    rewards = torch.zeros(batch.batch["response_mask"].shape)
    rewards[:, 0] = torch.tensor([1.0, 0.0])
    graded = torch.ones(2, dtype=torch.bool)
    return Reward(rewards, torch.tensor([1.0, 0.0]), graded, {"note": np.array(notes, dtype=object)}, {})


def samples(tokenizer, **trainer: object) -> Samples:
    return Samples(with_values(ppo_defaults().trainer, trainer), tokenizer)


def test_a_line_says_what_a_response_was_and_got(batch: DataProto, tiny_tokenizer, tmp_path: Path) -> None:
    kept = samples(tiny_tokenizer, rollout_data_dir=str(tmp_path))
    kept.keep(3, batch, make_reward(batch, ["好", "b"]))
    lines = list(map(json.loads, (tmp_path / "3.jsonl").read_text(encoding="utf-8").splitlines()))
    assert [line["step"] for line in lines] == [3, 3]
    assert [line["prompt"] for line in lines] == ["hi", "hi"]
    assert [line["note"] for line in lines] == ["好", "b"]
    assert [(line["reward"], line["correct"], line["graded"]) for line in lines] == [(1.0, 1.0, True), (0.0, 0.0, True)]
    assert [line["tokens"] for line in lines] == batch.batch["response_mask"].sum(-1).tolist()
    assert kept.shown == []


def test_scores_of_steps_are_those_of_the_head_at_the_steps(batch: DataProto, tiny_tokenizer, tmp_path: Path) -> None:
    mask = torch.zeros(batch.batch["attention_mask"].shape, dtype=torch.bool)
    mask[0, [2, 4]] = True
    batch.batch["step_feature_mask"], batch.batch["old_step_logits"] = mask, torch.logit(torch.full(mask.shape, 0.25))
    batch.batch["old_step_logits"][0, 4] = 0.0
    kept = samples(tiny_tokenizer, rollout_data_dir=str(tmp_path), log_samples_freq=2)
    for step in (1, 2):
        kept.keep(step, batch, make_reward(batch, ["a", "b"]))
        assert bool(kept.shown) is (step == 2)
    lines = list(map(json.loads, (tmp_path / "2.jsonl").read_text(encoding="utf-8").splitlines()))
    assert [line["step_scores"] for line in lines] == [[0.25, 0.5], []]
    assert [line["score"] for line in lines] == pytest.approx([0.125**0.5, 0.0])
    assert [(row["step_scores"], row["reward"]) for row in kept.shown] == [("0.25 0.50", 1.0), ("", 0.0)]
    assert set(kept.shown[0]) == {"prompt", "response", "step_scores", "score", "reward", "correct"}


@settings(deadline=None)
@given(st.lists(st.sampled_from(["right", "wrong", "not graded"]), max_size=40), st.integers(1, 12))
def test_half_of_what_is_shown_is_right_where_that_can_be(verdicts: list[str], count: int) -> None:
    correct = torch.tensor([float(verdict == "right") for verdict in verdicts])
    graded = torch.tensor([verdict != "not graded" for verdict in verdicts], dtype=torch.bool)
    rows = rows_to_show(correct, graded, count)
    shown = [verdicts[row] for row in rows]
    right, wrong = verdicts.count("right"), verdicts.count("wrong")
    assert rows == sorted(set(rows))
    assert len(rows) == min(count, right + wrong) == shown.count("right") + shown.count("wrong")
    is_half = abs(shown.count("right") - shown.count("wrong")) <= 1
    assert is_half or shown.count("right") == right or shown.count("wrong") == wrong


def test_a_column_that_is_too_short_is_one_line(batch: DataProto, tiny_tokenizer, tmp_path: Path) -> None:
    expected = r"^reward_model\.reward_manager: its column 'note' has 1 values for the 2 responses of step 3; "
    with pytest.raises(UserError, match=expected):
        samples(tiny_tokenizer, rollout_data_dir=str(tmp_path)).keep(3, batch, make_reward(batch, ["a"]))
    assert not list(tmp_path.iterdir())
