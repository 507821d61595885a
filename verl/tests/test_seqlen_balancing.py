"""Rows are shared out evenly, by number and by length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.workers.batching.seqlen_balancing import balanced_partitions, rows_by_rank


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4, 6]))
def test_partitions_hold_every_item_once_and_are_equally_large(lengths, parts):
    sets = balanced_partitions(lengths, parts)
    assert sorted(item for items in sets for item in items) == list(range(12))
    assert {len(items) for items in sets} == {12 // parts}
    totals = [sum(lengths[item] for item in items) for items in sets]
    assert max(totals) - min(totals) <= max(lengths)


def test_items_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="5 items"):
        balanced_partitions([1] * 5, 2)


@pytest.mark.parametrize("balance", [True, False])
def test_a_mini_batch_holds_the_same_rows_on_any_number_of_ranks(balance):
    lengths = torch.tensor([9, 1, 8, 2, 7, 3, 6, 4])
    for world_size in (1, 2, 4):
        by_rank = rows_by_rank(lengths, 4, world_size, balance).view(world_size, 2, -1)
        assert sorted(by_rank[:, 0].flatten().tolist()) == [0, 1, 2, 3]
        assert sorted(by_rank[:, 1].flatten().tolist()) == [4, 5, 6, 7]


def test_balancing_evens_out_the_ranks():
    lengths = torch.tensor([9, 8, 2, 1])
    assert lengths[rows_by_rank(lengths, 4, 2, balance=True)].view(2, 2).sum(-1).tolist() == [10, 10]
    assert lengths[rows_by_rank(lengths, 4, 2, balance=False)].view(2, 2).sum(-1).tolist() == [17, 3]
