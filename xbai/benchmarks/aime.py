"""AIME 2024 and 2025: 30 problems each, whose answers are integers from 0 to 999."""

from xbai.benchmarks.base import MathBenchmark


class AIME24(MathBenchmark):
    """Both papers of 2024."""

    name = data_source = "aime24"


class AIME25(MathBenchmark):
    """Both papers of 2025."""

    name = data_source = "aime25"
