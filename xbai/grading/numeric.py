"""Whether two formulas have the same value, decided by evaluating them: exactly where they are rational."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

from mpmath import mp, mpf, workprec
from sympy import Abs, Expr, Float, I, Integer, Max, Min, Mul, Pow, Rational

from xbai.grading.evaluator import (
    IMAGINARY_UNIT,
    Evaluator,
    Point,
    TooLargeError,
    UndefinedError,
    UnsupportedError,
    bits,
    exact,
    is_rational,
)

LARGEST_EXACT_BITS = 50_000
"""Rational numbers up to this size are compared exactly."""
LARGEST_IRRATIONAL_BITS = 3_000
"""Others up to this size are compared to as many digits as rational ones would need."""
RELATIVE_BITS = 2_000
"""Beyond it, numbers are compared to this many leading bits."""

SAMPLES = 6
"""Points at which two formulas with variables must agree, of the `ATTEMPTS` that are tried."""
ATTEMPTS = 60
FEWEST_SAMPLES = 3

DECIMALS = 6
RELATIVE_TOLERANCE = 5e-4
"""A decimal must be equal to what it stands for when both are rounded to the decimals, and within this share of it."""


def same_values(first: Expr, second: Expr) -> bool | None:
    """Whether two formulas are equal; None where that cannot be found out by evaluating them.

    Variables are positive: ln(ab) is ln a + ln b. They may be negative, too, where a formula says so by an absolute
    value or the root of a square: |x| is not x. A decimal stands for any number that it approximates (`DECIMALS`).
    """
    try:
        names = sorted(_variables(first) | _variables(second))
        return _same_functions(first, second, names) if names else _same_numbers(first, second)
    except UnsupportedError:
        return None
    except TooLargeError:
        return False


def _same_numbers(first: Expr, second: Expr) -> bool | None:
    decimal, second_decimal = _decimal(first), _decimal(second)
    for number, other, beside in ((decimal, second, second_decimal), (second_decimal, first, decimal)):
        if number is not None and beside is None and number.denominator > 1:
            return _approximates(number, other)
    for real in (True, False):
        try:
            return _agree(first, second, {}, real)
        except UndefinedError:
            continue
    return None


def _approximates(decimal: Fraction, formula: Expr) -> bool:
    try:
        with workprec(200 + min(bits(formula, {}), LARGEST_EXACT_BITS)):
            value, near = Evaluator({}, real=True)(formula), mpf(decimal.numerator) / decimal.denominator
            scale = 10**DECIMALS
            rounded_alike = mp.nint(value * scale) == mp.nint(near * scale)
            return rounded_alike and abs(value - near) <= RELATIVE_TOLERANCE * abs(value)
    except UndefinedError:
        return False


def _same_functions(first: Expr, second: Expr, names: list[str]) -> bool | None:
    in_reals = not (_is_complex(first) or _is_complex(second))
    same = _agree_at_points(first, second, names, real=True) if in_reals else None
    # Formulas like the square root of -x have principal values.
    return _agree_at_points(first, second, names, real=False) if same is None else same


def _agree_at_points(first: Expr, second: Expr, names: list[str], real: bool) -> bool | None:
    """Whether two functions agree where both are defined; None where that is at too few of the points."""
    negative = real and (_is_signed(first) or _is_signed(second))
    # ln x leaves out what ln |x| is meant for.
    domain_counts = _has_absolute_value(first) != _has_absolute_value(second)
    agreed, too_large = 0, False
    for point in _points(names, negative):
        try:
            defined = [_is_defined(formula, point, real) for formula in (first, second)]
            if all(defined):
                if not _agree(first, second, point, real):
                    return False
                agreed += 1
            elif any(defined) and domain_counts:
                return False
        except UndefinedError:  # As it turned out at more digits.
            continue
        except TooLargeError:
            too_large = True
        if agreed == SAMPLES:
            return True
    if agreed >= FEWEST_SAMPLES:
        return True
    return False if too_large else None


def _points(names: list[str], negative: bool) -> Iterator[Point]:
    """Points to compare functions at, the positive ones first; always the same."""
    draw = random.Random(0)
    numbers = (
        lambda: Fraction(draw.randint(1, 999), 101),
        lambda: Fraction(draw.randint(1, 12)),
        lambda: Fraction(draw.randint(1, 100), 101),
        lambda: Fraction(draw.randint(1, 9999), 101),
    )
    for attempt in range(ATTEMPTS):
        number = numbers[attempt % len(numbers)]
        signs = (-1, 1) if negative and attempt % 8 >= 4 else (1,)
        yield {name: number() * draw.choice(signs) for name in names}


def _is_defined(formula: Expr, point: Point, real: bool) -> bool:
    try:
        with workprec(100):
            Evaluator(point, real)(formula)
    except UndefinedError:
        return False
    return True


def _agree(first: Expr, second: Expr, point: Point, real: bool) -> bool:
    """Whether two formulas have one value at a point.

    A rational number written with B bits is no closer to zero than 2^-B, so that the difference of two is decided by
    that many bits; for other numbers, that many and a hundred more are taken for proof.

    Raises:
        UndefinedError: one of them has no value there.
    """
    size = bits(first, point) + bits(second, point)
    rational = is_rational(first) and is_rational(second)
    if size <= (LARGEST_EXACT_BITS if rational else LARGEST_IRRATIONAL_BITS):
        with workprec(3 * size + 300):
            evaluate = Evaluator(point, real)
            return abs(evaluate(first) - evaluate(second)) <= mp.ldexp(1, -size - 100)
    with workprec(2 * RELATIVE_BITS):
        evaluate = Evaluator(point, real, hides_nothing=True)
        value, second_value = evaluate(first), evaluate(second)
        return abs(value - second_value) <= mp.ldexp(max(abs(value), abs(second_value)), -RELATIVE_BITS)


def _decimal(formula: Expr) -> Fraction | None:
    """A decimal, perhaps times a power of ten; None for anything else."""
    if isinstance(formula, Float):
        return exact(formula)
    if not isinstance(formula, Mul):
        return None
    number, decimals = Fraction(1), 0
    for factor in formula.args:
        if isinstance(factor, Float):
            number, decimals = number * exact(factor), decimals + 1
        elif factor == -1:
            number = -number
        elif isinstance(factor, Pow) and factor.base == 10 and factor.exp.is_Integer and abs(factor.exp) < 10**4:
            number *= Fraction(10) ** int(factor.exp)
        else:
            return None
    return number if decimals == 1 else None


def _variables(formula: Expr) -> set[str]:
    return {symbol.name for symbol in formula.free_symbols} - {IMAGINARY_UNIT}


def _is_complex(formula: Expr) -> bool:
    return formula.has(I) or any(symbol.name == IMAGINARY_UNIT for symbol in formula.free_symbols)


def _is_signed(formula: Expr) -> bool:
    """Whether a formula tells negative from positive values of its variables."""
    return _has_absolute_value(formula) or any(map(_is_root_of_square, formula.atoms(Pow)))


def _has_absolute_value(formula: Expr) -> bool:
    return any(part.free_symbols for part in formula.atoms(Abs, Max, Min))


def _is_root_of_square(power: Pow) -> bool:
    square, degree = power.base, power.exp
    is_even_root = isinstance(degree, Rational) and degree.p == 1 and degree.q % 2 == 0
    is_square = isinstance(square, Pow) and isinstance(square.exp, Integer) and square.exp % 2 == 0
    return bool(is_even_root and is_square and square.free_symbols)
