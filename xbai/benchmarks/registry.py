"""Benchmarks by name."""

import importlib
import inspect

from xbai.benchmarks.base import Benchmark
from xbai.errors import UserError

BENCHMARKS = {
    "aime24": "xbai.benchmarks.aime:AIME24",
    "aime25": "xbai.benchmarks.aime:AIME25",
    "math500": "xbai.benchmarks.math500:Math500",
    "gsm8k": "xbai.benchmarks.gsm8k:GSM8K",
    "ceval": "xbai.benchmarks.ceval:CEval",
    "livecodebench": "xbai.benchmarks.livecodebench:LiveCodeBench",
    "make10": "xbai.benchmarks.make10:Make10",
    "stories": "xbai.benchmarks.stories:Stories",
}


def get_benchmark(name: str, **selection: str | None) -> Benchmark:
    """The benchmark called `name`; of those that can be cut, the part selected (None: not selected by this).

    Raises:
        UserError: there is none; the error names those there are. Or it cannot be cut in this way.
    """
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    module, class_name = BENCHMARKS[name].split(":")
    benchmark = getattr(importlib.import_module(module), class_name)
    chosen = {key: value for key, value in selection.items() if value is not None}
    if not_its_own := chosen.keys() - inspect.signature(benchmark).parameters.keys():
        raise UserError(f"{', '.join(sorted(not_its_own))}: {name} has no such selection")
    return benchmark(**chosen)
