"""Inequalities in one unknown, and the exact real numbers that bound them."""

from __future__ import annotations

import re

import sympy
from sympy.solvers.solveset import solveset

from xbai.grading.expression import read_expression
from xbai.grading.quantity import parse_number

_MAX_OPERATIONS, _MAX_EXPONENT = 30, 4
"""In an inequality that is solved: larger ones can take seconds."""
_MIRRORED = {"<": ">", ">": "<", "==": "==", "<=": ">=", ">=": "<=", "!=": "!="}


def solve_relation(left: str, sign: str, right: str) -> tuple[sympy.Set, str] | None:
    """The real numbers for which a relation holds, and the name of the unknown; None where that is not soon found.

    The sides are LaTeX, and `\\pm` in the right one stands for two numbers; the sign is sympy's (`<=`, `!=`, ...).
    """
    if "\\pm" in right and sign in ("==", "!="):
        first, second = (solve_relation(left, sign, re.sub(r"\\pm ?", case, right)) for case in ("", "-"))
        combine = sympy.Union if sign == "==" else sympy.Intersection
        return (combine(first[0], second[0]), first[1]) if first and second else None
    for side, other, direction in ((left, right, sign), (right, left, _MIRRORED[sign])):
        bound, letter = real_number(other), unknown(side)
        if bound is not None and letter:
            return _beside(bound, direction), letter
    expression = read_expression(f"{left}-({right})")
    if expression is None or not _is_simple(expression):
        return None
    (symbol,) = expression.free_symbols
    if expression.is_rational_function(symbol) and not _has_plain_roots(expression, symbol):
        return None
    try:
        reals = solveset(sympy.Rel(expression, 0, sign), symbol, sympy.S.Reals)
    except (NotImplementedError, ValueError, TypeError):
        return None
    solved = reals in (sympy.S.EmptySet, sympy.S.Reals) or all(
        isinstance(part, (sympy.Interval, sympy.FiniteSet)) for part in sympy.Union.make_args(reals)
    )
    return (reals, symbol.name) if solved else None


def unknown(text: str) -> str | None:
    """The name of an unknown that stands alone."""
    expression = read_expression(text)
    return expression.name if isinstance(expression, sympy.Symbol) else None


def real_number(text: str) -> sympy.Expr | None:
    """An exact real number or an infinity; None where the text is anything else."""
    text = text.strip()
    if text in (r"\infty", r"-\infty"):
        return sympy.oo if text == r"\infty" else -sympy.oo
    number = parse_number(text)
    if number is not None:
        return sympy.Rational(number.numerator, number.denominator)
    expression = read_expression(text)
    return expression if expression is not None and expression.is_number and expression.is_extended_real else None


def _is_simple(expression: sympy.Expr) -> bool:
    """Whether it is made of powers, fractions and absolute values of one unknown, and is short."""
    return (
        len(expression.free_symbols) == 1
        and expression.count_ops() <= _MAX_OPERATIONS
        and expression.atoms(sympy.Function) <= expression.atoms(sympy.Abs)
        and all(power.exp.is_Rational and abs(power.exp) <= _MAX_EXPONENT for power in expression.atoms(sympy.Pow))
    )


def _has_plain_roots(expression: sympy.Expr, symbol: sympy.Symbol) -> bool:
    """Whether numerator and denominator are made of factors of at most two terms or of degree two."""
    polynomials = [sympy.Poly(part, symbol, extension=True) for part in sympy.fraction(sympy.together(expression))]
    factors = [factor for polynomial in polynomials for factor, _ in polynomial.factor_list()[1]]
    return all(factor.degree() <= 2 or len(factor.terms()) <= 2 for factor in factors)


def _beside(bound: sympy.Expr, sign: str) -> sympy.Set:
    """The numbers in one relation to a bound."""
    if sign in ("==", "!="):
        return sympy.FiniteSet(bound) if sign == "==" else sympy.S.Reals - sympy.FiniteSet(bound)
    if sign in ("<", "<="):
        return sympy.Interval(-sympy.oo, bound, right_open=sign == "<")
    return sympy.Interval(bound, sympy.oo, left_open=sign == ">")
