"""Off-policy correction against plain Python in float64, and what it adds to a batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tiny import ppo_defaults
from torch import Tensor

from verl.trainer.config.fields import with_values
from verl.trainer.ppo.off_policy import ImportanceSampling, effective_sample_size, geometric_mean_ratios
from verl.trainer.ppo.policy_columns import add_policy_columns

LONGEST, END = 5, 2
quick = settings(max_examples=50, deadline=None)
log_probs = st.floats(-3, 0, width=32)
batches = st.lists(
    st.lists(st.tuples(log_probs, log_probs), min_size=0, max_size=LONGEST), min_size=1, max_size=5
).filter(any)
Rows = list[list[tuple[float, float]]]
"""Of each token the trainer's log-prob and the engine's."""
levels = pytest.mark.parametrize("level", ["token", "sequence"])
modes = pytest.mark.parametrize("mode", ["truncate", "mask"])


def columns(rows: Rows, padding: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """Trainer's and engine's log-probs, and the mask, [B, R]."""
    mask = torch.arange(LONGEST) < torch.tensor([len(row) for row in rows])[:, None]
    padded = torch.tensor([row + [(padding, padding)] * (LONGEST - len(row)) for row in rows])
    return padded[..., 0], padded[..., 1], mask


def plain_ratios(rows: Rows, level: str) -> list[float]:
    """Of all tokens, or of all responses with a token, in their order."""
    differences = [[trainer - engine for trainer, engine in row] for row in rows if row]
    if level == "sequence":
        return [math.exp(sum(row)) for row in differences]
    return [math.exp(value) for row in differences for value in row]


def plain_weight(ratio: float, mode: str, lower: float, upper: float) -> float:
    if mode == "truncate":
        return min(ratio, upper)
    return ratio if lower <= ratio <= upper else 0.0


def is_on_a_bound(ratio: float, *bounds: float) -> bool:
    """Where rounding decides."""
    return any(math.isclose(ratio, bound, rel_tol=1e-5) for bound in bounds)


@levels
@modes
@quick
@given(rows=batches, upper=st.floats(1.1, 4), lower=st.none() | st.floats(0.1, 0.9))
def test_weights(level: str, mode: str, rows: Rows, upper: float, lower: float | None) -> None:
    sampling, (old, rollout, mask) = ImportanceSampling(level, mode, upper, lower), columns(rows)
    ratios = sampling.ratios(old, rollout, mask)
    weights = sampling.weights(ratios)
    assert ratios.shape == weights.shape == ((len(rows), 1) if level == "sequence" else mask.shape)
    assert ratios.dtype == weights.dtype == torch.float32
    counted = mask.any(-1, keepdim=True) if level == "sequence" else mask
    expected = plain_ratios(rows, level)
    assert ratios[counted].tolist() == pytest.approx(expected, rel=1e-5)
    bounds = 1 / upper if lower is None else lower, upper
    for weight, ratio in zip(weights[counted].tolist(), expected):
        if not is_on_a_bound(ratio, *bounds):
            assert weight == pytest.approx(plain_weight(ratio, mode, *bounds), rel=1e-5)


@quick
@given(rows=batches)
def test_geometric_mean_ratios(rows: Rows) -> None:
    expected = [math.exp(sum(a - b for a, b in row) / max(len(row), 1)) for row in rows]
    assert geometric_mean_ratios(*columns(rows)).tolist() == pytest.approx(expected, rel=1e-5)


@levels
def test_where_engine_and_trainer_agree_everything_weighs_1(level: str) -> None:
    old, _, mask = columns([[(-1.0, -1.0)] * 4, [(-0.3, -0.3)]])
    for mode in ("truncate", "mask"):
        sampling = ImportanceSampling(level, mode, 1.5)
        assert (sampling.weights(sampling.ratios(old, old, mask)) == 1).all()
    assert (geometric_mean_ratios(old, old, mask) == 1).all()


def test_the_product_over_a_long_response_stays_finite() -> None:
    old, mask = torch.zeros(2, 1000), torch.ones(2, 1000, dtype=torch.bool)
    rollout = torch.tensor([[-5.0], [5.0]]).expand(2, 1000)
    ratios = ImportanceSampling("sequence", "truncate", 2.0).ratios(old, rollout, mask)
    assert ratios.isfinite().all() and ratios[0] > 1e8 and 0 < ratios[1] < 1e-8


@quick
@given(st.lists(st.floats(0, 4, width=32), min_size=1, max_size=9).filter(any))
def test_effective_sample_size(weights: list[float]) -> None:
    expected = sum(weights) ** 2 / (len(weights) * sum(weight * weight for weight in weights))
    assert effective_sample_size(torch.tensor(weights)) == pytest.approx(expected, rel=1e-6)
    assert expected <= 1 + 1e-9 and math.isnan(effective_sample_size(torch.zeros(2)))


def make_columns(rows: Rows, **changes: Tensor) -> TensorDict:
    """Of a graded batch; all responses end but those that fill their columns, of which the first one does, too."""
    old, rollout, mask = columns(rows, padding=0.0)
    responses = torch.full(mask.shape, 7)
    responses[torch.arange(len(mask)), mask.sum(-1) - 1] = END
    responses[mask.all(-1).nonzero().flatten()[1:], -1] = 7
    named = {"old_log_probs": old, "rollout_log_probs": rollout, "response_mask": mask, "responses": responses}
    return TensorDict({**named, "graded": torch.ones(len(rows), dtype=torch.bool), **changes}, batch_size=[len(rows)])


def add(batch: TensorDict, **actor: object) -> dict[str, float]:
    return add_policy_columns(batch, with_values(ppo_defaults().actor_rollout_ref.actor, actor), [END])


NEAR, FAR = [(-1.0, -1.05)] * LONGEST, [(-1.0, -1.4)] * 3


def test_nothing_is_added_where_nothing_is_asked_for() -> None:
    batch = make_columns([NEAR, FAR])
    names = set(batch.keys())
    assert add(batch) == {} and set(batch.keys()) == names


def test_truncated_and_far_responses_take_no_part() -> None:
    batch = make_columns([NEAR, NEAR, FAR, [(-1.0, -0.6)]], graded=torch.tensor([True, True, False, True]))
    metrics = add(batch, mask_truncated_responses=True)
    assert batch["in_policy_loss"].tolist() == [True, False, True, True], "the second of those that fill their columns"
    assert metrics == {"actor/responses_in_policy_loss": pytest.approx(2 / 3)}
    metrics = add(batch, mask_truncated_responses=True, rollout_rs_geo_threshold=1.2)
    assert batch["in_policy_loss"].tolist() == [True, False, False, False]
    assert metrics == {
        "rollout_rs/masked_fraction": 0.5,
        "actor/responses_in_policy_loss": pytest.approx(1 / 3),
    }


@levels
@modes
def test_metrics_are_of_what_is_in_the_loss(level: str, mode: str) -> None:
    rows = [[(-1.0, -1.5), (-2.0, -1.0)], [(-1.0, -1.1)], FAR, [(0.0, -3.0)]]
    batch = make_columns(rows, graded=torch.tensor([True, True, True, False]))
    metrics = add(batch, rollout_is=level, rollout_is_mode=mode, rollout_is_threshold=1.3)
    ratios = plain_ratios(rows[:3], level)
    weights = [plain_weight(ratio, mode, 1 / 1.3, 1.3) for ratio in ratios]
    expected = {
        "mean": sum(ratios) / len(ratios),
        "max": max(ratios),
        "weight_mean": sum(weights) / len(weights),
        "weight_max": max(weights),
        f"{mode.removesuffix('e')}ed_fraction": sum(a != b for a, b in zip(weights, ratios)) / len(ratios),
        "effective_sample_size": sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights)),
    }
    assert metrics == pytest.approx({f"rollout_is/{name}": value for name, value in expected.items()})
    assert 0 < metrics[f"rollout_is/{mode.removesuffix('e')}ed_fraction"] < 1


def test_the_shorthand_is_truncation_of_tokens() -> None:
    short, long = make_columns([NEAR, FAR]), make_columns([NEAR, FAR])
    assert add(short, tis_imp_ratio_cap=1.2) == add(long, rollout_is="token", rollout_is_threshold=1.2)
    assert torch.equal(short["importance_weights"], long["importance_weights"])


def test_a_batch_that_is_left_out_whole_is_no_number() -> None:
    metrics = add(make_columns([FAR]), rollout_rs_geo_threshold=1.01, rollout_is="token")
    assert metrics["actor/responses_in_policy_loss"] == 0 and math.isnan(metrics["rollout_is/mean"])
