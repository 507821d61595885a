"""MATH-500 (Lightman et al., arXiv 2305.20050): 500 competition problems with LaTeX answers."""

from xbai.benchmarks.base import MathBenchmark


class Math500(MathBenchmark):
    """Reads the Hub dataset's own layout (`problem`, `answer`) and the usual ones."""

    name = data_source = "math500"
