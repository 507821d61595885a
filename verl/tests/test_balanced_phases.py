"""Every phase that computes a batch has its tokens shared out evenly, and leaves the batch in its order."""

from __future__ import annotations

import pytest
import torch

from verl import DataProto
from verl.single_controller.worker_group import deal_rows
from verl.trainer.ppo.phases import MODEL_INPUT_KEYS, Phases

# Four responses to each of five prompts, as alike in length as those to one prompt are.
LENGTHS = torch.tensor([[20, 19, 18, 17], [12, 11, 13, 12], [3, 2, 4, 3], [7, 6, 8, 7], [1, 2, 1, 1]]).flatten()
RANK_TOKENS = "perf/rank_tokens_max_over_mean"


class CountTokens:
    """A method of a worker group: each of `shares` ranks counts the tokens of its rows."""

    def __init__(self, shares: int) -> None:
        self.shares, self.of_rank = shares, []

    def __call__(self, data: DataProto) -> DataProto:
        arguments, collect = deal_rows(self.shares, (data,), {})
        counts = [part.batch["attention_mask"].sum(-1) for (part,), _ in arguments]
        self.of_rank = [int(count.sum()) for count in counts]
        output = collect([DataProto.from_dict({"tokens": count}) for count in counts])
        output.meta_info["metrics"] = {}
        return output


def compute(rows: int, shares: int, balance: bool) -> tuple[DataProto, list[int], dict[str, float]]:
    mask = (torch.arange(20) < LENGTHS[:rows, None]).long()
    batch = DataProto.from_dict({**dict.fromkeys(MODEL_INPUT_KEYS, mask), "kinds": torch.arange(rows)})
    method, metrics = CountTokens(shares), {}
    Phases(balance, responses=4).compute(method, batch, metrics)
    return batch, method.of_rank, metrics


@pytest.mark.parametrize("shares", [2, 4])
def test_ranks_have_as_many_tokens(shares: int) -> None:
    batch, of_rank, metrics = compute(16, shares, balance=True)
    assert torch.equal(batch.batch["tokens"], LENGTHS[:16])
    assert max(of_rank) - min(of_rank) <= 2
    assert metrics[RANK_TOKENS] == pytest.approx(max(of_rank) * shares / sum(of_rank))
    in_order, of_rank, metrics = compute(16, shares, balance=False)
    assert torch.equal(in_order.batch["tokens"], LENGTHS[:16])
    assert metrics[RANK_TOKENS] == pytest.approx(max(of_rank) * shares / sum(of_rank))
    assert metrics[RANK_TOKENS] > 1.3


def test_rows_that_do_not_divide_stay_in_order() -> None:
    batch, of_rank, metrics = compute(18, 4, balance=True)
    assert torch.equal(batch.batch["tokens"], LENGTHS[:18])
    # Filled up with copies of the first two rows.
    assert of_rank[-1] == int(LENGTHS[15:18].sum()) + int(LENGTHS[:2].sum())
    assert not metrics
