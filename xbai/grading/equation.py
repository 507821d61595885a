"""Equations and inequalities in several unknowns: the same one solved for a letter, expanded or multiplied."""

from __future__ import annotations

import random
import re

from sympy import Expr, Rational, S, cancel, fraction, together

from xbai.grading.expression import read_expression

_RELATION = re.compile(r"[=<>]|\\[lg]e(?![A-Za-z])")
_TURNED = {"<": ">", r"\le": r"\ge"}
_POINTS = 12
_DIGITS = 50
_TOLERANCE = Rational(1, 10**30)


def same_equation(first: str, second: str) -> bool | None:
    """Whether two LaTeX equations (or inequalities) say the same; None where that is not for algebra to decide.

    With all terms on one side, over one denominator (which is then left out), they do if their ratio is a constant,
    for inequalities a positive one. That is tried at random points and to many digits: the ratio of polynomials of
    different curves takes one value on a set of measure zero only.
    """
    if first.count("'") != second.count("'"):  # Derivatives.
        return False
    (left, sign), (right, other_sign) = _one_sided(first), _one_sided(second)
    if left is None or right is None:
        return None
    if sign != other_sign:
        return False
    ratio = _constant_ratio(left, right) if left.free_symbols == right.free_symbols else S.Zero
    if ratio is None:
        return None
    if ratio.is_positive or (sign == "=" and not ratio.is_zero):
        return True
    unknowns = left.free_symbols | right.free_symbols
    # y = ln x is x = e^y, but two curves of polynomials differ.
    return False if left.is_algebraic_expr(*unknowns) and right.is_algebraic_expr(*unknowns) else None


def _one_sided(text: str) -> tuple[Expr | None, str]:
    """What an equation sets to zero (without its denominator) or an inequality above it, if it has unknowns."""
    sides, signs = _RELATION.split(text), _RELATION.findall(text)
    if len(signs) != 1:
        return None, ""
    (sign,) = signs
    if sign in _TURNED:
        sides, sign = sides[::-1], _TURNED[sign]
    expression = read_expression(f"{sides[0]}-({sides[1]})")
    if expression is None or not expression.free_symbols:
        return None, sign
    numerator, denominator = fraction(together(expression))
    if not denominator.free_symbols:
        return expression, sign
    # Where a denominator can be negative, it turns an inequality.
    return (fraction(cancel(numerator / denominator))[0] if sign == "=" else None), sign


def _constant_ratio(left: Expr, right: Expr) -> Expr | None:
    """The number that left / right is everywhere; zero where there is none, None where they have no values."""
    unknowns = sorted(left.free_symbols, key=str)
    choice = random.Random(0)
    ratio = None
    for _ in range(_POINTS):
        point = {unknown: _random_coordinate(choice) for unknown in unknowns}
        top, bottom = left.evalf(_DIGITS, subs=point), right.evalf(_DIGITS, subs=point)
        if not (top.is_number and bottom.is_number and top.is_finite and bottom.is_finite):
            return None
        if not top or not bottom:
            return S.Zero
        value = top / bottom
        if ratio is not None and abs(value - ratio) > _TOLERANCE * abs(ratio):
            return S.Zero
        ratio = value
    return ratio


def _random_coordinate(choice: random.Random) -> Rational:
    # Of both signs, since |x| and x differ at negative ones only.
    return Rational(choice.choice((-1, 1)) * choice.randrange(10**5, 4 * 10**5), 10**5 + 3)
