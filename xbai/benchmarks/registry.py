"""Benchmarks by name."""

import importlib

from xbai.benchmarks.base import Benchmark
from xbai.errors import UserError

BENCHMARKS = {
    "aime24": "xbai.benchmarks.aime:AIME24",
    "aime25": "xbai.benchmarks.aime:AIME25",
    "math500": "xbai.benchmarks.math500:Math500",
    "gsm8k": "xbai.benchmarks.gsm8k:GSM8K",
    "ceval": "xbai.benchmarks.ceval:CEval",
    "make10": "xbai.benchmarks.make10:Make10",
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`.

    Raises:
        UserError: there is none; the error names those there are.
    """
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    module, class_name = BENCHMARKS[name].split(":")
    return getattr(importlib.import_module(module), class_name)()
