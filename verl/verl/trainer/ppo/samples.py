"""The samples of each step, for people to read: all in a file, some in the loggers' tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import TrainerConfig
from verl.workers.reward_manager import Reward
from xbai.engine.detokenizer import Detokenizer
from xbai.errors import UserError
from xbai.files import atomic_write
from xbai.sprm import trajectory_scores

SHOWN = ("prompt", "response", "step_scores", "score", "reward", "grade", "correct")
"""The columns of a logger's table, as far as there are such."""

Line = dict[str, Any]


class Samples:
    """Writes a file of JSON lines a step, a line a response, into `trainer.rollout_data_dir`, where there is one.

    Attributes:
        shown: `trainer.log_samples` rows for the loggers' tables, in every `trainer.log_samples_freq`th step.
    """

    def __init__(self, trainer: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._trainer, self._tokenizer = trainer, tokenizer
        self._detokenize = Detokenizer(tokenizer)
        self.shown: list[Line] = []

    def keep(self, step: int, batch: DataProto, reward: Reward) -> None:
        """Write the responses of `batch`, with what a custom reward function returned of each, and choose some.

        Raises:
            UserError: a reward manager gave a column that is not a value for each response.
        """
        trainer = self._trainer
        is_shown = trainer.log_samples_freq > 0 and step % trainer.log_samples_freq == 0
        chosen = rows_to_show(reward.correct, reward.graded, trainer.log_samples) if is_shown else []
        shown: list[Line] = []
        if trainer.rollout_data_dir is not None:
            lines = self._lines(step, batch, reward, range(len(batch)))
            with atomic_write(Path(trainer.rollout_data_dir) / f"{step}.jsonl", "w") as stream:
                stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            shown = [lines[row] for row in chosen]
        elif is_shown:
            shown = self._lines(step, batch, reward, chosen)
        self.shown = list(map(_for_table, shown))

    def _lines(self, step: int, batch: DataProto, reward: Reward, rows: Sequence[int]) -> list[Line]:
        chosen = list(rows)
        columns = batch.select(("attention_mask", "prompts", "responses"))[chosen].batch
        is_prompt = columns["attention_mask"][:, : columns["prompts"].shape[1]].bool()
        prompts = [ids[mask] for ids, mask in zip(columns["prompts"], is_prompt, strict=True)]
        values = _values(batch, reward)
        for name, of_rows in values.items():
            if len(of_rows) != len(batch):
                raise UserError(
                    f"reward_model.reward_manager: its column {name!r} has {len(of_rows)} values for the "
                    f"{len(batch)} responses of step {step}; it needs one for each"
                )
        table = {
            "step": [step] * len(chosen),
            # With the template's special tokens: whoever reads the samples gives a model the prompt that it had.
            "prompt": list(map(self._tokenizer.decode, prompts)),
            "response": list(map(self._detokenize, columns["responses"].tolist())),
            **{name: of_rows[chosen].tolist() for name, of_rows in values.items()},
        }
        return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def _values(batch: DataProto, reward: Reward) -> dict[str, np.ndarray | Tensor]:
    """What there is of each response besides its text."""
    columns = batch.batch
    values = reward.reward_extra_info | {
        "reward": reward.reward_tensor.sum(-1),
        "correct": reward.correct,
        "graded": reward.graded,
        "tokens": columns["response_mask"].sum(-1),
    }
    if "baselines" in columns:
        values["baseline"] = columns["baselines"]
    if "old_step_logits" in columns:
        logits, mask = columns["old_step_logits"], columns["step_feature_mask"]
        values["score"] = trajectory_scores(logits, mask)
        of_steps = zip(logits.float().sigmoid(), mask, strict=True)
        values["step_scores"] = object_array(scores[is_step].tolist() for scores, is_step in of_steps)
    return values


def rows_to_show(correct: Tensor, graded: Tensor, count: int) -> list[int]:
    """Up to `count` of the graded responses, half of them right, or as near to half as can be; those of each kind are
    spread evenly over the batch, and so over its prompts.

    Args:
        correct, graded: [B].
    """
    right, wrong = ((graded & (correct.bool() == kind)).nonzero().flatten().tolist() for kind in (True, False))
    most_right = min(len(right), max(-(-count // 2), count - len(wrong)))
    return sorted(_spread(right, most_right) + _spread(wrong, min(len(wrong), count - most_right)))


def _spread(rows: Sequence[int], count: int) -> list[int]:
    return [rows[i * len(rows) // count] for i in range(count)]


def _for_table(line: Line) -> Line:
    """What people look at first; the scores of steps as one text, as tables have no lists."""
    shown = {name: line[name] for name in SHOWN if name in line}
    if "step_scores" in shown:
        shown["step_scores"] = " ".join(f"{score:.2f}" for score in shown["step_scores"])
    return shown
