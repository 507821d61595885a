"""Rewards: where they lie, what a failed grade does, penalties, custom functions."""

import pytest
import torch
from omegaconf import OmegaConf

from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import AdvantageInputs, compute_advantages
from verl.trainer.ppo.reward import check_gradable, load_reward_manager
from xbai.errors import UserError


def _config(manager="prime", custom=None, **trainer):
    return OmegaConf.create(
        {
            "data": {"reward_fn_key": "data_source", "max_response_length": 40},
            "reward_model": {
                "reward_manager": manager,
                "num_workers": 1,
                "timeout_s": 5,
                "overlong_buffer": {"len": 10, "penalty_factor": 1.0},
            },
            "custom_reward_function": {"path": custom, "name": "compute_score"},
            "trainer": {"length_penalty": False, "length_penalty_coeff": 0.1, **trainer},
        }
    )


@pytest.fixture
def make_batch(tiny_tokenizer):
    def make(texts, truth="1 2 3 4"):
        ids = [tiny_tokenizer.encode(text) for text in texts]
        mask = torch.tensor([[t < len(row) for t in range(40)] for row in ids])
        responses = torch.tensor([row + [tiny_tokenizer.pad_token_id] * (40 - len(row)) for row in ids])
        columns = {"data_source": ["make10"] * len(ids), "reward_model": [{"ground_truth": truth}] * len(ids)}
        return DataProto.from_dict({"responses": responses, "response_mask": mask.long()}, columns)

    return make


def _reward(config, tokenizer, batch):
    manager = load_reward_manager(config, tokenizer)
    try:
        return manager(batch)
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


def test_custom_function_that_crashes_or_raises_costs_only_its_sample(tmp_path, tiny_tokenizer, make_batch):
    path = tmp_path / "reward.py"
    path.write_text(
        "import os\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    if solution_str == 'die': os._exit(1)\n"
        "    if solution_str == 'raise': raise ValueError\n"
        "    return {'score': len(solution_str) / 10}\n"
    )
    batch = make_batch(["die", "12345678", "raise", "1"])
    reward = _reward(_config(custom=str(path)), tiny_tokenizer, batch)
    assert reward.graded.tolist() == [False, True, False, True]
    assert reward.reward_tensor.sum(-1).tolist() == pytest.approx([0, 0.8, 0, 0.1])
    assert reward.correct.tolist() == [0, 1, 0, 0]

    inputs = AdvantageInputs(reward.reward_tensor, batch.batch["response_mask"], reward.graded, ["a"] * 4)
    algorithm = OmegaConf.create({"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False})
    advantages, _ = compute_advantages(inputs, algorithm)
    assert advantages[:, 0].tolist() == pytest.approx([0, 0.35, 0, -0.35])


def test_length_penalty_falls_on_right_answers_only(tiny_tokenizer, make_batch):
    texts = [r"\boxed{1+2+3+4}", r"\boxed{1}"]
    reward = _reward(_config(length_penalty=True), tiny_tokenizer, make_batch(texts))
    length = len(tiny_tokenizer.encode(texts[0]))
    assert reward.reward_tensor.sum(-1).tolist() == pytest.approx([1 - 0.1 * length / 40, 0])
    assert reward.correct.tolist() == [1, 0]


def test_dapo_punishes_the_last_tokens_before_the_limit(tiny_tokenizer, make_batch):
    reward = _reward(_config("dapo"), tiny_tokenizer, make_batch(["x" * 30, "x" * 35, "x" * 40]))
    assert reward.reward_tensor.sum(-1).tolist() == pytest.approx([0, -0.5, -1])


def test_unknown_names_are_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(UserError, match="reward_manager=magic"):
        load_reward_manager(_config("magic"), tiny_tokenizer)
    with pytest.raises(UserError, match="data_source 'poetry'"):
        check_gradable([("a: row 0", "make10", {"ground_truth": "1"}), ("a: row 1", "poetry", {})], _config())
    with pytest.raises(UserError, match=r"custom_reward_function\.path"):
        check_gradable([("a: row 0", "poetry", {})], _config(custom=str(tmp_path / "none.py")))


@pytest.mark.parametrize(
    ("reward_model", "message"),
    [
        (None, r"a\.parquet: row 7: 'reward_model' must be"),
        ({"style": "rule"}, r"a\.parquet: row 7: 'reward_model' has no ground_truth"),
        ({"ground_truth": {"target": None}}, r"a\.parquet: row 7: 'reward_model' has no ground_truth"),
    ],
)
def test_a_row_without_an_answer_is_named(reward_model, message):
    check_gradable(
        [("row", "make10", {"ground_truth": 0}), ("row", "make10", {"ground_truth": {"target": "0"}})], _config()
    )
    with pytest.raises(UserError, match=message):
        check_gradable([("a.parquet: row 7", "make10", reward_model)], _config())
