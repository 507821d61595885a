"""The samples of a step: a line a response, and no line where a column is not of all responses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from verl import DataProto
from verl.trainer.ppo.samples import SampleDump
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


def test_a_line_says_what_a_response_was_and_got(batch: DataProto, tiny_tokenizer, tmp_path: Path) -> None:
    SampleDump(str(tmp_path), tiny_tokenizer).write(3, batch, make_reward(batch, ["好", "b"]))
    lines = list(map(json.loads, (tmp_path / "3.jsonl").read_text(encoding="utf-8").splitlines()))
    assert [line["step"] for line in lines] == [3, 3]
    assert [line["prompt"] for line in lines] == ["hi", "hi"]
    assert [line["note"] for line in lines] == ["好", "b"]
    assert [(line["reward"], line["correct"], line["graded"]) for line in lines] == [(1.0, 1.0, True), (0.0, 0.0, True)]
    assert [line["tokens"] for line in lines] == batch.batch["response_mask"].sum(-1).tolist()


def test_a_column_that_is_too_short_is_one_line(batch: DataProto, tiny_tokenizer, tmp_path: Path) -> None:
    expected = r"^trainer\.rollout_data_dir: the reward's column 'note' has 1 values for the 2 responses of step 3; "
    with pytest.raises(UserError, match=expected):
        SampleDump(str(tmp_path), tiny_tokenizer).write(3, batch, make_reward(batch, ["a"]))
    assert not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_written(batch: DataProto, tiny_tokenizer) -> None:
    SampleDump(None, tiny_tokenizer).write(3, batch, make_reward(batch, ["a"]))
