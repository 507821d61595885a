"""A run of TRL's GRPO, for `against_trl.py`, in a process of its own: it writes seconds, tokens and reward a step.

Its one argument is a JSON object, of the arguments of `main`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from xbai.grading.dispatch import answer_check

OF_ENGINE: dict[str, dict[str, Any]] = {
    "generate": {},
    "continuous": {"use_transformers_continuous_batching": True},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate"},
}


class Steps(TrainerCallback):
    """Measures each step from the sampling of its responses to the end of its update."""

    def __init__(self, responses: int) -> None:
        self._responses = responses
        self.rows: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._seconds = time.perf_counter() - self._start

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" in logs:
            tokens = logs["completions/mean_length"] * self._responses
            self.rows.append({"seconds": self._seconds, "tokens": tokens, "reward": logs["reward"]})


def reward(completions: list[Any], ground_truth: list[str], **_: Any) -> list[float]:
    """1 for a right answer and 0 for another, as the trainer here gives."""
    grade = answer_check("make10")
    return [1.0 if grade(one[0]["content"], truth) else 0.0 for one, truth in zip(completions, ground_truth)]


def main(
    model: str,
    problems: str,
    out: str,
    engine: str,
    steps: int,
    seed: int,
    prompts: int,
    samples: int,
    response_tokens: int,
    micro_batch: int,
    learning_rate: float,
    beta: float,
) -> None:
    """Train, and write the steps."""
    rows = Dataset.from_parquet(problems)
    rows = rows.map(lambda row: {"ground_truth": row["reward_model"]["ground_truth"]}, remove_columns="reward_model")
    responses = prompts * samples
    measured = Steps(responses)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=responses // micro_batch,
            num_generations=samples,
            max_completion_length=response_tokens,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            beta=beta,
            temperature=1.0,
            loss_type="dapo",
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            **OF_ENGINE[engine],
        )
        trainer = GRPOTrainer(model, reward, config, rows, callbacks=[measured])
        trainer.train()
    Path(out).write_text(json.dumps(measured.rows), encoding="utf-8")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
