"""Rewards: where they lie, what a failed grade does, penalties, custom functions."""

import copy
import time

import numpy as np
import pytest
import torch
from clocks import wait_until
from tiny import ppo_defaults

from verl.protocol import DataProto
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.core_algos import compute_advantages
from verl.trainer.ppo.data import check_gradable
from verl.workers.reward_manager import REWARD_MANAGERS, BatchRewardManager, PrimeRewardManager
from verl.workers.reward_manager.manager import length_reward
from xbai.errors import UserError


def _config(manager="prime", custom=None, workers=1, **trainer) -> PPOConfig:
    changes = {
        "data.max_response_length": 40,
        "reward_model.reward_manager": manager,
        "reward_model.num_workers": workers,
        "reward_model.timeout_s": 5,
        "reward_model.batch_timeout_s": 5,
        "reward_model.memory_gib": 0.25,
        "reward_model.overlong_buffer.len": 10,
        "custom_reward_function.path": custom,
        **{f"trainer.{key}": value for key, value in trainer.items()},
    }
    return with_values(ppo_defaults(), changes)


@pytest.fixture
def make_batch(tiny_tokenizer):
    def make(texts, truth="1 2 3 4", **others):
        ids = [tiny_tokenizer.encode(text) for text in texts]
        mask = torch.tensor([[t < len(row) for t in range(40)] for row in ids])
        responses = torch.tensor([row + [tiny_tokenizer.pad_token_id] * (40 - len(row)) for row in ids])
        columns = {"data_source": ["make10"] * len(ids), "reward_model": [{"ground_truth": truth}] * len(ids)}
        columns["uid"] = ["0"] * len(ids)
        return DataProto.from_dict({"responses": responses, "response_mask": mask.long()} | columns | others)

    return make


def _reward(config, tokenizer, batch):
    manager = REWARD_MANAGERS[config.reward_model.reward_manager](tokenizer, config)
    try:
        return manager.launch(batch, "training").result()
    finally:
        manager.close()


@pytest.mark.parametrize("manager", ["naive", "prime"])
def test_reward_lies_on_the_last_token(manager, tiny_tokenizer, make_batch):
    batch = make_batch([r"yes \boxed{1+2+3+4}", r"\boxed{1+2-3+4}", ""])
    reward = _reward(_config(manager), tiny_tokenizer, batch)
    last = len(tiny_tokenizer.encode(r"yes \boxed{1+2+3+4}")) - 1
    assert reward.reward_tensor.nonzero().tolist() == [[0, last]]
    assert reward.correct.tolist() == [1, 0, 0]
    assert reward.graded.all()


def test_grades_that_are_known_are_not_asked_for_again(tiny_tokenizer, make_batch):
    batch = make_batch([r"\boxed{1+2+3+4}", r"\boxed{1+2+3+4}", "no"])
    manager = PrimeRewardManager(tiny_tokenizer, _config())
    try:
        pending = manager.launch(batch, "training")
        first, grades = pending.result(), pending.grades()
    finally:
        manager.close()
    again = manager.launch(batch[[2, 0]], "training", [grades[2], grades[0]]).result()
    assert torch.equal(again.reward_tensor, first.reward_tensor[[2, 0]])
    assert again.correct.tolist() == [0, 1] and again.graded.all()


HOSTILE = """
import os, re, signal, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "hang":
        # In C, holding the interpreter's lock, deaf to signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        re.match("(a|aa)+$", "a" * 100 + "b")
    if solution_str == "exit": os._exit(0)
    if solution_str == "bomb": [bytearray(2**24) for _ in range(2**10)]
    if solution_str == "raise": raise ValueError
    if solution_str == "nan": return float("nan")
    return {"score": len(solution_str) / 10, "even": len(solution_str) % 2 == 0, "note": "seen"}

def compute_scores(data_sources, solution_strs, ground_truths, extra_infos):
    if "unknown" in solution_strs:
        return [None if s == "unknown" else {"score": 1, "even": 0} for s in solution_strs]
    if "few" in solution_strs:
        return [1.0]
    return [compute_score(*each) for each in zip(data_sources, solution_strs, ground_truths)]
"""


@pytest.fixture
def hostile(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(HOSTILE, encoding="utf-8")
    return str(path)


def test_a_hostile_function_masks_just_its_sample_in_time(hostile, tiny_tokenizer, make_batch):
    texts = ["hang", "12345678", "exit", "1", "bomb", "22", "raise", "333", "nan", "4444"]
    batch = make_batch(texts)
    start = time.monotonic()
    reward = _reward(_config(custom=hostile, workers=2), tiny_tokenizer, batch)
    assert time.monotonic() - start < 60
    assert reward.graded.tolist() == [False, True] * 5
    assert reward.reward_tensor.sum(-1).tolist() == pytest.approx([0, 0.8, 0, 0.1, 0, 0.2, 0, 0.3, 0, 0.4])
    assert reward.correct.tolist() == [0, 1, *[0] * 8]
    counted = {name: value for name, value in reward.metrics.items() if name.startswith("reward/")}
    assert counted == {
        "reward/ungraded_timeout": 1,
        "reward/ungraded_crash": 1,
        "reward/ungraded_memory": 1,
        "reward/ungraded_error": 2,
    }
    assert reward.metrics["reward_extra/even"] == 3 / 5
    assert reward.reward_extra_info["note"].tolist() == [None, "seen"] * 5

    columns = {"token_level_rewards": reward.reward_tensor, "response_mask": batch.batch["response_mask"]}
    algorithm = ppo_defaults("algorithm.norm_adv_by_std_in_grpo=false").algorithm
    advantages, _ = compute_advantages({**columns, "graded": reward.graded}, ["a"] * len(texts), algorithm)
    assert advantages[:, 0].tolist() == pytest.approx([0, 0.44, 0, -0.26, 0, -0.16, 0, -0.06, 0, 0.04])


def _batch_config(path):
    return with_values(_config("batch", custom=path), {"custom_reward_function.name": "compute_scores"})


def test_a_batch_function_is_called_once_with_lists(hostile, tiny_tokenizer, make_batch):
    reward = _reward(_batch_config(hostile), tiny_tokenizer, make_batch(["1", "12345678"]))
    assert reward.reward_tensor.sum(-1).tolist() == pytest.approx([0.1, 0.8])
    assert reward.metrics["reward_extra/even"] == 0.5
    reward = _reward(_batch_config(hostile), tiny_tokenizer, make_batch(["1", "unknown"]))
    assert reward.graded.tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("hang", "timeout"), ("exit", "crash"), ("bomb", "memory"), ("raise", "error"), ("few", "error")],
)
def test_a_batch_function_that_fails_masks_the_batch(text, reason, hostile, tiny_tokenizer, make_batch):
    reward = _reward(_batch_config(hostile), tiny_tokenizer, make_batch(["1", text, "22"]))
    assert not reward.graded.any() and not reward.reward_tensor.any()
    assert reward.metrics[f"reward/ungraded_{reason}"] == 3


def test_closing_does_not_wait_for_a_grader(hostile, tiny_tokenizer, make_batch):
    config = with_values(_batch_config(hostile), {"reward_model.batch_timeout_s": 600})
    manager = BatchRewardManager(tiny_tokenizer, config)
    manager.launch(make_batch(["hang"]), "training")
    time.sleep(1)
    start = time.monotonic()
    manager.close()
    assert time.monotonic() - start < 60


def test_a_response_without_a_ground_truth_has_no_grade(tiny_tokenizer, make_batch):
    reward = _reward(_config(), tiny_tokenizer, make_batch([r"\boxed{1}", "None"], truth=None))
    assert not reward.graded.any() and not reward.reward_tensor.any()
    assert reward.metrics["reward/ungraded_error"] == 2


def test_a_function_of_ones_own_sees_the_messages(tmp_path, tiny_tokenizer, make_batch):
    path = tmp_path / "reward.py"
    path.write_text(
        "def compute_score(extra_info, **_):\n"
        "    return len(extra_info['raw_prompt'][0]['content']) + extra_info.get('index', 0)\n",
        encoding="utf-8",
    )
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "hello"}]]
    batch = make_batch(["a", "b"], raw_prompt=messages, extra_info=[{"index": 10}, None])
    reward = _reward(_config(custom=str(path)), tiny_tokenizer, batch)
    assert reward.reward_tensor.sum(-1).tolist() == [12, 5]


def test_a_run_that_never_gets_a_grade_ends(hostile, tiny_tokenizer, make_batch):
    manager = PrimeRewardManager(tiny_tokenizer, _config(custom=hostile))
    bad, good = make_batch(["raise"] * 2), make_batch(["raise", "1"])
    try:
        for batch in (bad, bad, good, bad, bad):
            manager.launch(batch, "training").result()
        with pytest.raises(UserError, match=r"no response of the last 3 batches .* 2 of 2 error, ValueError"):
            manager.launch(bad, "training").result()
    finally:
        manager.close()


def test_batches_without_a_grade_are_counted_by_what_they_are_for(hostile, tiny_tokenizer, make_batch):
    manager = PrimeRewardManager(tiny_tokenizer, _config(custom=hostile))
    bad, good = make_batch(["raise"]), make_batch(["1"])
    try:
        for batch, purpose in ((bad, "training"), (good, "validation"), (bad, "baselines"), (bad, "training")):
            manager.launch(batch, purpose).result()
        with pytest.raises(UserError, match=r"no response of the last 3 batches of training could be graded"):
            manager.launch(bad, "training").result()
    finally:
        manager.close()


def test_grading_goes_on_while_nobody_waits(tmp_path, tiny_tokenizer, make_batch):
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\ndef compute_score(**_):\n    time.sleep(0.5)\n    return {'score': 0.0, 'acc': True}\n",
        encoding="utf-8",
    )
    manager = PrimeRewardManager(tiny_tokenizer, _config(custom=str(path), workers=2))
    try:
        manager.launch(make_batch(["", ""]), "training").result()
        waited = manager.launch(make_batch(["", ""]), "training").result()
        pending = manager.launch(make_batch(["", ""]), "training")
        wait_until(lambda: all(future.done() for future in pending._futures), "all is graded")
        overlapped = pending.result()
    finally:
        manager.close()
    assert waited.metrics["timing_s/reward_wait"] > 0.4
    assert overlapped.metrics["timing_s/reward"] > 0.4
    assert overlapped.metrics["timing_s/reward_wait"] < 0.1
    assert overlapped.correct.all()


def test_of_a_prompts_responses_short_right_ones_gain_and_long_ones_lose(tiny_tokenizer, make_batch):
    right = r"\boxed{1+2+3+4}"
    texts = [right, right + "x" * 8, right + "x" * 16, r"\boxed{1}".rjust(len(right) + 12, "x"), right, right + "y" * 9]
    batch = make_batch(texts, uid=["a", "b", "a", "a", "c", "b"])
    reward = _reward(_config(length_penalty=True, length_penalty_coeff=0.4), tiny_tokenizer, batch)
    lengths = [len(tiny_tokenizer.encode(text)) for text in texts]
    wrong = 0.4 * (0.5 - (lengths[3] - lengths[0]) / (lengths[2] - lengths[0]))
    assert wrong < 0
    assert reward.reward_tensor.sum(-1).tolist() == pytest.approx([1.2, 1.2, 0.8, wrong, 1, 0.8])
    assert reward.correct.tolist() == [1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("lengths", "correct", "expected"),
    [
        ([10, 20, 30], [1, 1, 1], [0.5, 0, -0.5]),
        ([10, 20, 30], [0, 0, 0], [0, 0, -0.5]),
        ([7, 7, 7], [1, 0, 1], [0, 0, 0]),
        ([7], [1], [0]),
        ([0, 4], [1, 0], [0.5, -0.5]),
    ],
)
def test_length_reward_is_that_of_kimi(lengths, correct, expected):
    found = length_reward(torch.tensor(lengths), torch.tensor(correct), np.array(["a"] * len(lengths)))
    assert found.tolist() == expected


def test_dapo_punishes_the_last_tokens_before_the_limit(tiny_tokenizer, make_batch):
    reward = _reward(_config("dapo"), tiny_tokenizer, make_batch(["x" * 30, "x" * 35, "x" * 40]))
    assert reward.reward_tensor.sum(-1).tolist() == pytest.approx([0, -0.5, -1])


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="data_source 'poetry'"):
        rows = [("a: row 0", "make10", {"ground_truth": "1"}), ("a: row 1", "poetry", {})]
        check_gradable(rows, _config().custom_reward_function)
    with pytest.raises(UserError, match=r"custom_reward_function\.path"):
        check_gradable([("a: row 0", "poetry", {})], _config(custom=str(tmp_path / "none.py")).custom_reward_function)


@pytest.mark.parametrize(
    ("reward_model", "message"),
    [
        (None, r"a\.parquet: row 7: 'reward_model' must be"),
        ({"style": "rule"}, r"a\.parquet: row 7: 'reward_model' has no ground_truth"),
        ({"ground_truth": {"target": None}}, r"a\.parquet: row 7: 'reward_model' has no ground_truth"),
        ({"ground_truth": " "}, r"a\.parquet: row 7: 'reward_model' has no ground_truth"),
        ({"ground_truth": ["1", "2"]}, r"a\.parquet: row 7: 'reward_model' has no ground_truth"),
    ],
)
def test_a_row_without_an_answer_is_named(reward_model, message):
    rows = [("row", "make10", {"ground_truth": 0}), ("row", "make10", {"ground_truth": {"target": "0"}})]
    check_gradable(rows, _config().custom_reward_function)
    with pytest.raises(UserError, match=message):
        check_gradable([("a.parquet: row 7", "make10", reward_model)], _config().custom_reward_function)


def test_a_box_inside_thinking_is_not_graded_where_tags_are_special_tokens(tiny_tokenizer, make_batch):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    batch = make_batch([r"<think>\boxed{7}</think>so", r"<think>no</think>\boxed{7}"], "7", data_source=["math"] * 2)
    assert "think" not in tokenizer.decode(batch.batch["responses"][0], skip_special_tokens=True)
    assert _reward(_config(), tokenizer, batch).correct.tolist() == [0.0, 1.0]
