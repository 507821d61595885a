"""Equivalence by computer algebra: math-verify on LaTeX that is known to be one answer."""

import logging

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

# It warns that its time limits are off. They need signals; ours are those of the process (see `GraderPool`).
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX_ONLY = [LatexExtractionConfig(boxed_match_priority=-1)]


def symbolically_equal(answer: str, truth: str) -> bool:
    """Whether two LaTeX expressions mean the same; False where one cannot be read."""
    parsed_answer, parsed_truth = _parse(answer), _parse(truth)
    if not parsed_answer or not parsed_truth:
        return False
    return verify(parsed_truth, parsed_answer, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)


def _parse(latex: str) -> list[Basic | MatrixBase | str]:
    return parse(
        f"${latex}$",
        extraction_config=_LATEX_ONLY,
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )
