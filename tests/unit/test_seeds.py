"""Seeds that follow from others."""

from __future__ import annotations

from xbai.seeds import derived_seed, sample_seed


def test_sample_seeds_are_distinct_and_fixed() -> None:
    seeds = {sample_seed(seed, index) for seed in range(-2, 30) for index in range(30)}
    assert len(seeds) == 32 * 30
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2) == 8705518154548660899


def test_derived_seeds_are_distinct_and_fixed() -> None:
    for size in (4, 8):
        seeds = {derived_seed(seed, *parts, size=size) for seed in range(9) for parts in ((1, 23), (12, 3), (123,))}
        assert len(seeds) == 27
        assert all(0 <= seed < 2 ** (8 * size - 1) for seed in seeds)
    assert derived_seed(1, 2, 8) == 2921703118194192410, (
        "of the samples of question 2 from sample 8 on, in a run of seed 1"
    )
    assert derived_seed(1, "validation", 7, separator=":", size=4) == 144660325, "of row 7, in a training run of seed 1"
