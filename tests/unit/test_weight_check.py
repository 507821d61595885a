"""Checksums of weights: what they must notice, and what they must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xbai.engine import Engine, load_engine, weight_check
from xbai.engine.weight_check import checksum
from xbai.errors import UserError

NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_depends_on_every_value_and_its_place(dtype: torch.dtype):
    weight = torch.randn(7, 5).to(dtype)
    expected = checksum(weight, dtype)
    assert checksum(weight.T.contiguous().T, dtype) == expected
    assert checksum(weight.flip(0), dtype) != expected
    assert checksum(weight.T, dtype) != expected
    for row in range(7):
        changed = weight.clone()
        changed[row, row % 5] *= 1.01
        assert checksum(changed, dtype) != expected
    assert checksum(torch.tensor([0.0, 1.0]), dtype) == checksum(torch.tensor([-0.0, 1.0]), dtype)
    assert checksum(weight.double(), dtype) == expected


def test_a_checksum_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(9, 4)
    expected = checksum(weight, torch.float32)
    monkeypatch.setattr(weight_check, "_CHUNK_VALUES", 10)
    assert checksum(weight, torch.float32) == expected


@pytest.fixture
def engine(tiny_model_dir: Path) -> Engine:
    return load_engine("hf", tiny_model_dir, dtype="float32")


def test_a_weight_that_changes_on_the_way_is_named(
    engine: Engine, make_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    other = load_engine("hf", make_tiny_model(seed=1), dtype="float32")
    weights = {name: next(held.copies()).detach() for name, held in other._held_weights().items()}
    engine.update_weights(weights.items(), check=True)

    load = engine._load_weights

    def change(name: str, weight: Tensor) -> Tensor:
        return weight + torch.eye(1, len(weight))[0] if name == NORM else weight

    monkeypatch.setattr(engine, "_load_weights", lambda given: load((n, change(n, w)) for n, w in given))
    engine.update_weights(weights.items())
    with pytest.raises(UserError, match=f"^weight sync: {NORM} is not in the engine as it was sent"):
        engine.update_weights(weights.items(), check=True)
