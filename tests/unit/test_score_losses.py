"""The laboratory's step labels, against a plain reading of the responses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from score_losses import (
    AgreementWithin,
    TrueLabels,
    equations_hold,
    late_labels,
    soft_labels,
    state_rates,
    trained_loss,
)

from verl.utils.dataset.step_dataset import StepBatch
from xbai.sprm import ScoreObjective

# Of each response its states, and whether it is right (None: not graded). To another prompt, other states.
RESPONSES = [
    ([1, 2, 3], True),
    ([1, 2, 4], False),
    ([1, 5], False),
    ([1, 2], None),
    ([9], True),
    ([8, 7], False),
    ([], False),
]


@pytest.fixture
def batch() -> StepBatch:
    steps = torch.tensor([len(states) for states, _ in RESPONSES])
    return StepBatch(
        features=torch.zeros(int(steps.sum()), 1),
        mask=torch.arange(3) < steps[:, None],
        labels=torch.tensor([float(right or False) for _, right in RESPONSES]),
        graded=torch.tensor([right is not None for _, right in RESPONSES]),
        groups=torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        states=torch.tensor([state for states, _ in RESPONSES for state in states]),
    )


def logits(batch: StepBatch) -> torch.Tensor:
    return torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))


def plain_rates() -> list[list[float]]:
    outcomes: dict[int, list[float]] = {}
    for states, right in RESPONSES:
        for state in states:
            outcomes.setdefault(state, []).extend([] if right is None else [float(right)])
    return [[sum(outcomes[state]) / max(1, len(outcomes[state])) for state in states] for states, _ in RESPONSES]


def test_a_state_is_worth_how_often_it_ends_well(batch):
    rates = state_rates(batch)
    assert [row[kept].tolist() for row, kept in zip(rates, batch.mask)] == [pytest.approx(row) for row in plain_rates()]
    assert not rates[~batch.mask].any()


def test_soft_labels_are_these_rates(batch):
    z, rates = logits(batch), plain_rates()
    terms = [
        F.binary_cross_entropy_with_logits(z[row, step], torch.tensor(rate))
        for row, (_, right) in enumerate(RESPONSES)
        for step, rate in enumerate(rates[row])
        if right is not None
    ]
    assert float(soft_labels(z, batch)) == pytest.approx(float(torch.stack(terms).mean()))


def test_late_labels_leave_out_what_a_wrong_response_shares_with_a_right_one(batch):
    z = logits(batch).requires_grad_()
    late_labels(z, batch).backward()
    counted = [[True, True, True], [False, False, True], [False, True, False], [False] * 3, [True, False, False]]
    assert (z.grad != 0).tolist() == [*counted, [True, True, False], [False] * 3]


def test_a_margin_lies_between_the_published_weighting_and_none(batch):
    z = 3 * logits(batch)
    published, every = trained_loss(ScoreObjective()), trained_loss(ScoreObjective(agreement_weighting=False))
    assert float(AgreementWithin(0.0)(z, batch)) == pytest.approx(float(published(z, batch)))
    assert float(AgreementWithin(100.0)(z, batch)) == pytest.approx(float(every(z, batch)))
    gradients = []
    for margin in (0.0, 1.0, 100.0):
        leaf = z.clone().requires_grad_()
        AgreementWithin(margin)(leaf, batch).backward()
        gradients.append(int((leaf.grad != 0).sum()))
    assert gradients == sorted(gradients) and gradients[0] < gradients[-1]


@pytest.mark.parametrize(
    ("text", "holds"),
    [("Ann has 4.", True), ("so 4 + 3 = 7 pens, 7 x 2 = 14", True), ("7 - 4 = 2", False), ("8 / 2 = 4", True)],
)
def test_equations_are_read(text, holds):
    assert equations_hold(text) == holds
    assert not equations_hold(f"{text}. So 1 + 1 = 3") and not equations_hold(f"{text}. So 6 / 0 = 0")


def test_true_labels_are_those_of_the_states(batch):
    z, sound = logits(batch), {state: state < 4 for state in range(10)}
    labels = torch.tensor([float(state < 4) for states, _ in RESPONSES for state in states])
    expected = F.binary_cross_entropy_with_logits(z[batch.mask], labels)
    assert float(TrueLabels(sound)(z, batch)) == pytest.approx(float(expected))
