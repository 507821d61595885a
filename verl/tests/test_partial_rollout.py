"""Responses that are stopped and go on, with a real engine: the same tokens and log-probs, each of its own policy.

This file is also the program of the ranks that count together (see `ranks.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import ppo_defaults
from transformers import AutoModelForCausalLM

from verl import DataProto
from verl.models.fsdp import init_distributed
from verl.trainer.config.fields import with_values
from verl.workers.rollout import EngineRollout
from verl.workers.rollout.quota import Quota
from xbai.sprm import ScoreHead, SPRMConfig, StepRule, step_feature_mask

LENGTH, GROUPS, N = 20, 3, 2
NEVER = 10**6


def make_rollout(folder: Path, sprm_config: SPRMConfig | None = None, **changes: object) -> EngineRollout:
    config = ppo_defaults(
        "data.max_prompt_length=12",
        f"data.max_response_length={LENGTH}",
        f"actor_rollout_ref.model.path={folder}",
        "actor_rollout_ref.rollout={name: hf, dtype: float32, max_num_seqs: 4}",
    ).actor_rollout_ref
    return EngineRollout(with_values(config.rollout, changes), config.model, 0, sprm_config)


def fresh_requests() -> DataProto:
    """GROUPS prompts of unequal lengths with N responses each that have not begun."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 200, (4 + 3 * g,), generator=generator).numpy().astype(np.int32) for g in range(GROUPS)]
    nothing = np.empty(0, np.int32)
    return DataProto.from_dict(
        {
            "uid": [f"1/{g}" for g in range(GROUPS) for _ in range(N)],
            "prompt_ids": [prompt for prompt in prompts for _ in range(N)],
            "token_ids": [nothing] * (GROUPS * N),
            "step_scores": [nothing.astype(np.float32)] * (GROUPS * N),
            "seed": list(range(GROUPS * N)),
        }
    )


def continued(requests: DataProto, answer: DataProto) -> DataProto:
    """What is asked for next of the responses that have not ended."""
    rows = [row for row in range(len(requests)) if not answer.non_tensor_batch["has_ended"][row]]
    left, added = requests[rows].non_tensor_batch, answer[rows].non_tensor_batch
    before = {key: left[key] for key in ("uid", "prompt_ids")}
    token_ids = [np.concatenate(pair) for pair in zip(left["token_ids"], added["token_ids"], strict=True)]
    scores = added.get("step_scores", left["step_scores"])
    return DataProto.from_dict(before | {"token_ids": token_ids, "step_scores": scores, "seed": left["seed"] + 100})


def in_parts(
    rollout: EngineRollout, change: Callable[[], None] = lambda: None
) -> tuple[list[DataProto], list[DataProto]]:
    """Ask for one group at a time until all have ended, with a `change` in between; what was asked, and answered."""
    asked, answers = [fresh_requests()], []
    while len(asked[-1]):
        answers.append(rollout.proceed(asked[-1], wanted=1))
        asked.append(continued(asked[-1], answers[-1]))
        change()
    return asked[:-1], answers


def whole(asked: list[DataProto], answers: list[DataProto], key: str) -> list[list[float]]:
    """All that was answered for each response, the parts of which have its prompt, and its place in the group."""
    found: dict[tuple[str, int], list[float]] = {}
    places = {row: (uid, row % N) for row, uid in enumerate(asked[0].non_tensor_batch["uid"])}
    names = list(places.values())
    for answer in answers:
        for name, values in zip(names, answer.non_tensor_batch[key], strict=True):
            found.setdefault(name, []).extend(values.tolist())
        names = [name for name, ended in zip(names, answer.non_tensor_batch["has_ended"], strict=True) if not ended]
    return [found[name] for name in places.values()]


def test_a_greedy_response_in_parts_is_the_whole_one(tiny_model_dir: Path) -> None:
    rollout = make_rollout(tiny_model_dir, ignore_eos=True)
    rollout._sampling = lambda _, sampling=rollout._sampling: sampling({"do_sample": False})
    at_once = rollout.proceed(fresh_requests(), NEVER).non_tensor_batch
    assert all(at_once["has_ended"]) and {len(ids) for ids in at_once["token_ids"]} == {LENGTH}
    asked, answers = in_parts(rollout)
    assert len(answers) > 1 and not rollout.engine.has_unfinished()
    assert whole(asked, answers, "token_ids") == [ids.tolist() for ids in at_once["token_ids"]]
    log_probs = whole(asked, answers, "log_probs")
    for found, expected in zip(log_probs, at_once["log_probs"], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_each_part_has_the_log_probs_of_its_policy(make_tiny_model: Callable[..., Path]) -> None:
    rollout = make_rollout(make_tiny_model(seed=0), temperature=0.8)
    models = [AutoModelForCausalLM.from_pretrained(make_tiny_model(seed=seed)) for seed in (0, 1)]
    version = 0

    def change() -> None:
        nonlocal version
        version = 1 - version
        rollout.mark_stale()
        rollout.wake_up(lambda: nullcontext(models[version].named_parameters()))

    asked, answers = in_parts(rollout, change)
    assert len(answers) > 1
    for part, (requests, answer) in enumerate(zip(asked, answers, strict=True)):
        rows, added = requests.non_tensor_batch, answer.non_tensor_batch
        for row in range(len(requests)):
            before = [*rows["prompt_ids"][row], *rows["token_ids"][row]]
            ids = torch.tensor([[*before, *added["token_ids"][row]]], dtype=torch.long)
            with torch.no_grad():
                log_probs = (models[part % 2](ids).logits[0] / 0.8).log_softmax(-1)[len(before) - 1 : -1]
            expected = log_probs.gather(1, ids[0, len(before) :, None])[:, 0]
            np.testing.assert_allclose(added["log_probs"][row], expected.numpy(), atol=1e-4)


def test_what_was_stopped_is_the_same_again(tiny_model_dir: Path) -> None:
    rollout = make_rollout(tiny_model_dir)
    again = [rollout.proceed(fresh_requests(), 1).non_tensor_batch["token_ids"] for _ in range(2)]
    assert all(np.array_equal(one, other) for one, other in zip(*again, strict=True))


@pytest.mark.long
def test_vllm_goes_on_with_scores(make_tiny_model: Callable[..., Path]) -> None:
    pytest.importorskip("vllm")
    folder, rule = make_tiny_model(seed=0), StepRule("en", tuple(range(40, 140)))
    rollout = make_rollout(folder, SPRMConfig(rule), name="vllm", ignore_eos=True)
    rollout._sampling = lambda _, sampling=rollout._sampling: sampling({"do_sample": False})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = ScoreHead(model.config.hidden_size).eval()
    weights = [*model.named_parameters(), *((f"score_head.{name}", part) for name, part in head.named_parameters())]
    rollout.wake_up(lambda: nullcontext((name, weight.detach()) for name, weight in weights))

    def scores(prompt: list[int], response: list[int]) -> dict[int, float]:
        """By the place of the feature of each step."""
        ids = torch.tensor([prompt + response])
        mask = step_feature_mask(ids, torch.arange(ids.shape[1])[None] >= len(prompt), rule)
        with torch.no_grad():
            found = head(model(ids, output_hidden_states=True).hidden_states[-2])[0].sigmoid()
        return {place: float(found[place]) for place in mask[0].nonzero().flatten().tolist()}

    at_once = rollout.proceed(fresh_requests(), NEVER).non_tensor_batch
    first = rollout.proceed(requests := fresh_requests(), wanted=1)
    rest = continued(requests, first)
    second = rollout.proceed(rest, NEVER)
    assert any(map(len, rest.non_tensor_batch["token_ids"])) and all(second.non_tensor_batch["has_ended"])
    assert whole([requests, rest], [first, second], "token_ids") == [ids.tolist() for ids in at_once["token_ids"]]
    for asked, answer in ((requests, first), (rest, second)):
        rows, added = asked.non_tensor_batch, answer.non_tensor_batch
        for row in range(len(asked)):
            prompt, before = rows["prompt_ids"][row].tolist(), rows["token_ids"][row].tolist()
            expected = scores(prompt, before + added["token_ids"][row].tolist())
            if before:
                expected.pop(len(prompt) + len(before) - 1, None)
            np.testing.assert_allclose(added["step_scores"][row], list(expected.values()), atol=1e-4)


def count_together(folder: Path) -> None:
    """On rank r engine r // 2 finishes a group at each of its steps from the 3rd one on, engine 0 twice as slowly;
    writes after how many steps it stopped, for two quotas."""
    init_distributed(60)
    engine = dist.get_rank() // 2
    quota, stopped = Quota(ranks_per_engine=2), []
    for wanted in (1, 30):
        quota.start(wanted)
        steps = 1
        while not quota.is_met(finished=int(steps > 2)):
            steps += 1
            time.sleep(0.002 * (2 - engine))
        stopped.append(steps)
    (folder / str(dist.get_rank())).write_text(" ".join(map(str, stopped)), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_engines_count_together_and_the_ranks_of_one_stop_at_the_same_step(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), "4", __file__, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    stopped = [list(map(int, (tmp_path / str(rank)).read_text(encoding="utf-8").split())) for rank in range(4)]
    assert stopped[0] == stopped[1] and stopped[2] == stopped[3]
    (slow_once, slow), (fast_once, fast) = stopped[0], stopped[2]
    assert min(slow_once, fast_once) == 3, "the first group of either ends it"
    assert 30 <= slow - 2 + fast - 2 <= 32 and slow < fast


def test_an_engine_alone_asks_nobody() -> None:
    quota = Quota()
    for wanted in (2, 1):
        quota.start(wanted)
        assert [quota.is_met(finished) for finished in (0, 1, 0, 1)] == [False, wanted == 1, wanted == 1, True]


if __name__ == "__main__":
    count_together(Path(sys.argv[1]))
