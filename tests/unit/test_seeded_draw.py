"""The random numbers of seeds, and the tokens that they choose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from xbai.engine import seeded_draw
from xbai.engine.seeded_draw import draw_tokens, uniforms
from xbai.seeds import sample_seed


def numbers(seeds: list[int], positions: int) -> Tensor:
    """[seeds, positions]."""
    each = [uniforms(np.array(seeds, np.uint64), np.full(len(seeds), i, np.uint64)) for i in range(positions)]
    return torch.stack(each, dim=1)


def distance_from_chance(counts: Tensor, expected: Tensor | float) -> float:
    """How many standard deviations chi-square lies above or below what chance makes of it."""
    classes = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - classes) / (2 * classes) ** 0.5)


def cells(*coordinates: Tensor, sides: int) -> Tensor:
    """How many points of the unit square or cube, of these coordinates, lie in each of its cells."""
    index = torch.zeros_like(coordinates[0], dtype=torch.long)
    for coordinate in coordinates:
        index = index * sides + (coordinate * sides).long()
    return index.flatten().bincount(minlength=sides ** len(coordinates))


def test_the_stream_of_a_seed_is_splitmix64() -> None:
    # The first outputs of the authors' implementation for the seed 1234567, of which doubles keep 53 bits.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert numbers([1234567], 4)[0].tolist() == [(bits >> 11) * 2.0**-53 for bits in published]
    assert numbers([2**64 - 1, 0], 3).min() >= 0


@pytest.mark.parametrize("kind", ["samples", "consecutive"])
def test_numbers_are_uniform_and_independent(kind: str) -> None:
    """Of positions within a stream, of streams at a position: singly, in pairs and in threes."""
    seeds = [sample_seed(7, i) for i in range(512)] if kind == "samples" else list(range(512))
    found = numbers(seeds, 512)
    assert found.min() >= 0
    assert found.max() < 1
    count = found.numel()
    checks = {
        "all": (found,),
        "next position": (found[:, :-1], found[:, 1:]),
        "next seed": (found[:-1], found[1:]),
        "distant": (found[:-64, :-64], found[64:, 64:]),
        "three positions": (found[:, :-2], found[:, 1:-1], found[:, 2:]),
        "low bits": (found * 2**20 % 1,),
    }
    for name, coordinates in checks.items():
        sides = {1: 4096, 2: 64, 3: 16}[len(coordinates)]
        counts = cells(*coordinates, sides=sides)
        expected = coordinates[0].numel() / counts.numel()
        assert abs(distance_from_chance(counts, expected)) < 4, name
    # Each stream and each position alone, which the whole might hide.
    for means in (found.mean(0), found.mean(1)):
        assert ((means - 0.5).abs() * (12 * 512) ** 0.5).max() < 4.5
    assert found.flatten().unique().numel() == count


def test_tokens_follow_the_distribution() -> None:
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1.5
    logits[::7] = float("-inf")
    count = 40_000
    drawn = draw_tokens(logits.expand(count, 64), numbers(list(range(count)), 1)[:, 0]).bincount(minlength=64)
    expected = count * logits.double().softmax(-1)
    assert not drawn[::7].any()
    kept = expected > 0
    assert abs(distance_from_chance(drawn[kept], expected[kept])) < 4


def test_tokens_are_those_of_the_distribution_function_at_full_size() -> None:
    """Against float64, for a vocabulary as large as they come, with likely tokens and all that are not."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 151936, generator=generator) * torch.linspace(0, 6, 64)[:, None]
    picks = numbers(list(range(64)), 1)[:, 0]
    function = logits.double().softmax(-1).cumsum(-1)
    drawn = draw_tokens(logits, picks)
    below = torch.where(drawn > 0, function.gather(1, (drawn - 1).clamp(min=0)[:, None])[:, 0], 0)
    above = function.gather(1, drawn[:, None])[:, 0]
    # float32's exponential is off by a few parts in ten million.
    assert (below - 1e-6 <= picks).all()
    assert (picks <= above + 1e-6).all()


def test_ends_of_the_unit_interval_choose_possible_tokens() -> None:
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, 1.0, -inf]]).repeat(2, 1)
    assert draw_tokens(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 2]
    flat = torch.zeros(1, 2**18)
    assert draw_tokens(flat, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).tolist() == [2**18 - 1]


def test_a_row_is_drawn_alike_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, picks = torch.randn(33, 5000) * 3, torch.rand(33, dtype=torch.float64)
    whole = draw_tokens(logits, picks)
    order = torch.randperm(33)
    assert draw_tokens(logits[order], picks[order]).equal(whole[order])
    assert torch.cat([draw_tokens(logits[i : i + 1], picks[i : i + 1]) for i in range(33)]).equal(whole)
    for elements in (1, 20_000, 10**9):
        monkeypatch.setattr(seeded_draw, "_CPU_ELEMENTS", elements)
        assert draw_tokens(logits, picks).equal(whole)
