"""Seeds that follow from others: as good as random in what they are made of, and the same on every platform."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int | str, separator: str = "/", size: int = 8) -> int:
    """A number of `8 * size - 1` bits for what `parts` name, for instance (the run's seed, the question, the sample).

    Runs are to repeat what earlier ones drew, so that each use keeps its `separator` and `size`.
    """
    digest = hashlib.sha256(separator.join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:size], "big") >> 1


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request with a seed: 63 bits, by a hash that costs little for each sample."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
