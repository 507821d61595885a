"""Prompts chosen by their pass rates: what is drawn, what is forgotten, and that a run repeats it."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.checkpoints.folder import read_state, write_state
from verl.trainer.config.check import check_config
from verl.trainer.config.compose import compose_config
from verl.trainer.config.schema import YAML
from verl.trainer.ppo.curriculum import PassRateCurriculum
from xbai.errors import UserError

SIZE, N = 10, 8


class Prompts:
    """A data set of prompts without words, some of whose rows were filtered out."""

    tokenizer = SimpleNamespace(pad_token_id=0)

    def __init__(self, count: int) -> None:
        self._rows = [2 * place + 1 for place in range(count)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, object]:
        ids = torch.ones(3, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids, "position_ids": ids, "row_index": self._rows[place]}

    def values(self, column: str) -> list[int]:
        assert column == "row_index"
        return self._rows


class Policy:
    """Solves each prompt at its own rate."""

    def __init__(self, pass_rates: np.ndarray) -> None:
        self.pass_rates, self._generator = pass_rates, np.random.default_rng(0)

    def answer(self, rows: list[int]) -> torch.Tensor:
        """[rows * N] whether each response is right."""
        rates = self.pass_rates[[row // 2 for row in rows]].repeat(N)
        return torch.from_numpy(self._generator.random(len(rates)) < rates).float()


def steps(curriculum: PassRateCurriculum, policy: Policy, count: int, first: int = 1) -> list[list[int]]:
    """The rows that each of so many steps trains on."""
    drawn, epochs = [], itertools.chain.from_iterable(itertools.repeat(curriculum))
    for step in range(first, first + count):
        curriculum.advance(step)
        rows = next(epochs)["row_index"].tolist()
        correct = policy.answer(rows)
        curriculum.observe(
            step, [row for row in rows for _ in range(N)], correct, torch.ones_like(correct, dtype=torch.bool)
        )
        drawn.append(rows)
    return drawn


def test_prompts_that_are_solved_about_half_of_the_time_are_preferred() -> None:
    # A third are never solved, a third always, as in a run whose data is too hard and too easy for it.
    pass_rates = np.tile([0.0, 0.5, 1.0], 100)
    curriculum = PassRateCurriculum(Prompts(300), SIZE, half_life=2, seed=0)
    drawn = steps(curriculum, Policy(pass_rates), 90)
    assert all(len(set(rows)) == SIZE for rows in drawn)
    share = [np.mean([pass_rates[row // 2] == 0.5 for row in rows]) for rows in drawn]
    assert np.mean(share[:10]) < 0.6
    assert np.mean(share[60:]) > 0.8
    # All were looked at on the way.
    assert len({row for rows in drawn for row in rows}) > 250


def test_it_follows_a_policy_that_learns() -> None:
    policy = Policy(np.repeat([0.5, 0.0], 50))
    curriculum = PassRateCurriculum(Prompts(100), SIZE, half_life=1, seed=1)
    steps(curriculum, policy, 40)
    policy.pass_rates = np.repeat([1.0, 0.5], 50)
    drawn = steps(curriculum, policy, 60, first=41)
    assert np.mean([row // 2 >= 50 for rows in drawn[40:] for row in rows]) > 0.75


def test_what_is_known_is_a_count_that_fades() -> None:
    # An epoch has two steps.
    curriculum = PassRateCurriculum(Prompts(4), 2, half_life=1, seed=0)
    correct, graded = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([True, True, True, False])
    curriculum.observe(1, [3, 3, 3, 3], correct, graded)
    assert curriculum.advance(1) == {"curriculum/prompts_tried": 0.0}
    assert curriculum.advance(2) == {"curriculum/prompts_tried": 0.25, "curriculum/pass_rate": pytest.approx(2 / 3)}
    # However often it is asked in a step, which two groups of rollouts may be sampled in.
    for step in (4, 4):
        assert curriculum.advance(step)["curriculum/pass_rate"] == pytest.approx(2 / 3)
    state = curriculum.state_dict()
    assert state["right"].tolist() == pytest.approx([0, 1, 0, 0])
    assert state["wrong"].tolist() == pytest.approx([0, 0.5, 0, 0])


def test_what_is_left_out_comes_last() -> None:
    curriculum = PassRateCurriculum(Prompts(6), 4, half_life=1, seed=0)
    batches = itertools.chain.from_iterable(itertools.repeat(curriculum))
    curriculum.leave_out([1, 3, 5])
    rows = next(batches)["row_index"].tolist()
    assert sorted(rows[:3]) == [7, 9, 11] and rows[3] in (1, 3, 5)
    curriculum.leave_out([])
    assert max(len({1, 3, 5} & {*next(batches)["row_index"]}) for _ in range(9)) > 1


def test_what_is_observed_of_a_step_waits_for_the_next_one() -> None:
    """Rollouts one step ahead are drawn while a step is observed, before or after."""
    state = []
    for is_first in (True, False):
        curriculum = PassRateCurriculum(Prompts(4), 2, half_life=2, seed=0)
        seen = 5, [1, 1], torch.tensor([1.0, 0.0]), torch.tensor([True, True])
        if is_first:
            curriculum.observe(*seen)
        curriculum.advance(5)
        batch = next(iter(curriculum))["row_index"].tolist()
        if not is_first:
            curriculum.observe(*seen)
        curriculum.advance(6)
        state.append((batch, curriculum.state_dict()["right"].tolist(), curriculum.state_dict()["wrong"].tolist()))
    assert state[0] == state[1] and state[0][1] == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("done", [3, 4], ids=["at the end of an epoch", "in the middle of one"])
def test_it_goes_on_from_a_checkpoint_exactly(tmp_path: Path, done: int) -> None:
    pass_rates = np.linspace(0, 1, 35)
    first = PassRateCurriculum(Prompts(35), SIZE, half_life=5, seed=3)
    # An epoch has three batches.
    steps(first, Policy(pass_rates), done)
    write_state(first.state_dict(), tmp_path)
    second = PassRateCurriculum(Prompts(35), SIZE, half_life=5, seed=3)
    second.load_state_dict(read_state(tmp_path))
    expected, found = (steps(curriculum, Policy(pass_rates), 7, first=done + 1) for curriculum in (first, second))
    assert found == expected
    assert first.state_dict()["batch"] == second.state_dict()["batch"]
    assert len(list(first)) == -(done + 7) % 3 and len(list(first)) == len(first) == 3


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.curriculum.half_life=10"], "acts only with data.curriculum.enable=true"),
        (["data.curriculum.enable=true", "data.curriculum.half_life=0"], "data.curriculum.half_life"),
        (["data.curriculum.enable=true", "data.shuffle=false"], "data.shuffle=false keeps the order of the files"),
        (["data.curriculum.enable=true", "data.dataloader_num_workers=2"], "data.dataloader_num_workers=2 cannot act"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(small_run: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(compose_config(YAML, [*small_run, *overrides]))
