"""Formulas by their values: equal formulas have the same fingerprint, however they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from sympy import Expr, Float, I, MatrixBase, Rational, Symbol, nan
from sympy.core.evalf import PrecisionExhausted

from xbai.grading.expression import to_sympy

DIGITS = 40
_GUARD_DIGITS = 20
_LARGEST_DENOMINATOR = 10**9
_LARGEST_FRACTION = 10**12
"""Up to this denominator and this size a value that is a fraction to all its digits is one."""
_LARGEST_BITS = 10_000
_START, _STEP = Rational(131, 97), Rational(29, 53)
"""The first variable's size at each point, and the way from one to the next."""
_SIGNS = (lambda _: 1, lambda _: -1, lambda index: (-1) ** index, lambda index: (-1) ** (index // 2))
"""Of the variables at each point: |x| is not x, |xy| is not xy."""
# The parser adds numbers that stand side by side, as if each pair were a mixed number.
_PRODUCT = re.compile(r"(?:(?<![_\d])\d+|\)) ?(?=[({]|\\binom)|\} ?(?=\\binom)|\) ?(?=\d)")


def fingerprint(latex: str) -> Fraction | str | None:
    """The value of a constant, exactly where it is rational; of a formula, its variables and its values at points.

    Values are given to `DIGITS` significant digits, as pairs of real and imaginary part. None where the text is no
    formula, or has no value, or one too large to be written out. May take for ever.
    """
    parsed = _parse(latex)
    if isinstance(parsed, MatrixBase):
        entries = [_of_formula(entry) for entry in parsed.flat()]
        return None if None in entries else f"matrix {parsed.shape} {entries}"
    return _of_formula(parsed) if isinstance(parsed, Expr) else None


def _parse(latex: str) -> object:
    try:
        parsed = to_sympy(_PRODUCT.sub(r"\g<0>\\cdot ", latex))
    except Exception:
        return None
    return parsed.doit() if isinstance(parsed, Expr | MatrixBase) else None


def _of_formula(formula: Expr) -> Fraction | str | None:
    # Decimals are as exact as they are written.
    formula = formula.xreplace({number: Rational(str(number)) for number in formula.atoms(Float)})
    formula = formula.xreplace({symbol: I for symbol in formula.free_symbols if symbol.name == "i"})
    if formula.is_Rational:
        number = Fraction(int(formula.p), int(formula.q))
        return number if max(number.numerator, number.denominator).bit_length() <= _LARGEST_BITS else None
    variables = sorted(formula.free_symbols, key=str)
    if not variables:
        return _constant(formula)
    texts = []
    for point in _points(variables):
        value = _value(formula.xreplace(point))
        if value is None:
            return None
        texts.append(_text(value))
    return f"{','.join(map(str, variables))}: {' '.join(texts)}"


def _constant(formula: Expr) -> Fraction | str | None:
    value = _value(formula)
    if value is None:
        return None
    real, imaginary = value
    if imaginary == 0 and (number := _as_fraction(real)) is not None:
        return number
    return _text(value)


def _points(variables: list[Symbol]) -> Iterator[dict[Symbol, Rational]]:
    """The positive one first."""
    for sign in _SIGNS:
        yield {variable: sign(index) * (_START + index * _STEP) for index, variable in enumerate(variables)}


def _value(formula: Expr) -> tuple[Expr, Expr] | None:
    """Real and imaginary part; zero where what is left of one is only what rounding leaves."""
    try:
        value = formula.evalf(DIGITS + _GUARD_DIGITS)
        parts = [part.evalf(DIGITS + _GUARD_DIGITS) for part in value.as_real_imag()]
    except (PrecisionExhausted, ArithmeticError, ValueError, TypeError):
        return None
    if not all(part.is_Float or part.is_Rational for part in parts) or nan in parts:
        return None
    largest = max(map(abs, parts))
    parts = [part if abs(part) > largest * Rational(1, 10**DIGITS) else Rational(0) for part in parts]
    return parts[0], parts[1]


def _as_fraction(value: Expr) -> Fraction | None:
    exact = Fraction(int(Rational(value).p), int(Rational(value).q))
    near = exact.limit_denominator(_LARGEST_DENOMINATOR)
    return near if abs(near - exact) <= abs(exact) / 10**DIGITS and abs(near) < _LARGEST_FRACTION else None


def _text(value: tuple[Expr, Expr]) -> str:
    return "{} {}".format(*(str(Float(part, DIGITS)) for part in value))
