"""Rows that hold the same tokens are computed once, and count as often as they are there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import padded_rows, tiny_lm
from torch import Tensor

from verl.models.identical_rows import DistinctRows, sum_over_kinds
from verl.models.joint_model import JointModel
from verl.models.loading import attention_for
from verl.models.packing import packed_layout, padded_layout
from verl.models.value_model import ValueModel
from verl.workers.batching.seqlen_balancing import balanced_partitions, rows_by_rank
from xbai.sprm import ScoreHead

LAYOUTS = {False: padded_layout, True: packed_layout}
COPIES = [4, 0, 0, 7, 4, 0, 1]
"""Rows of `padded_rows` that a batch is made of."""


def batch_of(rows: list[int]) -> dict[str, Tensor]:
    batch = {name: column[rows] for name, column in padded_rows(torch.Generator().manual_seed(0)).items()}
    return batch | {"step_feature_mask": batch["attention_mask"].bool() & (batch["input_ids"] % 3 == 0)}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=12))
def test_rows_differ_by_tokens_or_by_padding(rows: list[tuple[int, int]]) -> None:
    tokens, masks = (torch.tensor(column)[:, None].expand(-1, 3) for column in zip(*rows))
    distinct = DistinctRows.of({"input_ids": tokens, "attention_mask": masks})
    assert distinct.rows.tolist() == [rows.index(row) for row in dict.fromkeys(rows)]
    assert [rows[distinct.rows[kind]] for kind in distinct.kinds] == rows
    assert sorted(row for members in distinct.members() for row in members) == list(range(len(rows)))
    lengths = torch.tensor([10 * first + second for first, second in rows])
    assert sum_over_kinds(lengths, distinct.kinds) == sum(10 * first + second for first, second in set(rows))


@pytest.mark.parametrize("packed", LAYOUTS)
def test_outputs_and_gradients_are_those_of_rows_alone(packed: bool) -> None:
    lm = tiny_lm()
    lm.set_attn_implementation(attention_for(torch.float32, packed))
    model, batch, layout = JointModel(lm, ScoreHead(32, dropout=0.0)), batch_of(COPIES), LAYOUTS[packed]
    together = layout(batch)
    assert len(together.predictors) == int(batch["response_mask"][[0, 1, 3, 6]].sum())

    def loss_of(rows: slice, whole_weights: Tensor, step_weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        part = {name: column[rows] for name, column in batch.items()}
        made = layout(part)
        output = model(made, compute_entropy=True)
        weights = made.tokens(whole_weights[rows])
        loss = (weights * (output.log_probs + output.entropy)).sum()
        loss = loss + (made.steps(step_weights[rows]) * output.step_logits).sum()
        return loss, [made.restore_tokens(output.log_probs), made.restore_steps(output.step_logits)]

    torch.manual_seed(1)
    weights, step_weights = torch.randn(batch["response_mask"].shape), torch.randn(batch["input_ids"].shape)
    alone = [loss_of(slice(row, row + 1), weights, step_weights) for row in range(len(COPIES))]
    sum(loss for loss, _ in alone).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss, outputs = loss_of(slice(None), weights, step_weights)
    loss.backward()
    for whole, *parts in zip(outputs, *(outputs for _, outputs in alone)):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_the_critic_values_every_copy() -> None:
    model, batch = ValueModel(tiny_lm().model, torch.nn.Linear(32, 1)), batch_of(COPIES)
    layout = padded_layout(batch)
    values = layout.restore_tokens(model(layout))
    for kind in DistinctRows.of(batch).members():
        assert all(torch.equal(values[row], values[kind[0]]) for row in kind)
        assert values[kind[0]].abs().sum() > 0


@given(st.lists(st.integers(0, 3), min_size=16, max_size=16), st.sampled_from([1, 2, 4]))
def test_ranks_share_rows_evenly_and_kinds_seldom(kinds: list[int], ranks: int) -> None:
    lengths = [100 + kind for kind in kinds]
    parts = balanced_partitions(lengths, ranks, kinds=kinds)
    assert sorted(row for part in parts for row in part) == list(range(16))
    assert {len(part) for part in parts} == {16 // ranks}
    # A kind is cut only where a rank is full, which happens once a rank.
    assert sum(len({kinds[row] for row in part}) for part in parts) <= len(set(kinds)) + ranks - 1


def test_a_prompts_identical_responses_go_to_one_rank() -> None:
    kinds = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    order = rows_by_rank(torch.full((8,), 5), 8, 2, balance=True, kinds=kinds)
    assert [set(part.tolist()) for part in kinds[order].chunk(2)] in ([{0}, {1}], [{1}, {0}])
