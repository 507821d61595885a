"""The samples of each step, for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto
from verl.workers.reward_manager import Reward
from xbai.engine.detokenizer import Detokenizer
from xbai.errors import UserError
from xbai.files import atomic_write
from xbai.sprm import trajectory_scores


class SampleDump:
    """Writes a file of JSON lines a step, a line a response, into `trainer.rollout_data_dir`, or nothing without it."""

    def __init__(self, folder: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._detokenize = Detokenizer(tokenizer)

    def write(self, step: int, batch: DataProto, reward: Reward) -> None:
        """Write the responses of `batch`, with what a custom reward function returned of each.

        Raises:
            UserError: a reward manager gave a column that is not a value for each response.
        """
        if self._folder is None:
            return
        table = self._table(batch, reward)
        for name, values in table.items():
            if len(values) != len(batch):
                raise UserError(
                    f"trainer.rollout_data_dir: the reward's column {name!r} has {len(values)} values for the "
                    f"{len(batch)} responses of step {step}; it needs one for each"
                )
        with atomic_write(Path(self._folder) / f"{step}.jsonl", "w") as stream:
            for row in zip(*table.values(), strict=True):
                line = {"step": step, **dict(zip(table, row, strict=True))}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _table(self, batch: DataProto, reward: Reward) -> dict[str, list[Any]]:
        columns = batch.batch
        is_prompt = columns["attention_mask"][:, : columns["prompts"].shape[1]].bool()
        prompts = [ids[mask] for ids, mask in zip(columns["prompts"], is_prompt, strict=True)]
        values = reward.reward_extra_info | {
            "reward": reward.reward_tensor.sum(-1),
            "correct": reward.correct,
            "graded": reward.graded,
            "tokens": columns["response_mask"].sum(-1),
        }
        if "baselines" in columns:
            values["baseline"] = columns["baselines"]
        if "old_step_logits" in columns:
            values["score"] = trajectory_scores(columns["old_step_logits"], columns["step_feature_mask"])
        return {
            # With the template's special tokens: whoever reads the samples gives a model the prompt that it had.
            "prompt": list(map(self._tokenizer.decode, prompts)),
            "response": list(map(self._detokenize, columns["responses"].tolist())),
            **{name: value.tolist() for name, value in values.items()},
        }
