"""Equivalence by computer algebra, of LaTeX that is known to be one answer."""

import logging
import re
from typing import TypeAlias

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from xbai.grading.numeric import same_values
from xbai.grading.quantity import parse_number

# It warns that its time limits are off. They need signals; ours are those of the process (see `GraderPool`).
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX_ONLY = [LatexExtractionConfig(boxed_match_priority=-1)]
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])")
_REPEATING = re.compile(r"\d*\.\d*\\overline\s*\{\d+\}")
_MIXED = re.compile(r"(?<![\d.^_}\\A-Za-z])(\d+)\s*(\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})")
_PRODUCT = re.compile(r"((?<![\d.^_}\\A-Za-z])\d+)\s*(?=\\binom(?![A-Za-z])|\(\d+\))")
_LARGE_BINOMIAL = re.compile(r"\\binom\s*\{\s*(\d{5,})\s*\}\s*\{\s*(\d+)\s*\}")
_INFINITE = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
_MATRIX = sympy.MatrixBase | sympy.MatrixExpr
_IN_NAMES = sympy.Symbol | sympy.Integer | sympy.Mul | sympy.Pow
_TO_BE_DONE = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit)

Parsed: TypeAlias = sympy.Basic | sympy.MatrixBase


def symbolically_equal(answer: str, truth: str) -> bool:
    """Whether two LaTeX expressions mean the same; False where one cannot be read.

    Either side of an approximation (`\\frac{1}{3} \\approx 0.33`) will do.
    """
    sides, true_sides = ([_parse(side) for side in _APPROXIMATELY.split(text)] for text in (answer, truth))
    return any(_equal(side[0], true_side[0]) for side in sides for true_side in true_sides if side and true_side)


def _equal(answer: Parsed, truth: Parsed) -> bool:
    if isinstance(answer, _MATRIX) and isinstance(truth, _MATRIX):
        answer, truth = answer.doit(), truth.doit()
        if isinstance(answer, sympy.MatrixBase) and isinstance(truth, sympy.MatrixBase):
            return answer.shape == truth.shape and all(map(_equal, answer.flat(), truth.flat()))
    elif isinstance(answer, sympy.Expr) and isinstance(truth, sympy.Expr):
        return _same_formulas(answer, truth)
    return _verified(answer, truth)


def _same_formulas(answer: sympy.Expr, truth: sympy.Expr) -> bool:
    if truth.has(sympy.nan, sympy.zoo):
        raise ValueError(f"the right answer is not a number: {truth}")
    # A name of several letters is read as a product of them.
    are_names = _is_name(answer) and _is_name(truth) and any(isinstance(side, sympy.Symbol) for side in (answer, truth))
    if answer == truth or (are_names and _verified(answer, truth)):
        return True
    if answer.has(*_INFINITE) or truth.has(*_INFINITE):
        return answer.has(*_INFINITE) and truth.has(*_INFINITE) and answer.doit() == truth.doit()
    answer, truth = (formula.doit() if formula.has(*_TO_BE_DONE) else formula for formula in (answer, truth))
    same = same_values(answer, truth)
    return _differ_by_zero(answer, truth) if same is None else same


def _differ_by_zero(answer: sympy.Expr, truth: sympy.Expr) -> bool:
    try:
        return sympy.simplify(answer - truth).is_zero is True
    except Exception:  # Of any kind, where a formula makes no sense, like a matrix plus a number.
        return False


def _is_name(formula: sympy.Expr) -> bool:
    """Whether it may be a word that was read as a product of its letters."""
    parts = sympy.preorder_traversal(formula)
    return bool(formula.free_symbols) and all(isinstance(part, _IN_NAMES) for part in parts)


def _verified(answer: Parsed, truth: Parsed) -> bool:
    return verify([truth], [answer], timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)


def _parse(latex: str) -> list[Parsed]:
    return parse(
        f"${_unambiguous(latex)}$",
        extraction_config=_LATEX_ONLY,
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )


def _unambiguous(latex: str) -> str:
    """Repeating decimals and mixed numbers as fractions; a sign in products that the parser takes for mixed numbers."""
    latex = _REPEATING.sub(_as_fraction, latex)
    # Which the parser would calculate, for minutes.
    latex = _LARGE_BINOMIAL.sub(_in_factorials, latex)
    latex = _MIXED.sub(r"(\1+\2)", latex)
    return _PRODUCT.sub(r"\1\\cdot ", latex)


def _as_fraction(repeating: re.Match[str]) -> str:
    number = parse_number(repeating.group())
    return repeating.group() if number is None else rf"\frac{{{number.numerator}}}{{{number.denominator}}}"


def _in_factorials(binomial: re.Match[str]) -> str:
    total, chosen = int(binomial[1]), int(binomial[2])
    return rf"\frac{{{total}!}}{{{chosen}!\cdot {total - chosen}!}}" if chosen <= total else "0"
