"""Equations of curves: the same one solved for another letter, expanded or multiplied by a number."""

from __future__ import annotations

import random

from sympy import Expr, Rational, cancel, fraction, together

from xbai.grading.expression import read_expression

_POINTS = 12
_DIGITS = 50
_TOLERANCE = Rational(1, 10**30)


def same_equation(first: str, second: str) -> bool | None:
    """Whether two LaTeX equations say the same; None where one cannot be read, or more than algebra could decide.

    With all terms on one side, over one denominator (which is then left out), they do if their ratio is a constant.
    That is tried at random points and to many digits: two polynomials of different curves have no constant ratio but
    on a set of measure zero.
    """
    if first.count("'") != second.count("'"):  # Derivatives.
        return False
    left, right = _numerator(first), _numerator(second)
    if left is None or right is None:
        return None
    if left.free_symbols == right.free_symbols:
        constant = _have_constant_ratio(left, right)
        if constant or constant is None:
            return constant
    symbols = left.free_symbols | right.free_symbols
    algebraic = left.is_algebraic_expr(*symbols) and right.is_algebraic_expr(*symbols)
    # y = ln x is x = e^y.
    return False if algebraic else None


def _numerator(equation: str) -> Expr | None:
    """What the equation sets to zero, without its denominator; None unless it holds unknowns."""
    left, _, right = equation.partition("=")
    expression = read_expression(f"{left}-({right})")
    if expression is None or not expression.free_symbols:
        return None
    numerator, denominator = fraction(together(expression))
    if denominator.free_symbols:
        numerator, _ = fraction(cancel(numerator / denominator))
    return numerator


def _have_constant_ratio(left: Expr, right: Expr) -> bool | None:
    """Whether left / right is one number other than zero everywhere; None where they have no values to compare."""
    symbols = sorted(left.free_symbols, key=str)
    choice = random.Random(0)
    ratio = None
    for _ in range(_POINTS):
        point = {symbol: _random_coordinate(choice) for symbol in symbols}
        top, bottom = left.evalf(_DIGITS, subs=point), right.evalf(_DIGITS, subs=point)
        if not (top.is_number and bottom.is_number and top.is_finite and bottom.is_finite):
            return None
        if not top or not bottom:
            return False
        value = top / bottom
        if ratio is None:
            ratio = value
        elif abs(value - ratio) > _TOLERANCE * abs(ratio):
            return False
    return True


def _random_coordinate(choice: random.Random) -> Rational:
    # Both signs, since |x| and x differ at negative ones only.
    return Rational(choice.choice((-1, 1)) * choice.randrange(10**5, 4 * 10**5), 10**5 + 3)
