"""Reinforcement learning with a reward of one's own: a few steps on prompts that this program makes.

    python examples/custom_reward.py models/DeepScaleR-1.5B-Preview trainer.n_gpus_per_node=8

MODEL is any local model folder; on the CPU, the quickstart's: `outputs/quickstart/base trainer.device=cpu`. What
follows are keys of verl/verl/trainer/config/ppo_trainer.yaml, which win over those below. The reward is
`compute_score` in this file: grading processes import it, and therefore it imports nothing heavy at the top. Prompts,
checkpoints and metrics lie in outputs/custom_reward; run again, the program goes on from the last checkpoint
(`trainer.resume_mode=disable` begins anew).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from xbai.errors import exit_on_user_error

OUT = Path("outputs/custom_reward")
TOPICS = ("a river", "the moon", "music", "winter", "bread", "a mirror", "trains", "a garden")
LETTERS = "eaotinsr"


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    """1 for a response of at least ten letters that does without the letter `ground_truth`, else 0.

    Entries beside `score` are logged as `reward_extra/*`, their means over the responses of a step. A response with a
    score above 0.5 counts as right for the score head.
    """
    letters = [character for character in solution_str.lower() if character.isalpha()]
    forbidden = letters.count(ground_truth)
    return {"score": float(len(letters) >= 10 and forbidden == 0), "letters": len(letters), "forbidden": forbidden}


@exit_on_user_error
def main() -> None:
    """Write the prompts, then train."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    from verl.trainer.config.compose import compose_config
    from verl.trainer.main_ppo import run
    from verl.utils.console import log_to_console
    from xbai.benchmarks.rows import training_row, write_parquet

    log_to_console()
    model, *overrides = sys.argv[1:]
    OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (topic, letter) in enumerate(zip(TOPICS, LETTERS, strict=True)):
        prompt = f"Write one sentence about {topic}, without the letter {letter}."
        rows.append(training_row("lipograms", [{"role": "user", "content": prompt}], letter, "writing", index=index))
    write_parquet(OUT / "prompts.parquet", rows)
    settings = {
        "actor_rollout_ref.model.path": model,
        "custom_reward_function.path": Path(__file__).resolve(),
        "data.train_files": OUT / "prompts.parquet",
        "data.val_files": "null",
        "data.train_batch_size": len(rows),
        "data.max_prompt_length": 128,
        "data.max_response_length": 128,
        "actor_rollout_ref.actor.ppo_mini_batch_size": len(rows),
        "actor_rollout_ref.rollout.n": 4,
        "trainer.n_gpus_per_node": 1,
        "trainer.total_training_steps": 2,
        "trainer.test_freq": -1,
        "trainer.default_local_dir": OUT,
    }
    run(compose_config("ppo_trainer", [*(f"{key}={value}" for key, value in settings.items()), *overrides]))


if __name__ == "__main__":
    main()
