"""Whether two formulas have the same value, decided by evaluating them: exactly where they are rational."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction

from mpmath import isfinite, mp, mpc, mpf, workprec
from sympy import (
    Abs,
    Add,
    Expr,
    Float,
    Function,
    I,
    Max,
    Min,
    Mod,
    Mul,
    NumberSymbol,
    Pow,
    Rational,
    Symbol,
    UnevaluatedExpr,
    binomial,
    ceiling,
    exp,
    factorial,
    floor,
    log,
)
from sympy.utilities.lambdify import MPMATH_TRANSLATIONS

IMAGINARY_UNIT = "i"

LARGEST_EXACT_BITS = 50_000
"""Numbers up to this size are compared as exactly as rational numbers need."""
RELATIVE_BITS = 2_000
"""Beyond it, numbers are compared to this many leading bits."""
LARGEST_EXPONENT_BITS = 2_000
"""The size of the largest number that is an exponent, or that a function is applied to."""
LARGEST_FACTORIAL = 20_000

SAMPLES = 6
"""Points at which two formulas with variables must agree, of the `ATTEMPTS` that are tried."""
ATTEMPTS = 60
FEWEST_SAMPLES = 3

DECIMALS = 6
RELATIVE_TOLERANCE = 5e-4
"""A decimal must be equal to what it stands for when both are rounded to the decimals, and within this share of it."""

Point = dict[str, Fraction]
Number = mpf | mpc


class _UndefinedError(Exception):
    """No (real) number: a division by zero, the logarithm of a negative number."""


class _UnsupportedError(Exception):
    """Something that is not evaluated here: an unknown function, infinity, an integral."""


class _TooLargeError(Exception):
    """A number that would fill the memory, or that hides what is added to it."""


def same_values(first: Expr, second: Expr) -> bool | None:
    """Whether two formulas are equal; None where that cannot be found out by evaluating them.

    Variables are positive: ln(ab) is ln a + ln b. They may be negative, too, where a formula says so by an absolute
    value or the root of a square: |x| is not x. A decimal stands for any number that it approximates (`DECIMALS`).
    """
    try:
        names = sorted(_variables(first) | _variables(second))
        if names:
            return _same_functions(first, second, names)
        return _same_numbers(first, second)
    except _UnsupportedError:
        return None
    except _TooLargeError:
        return False


def _same_numbers(first: Expr, second: Expr) -> bool | None:
    decimal, second_decimal = _decimal(first), _decimal(second)
    if (decimal is None) != (second_decimal is None):
        number = second_decimal if decimal is None else decimal
        if number.denominator > 1:
            return _approximates(number, first if decimal is None else second)
    for real in (True, False):
        try:
            return _agree(first, second, {}, real)
        except _UndefinedError:
            continue
    return None


def _approximates(decimal: Fraction, exact: Expr) -> bool:
    try:
        with workprec(200 + min(_bits(exact, {}), LARGEST_EXACT_BITS)):
            value, near = _Evaluator({}, real=True)(exact), mpf(decimal.numerator) / decimal.denominator
            scale = 10**DECIMALS
            rounded_alike = mp.nint(value * scale) == mp.nint(near * scale)
            return rounded_alike and abs(value - near) <= RELATIVE_TOLERANCE * abs(value)
    except _UndefinedError:
        return False


def _same_functions(first: Expr, second: Expr, names: list[str]) -> bool | None:
    real = not (_is_complex(first) or _is_complex(second))
    signed, second_signed = _is_signed(first), _is_signed(second)
    agreed = 0
    for point in _points(names, negative=real and (signed or second_signed)):
        defined = [_is_defined(formula, point, real) for formula in (first, second)]
        if all(defined):
            if not _agree(first, second, point, real):
                return False
            agreed += 1
            if agreed == SAMPLES:
                return True
        elif any(defined) and signed != second_signed:
            # ln x leaves out what ln |x| is meant for.
            return False
    return True if agreed >= FEWEST_SAMPLES else None


def _points(names: list[str], negative: bool) -> Iterator[Point]:
    """Points to compare functions at, the positive ones first; always the same."""
    draw = random.Random(0)
    numbers: list[Callable[[], Fraction]] = [
        lambda: Fraction(draw.randint(1, 999), 101),
        lambda: Fraction(draw.randint(1, 12)),
        lambda: Fraction(draw.randint(1, 100), 101),
        lambda: Fraction(draw.randint(1, 9999), 101),
    ]
    for attempt in range(ATTEMPTS):
        number = numbers[attempt % len(numbers)]
        signs = (-1, 1) if negative and attempt % 8 >= 4 else (1,)
        yield {name: number() * draw.choice(signs) for name in names}


def _is_defined(formula: Expr, point: Point, real: bool) -> bool:
    try:
        with workprec(100):
            _Evaluator(point, real)(formula)
    except _UndefinedError:
        return False
    return True


def _agree(first: Expr, second: Expr, point: Point, real: bool) -> bool:
    """Whether two formulas have one value at a point.

    A rational number written with B bits is no closer to zero than 2^-B, so that the difference of two is decided by
    that many bits; for other numbers, that many and a hundred more are taken for proof.

    Raises:
        _UndefinedError: one of them has no value there.
    """
    bits = _bits(first, point) + _bits(second, point)
    if bits <= LARGEST_EXACT_BITS:
        with workprec(3 * bits + 300):
            difference = _Evaluator(point, real)(first) - _Evaluator(point, real)(second)
            return abs(difference) <= mp.ldexp(1, -bits - 100)
    with workprec(2 * RELATIVE_BITS):
        evaluate = _Evaluator(point, real, hides_nothing=True)
        value, second_value = evaluate(first), evaluate(second)
        return abs(value - second_value) <= mp.ldexp(max(abs(value), abs(second_value)), -RELATIVE_BITS)


def _bits(formula: Expr, point: Point) -> int:
    """About how many bits an exact value takes, numerator and denominator together."""
    if isinstance(formula, Rational | Float | Symbol):
        return 1 + math.ceil(_log2(formula, point))
    bits = 1 + sum(_bits(argument, point) for argument in formula.args)
    if isinstance(formula, Pow):
        base = _log2(formula.base, point) if formula.base.is_Atom else _bits(formula.base, point)
        return bits + math.ceil(base * _size(formula.exp, point))
    if isinstance(formula, exp):
        return bits + 2 * _size(formula.args[0], point)
    if isinstance(formula, factorial | binomial):
        count = _size(formula.args[0], point)
        return bits + count * count.bit_length()
    return bits


def _log2(atom: Expr, point: Point) -> float:
    """The bits of a number or variable; 2 for a constant like pi."""
    if isinstance(atom, Rational | Float):
        number = _exact(atom)
    elif isinstance(atom, Symbol):
        number = point.get(atom.name, Fraction(1))
    else:
        return 2.0
    return math.log2(max(1, abs(number.numerator))) + math.log2(number.denominator)


def _size(formula: Expr, point: Point) -> int:
    """The absolute value, rounded up; a very large one is cut off."""
    try:
        with workprec(53):
            return int(min(mp.ceil(abs(_Evaluator(point, real=False)(formula))), 10 * LARGEST_EXACT_BITS))
    except _UndefinedError:
        return 0


class _Evaluator:
    """The value of a formula at a point, to the working precision of mpmath.

    With `real`, roots of odd degree are real, and whatever leaves the real numbers on the way is undefined. With
    `hides_nothing`, a sum in which a term is too small to be seen is too large.
    """

    def __init__(self, point: Point, real: bool, hides_nothing: bool = False) -> None:
        self._point = point
        self._real = real
        self._hides_nothing = hides_nothing

    def __call__(self, formula: Expr) -> Number:
        try:
            value = self._value(formula)
        except (ZeroDivisionError, ValueError) as error:
            raise _UndefinedError from error
        if not isfinite(value):
            raise _UndefinedError
        if isinstance(value, mpc) and self._real:
            if value.imag:
                raise _UndefinedError
            return value.real
        return value

    def _value(self, formula: Expr) -> Number:
        if isinstance(formula, Rational | Float):
            number = _exact(formula)
            return mpf(number.numerator) / number.denominator
        if isinstance(formula, Symbol):
            if formula.name == IMAGINARY_UNIT:
                return mp.j
            number = self._point[formula.name]
            return mpf(number.numerator) / number.denominator
        if formula is I:
            return mp.j
        if isinstance(formula, NumberSymbol):
            return mpf(formula._as_mpf_val(mp.prec))
        evaluate = _RULES.get(formula.func)
        if evaluate is None and not isinstance(formula, Function):
            raise _UnsupportedError
        arguments = [self(argument) for argument in formula.args]
        if formula.func is Add:
            return self._sum(arguments)
        if formula.func is Pow:
            return self._power(*arguments)
        if evaluate is None and any(argument and mp.mag(argument) > LARGEST_EXPONENT_BITS for argument in arguments):
            raise _TooLargeError
        return (evaluate or _mpmath_function(formula))(*arguments)

    def _sum(self, terms: list[Number]) -> Number:
        total = mp.fsum(terms)
        if self._hides_nothing and any(term and abs(term) < mp.ldexp(abs(total), -RELATIVE_BITS) for term in terms):
            raise _TooLargeError
        return total

    def _power(self, base: Number, exponent: Number) -> Number:
        if exponent and mp.mag(exponent) > LARGEST_EXPONENT_BITS:
            raise _TooLargeError
        if self._real and base < 0 and not mp.isint(exponent):
            return _odd_root_power(base, exponent)
        return mp.power(base, exponent)


def _odd_root_power(base: mpf, exponent: mpf) -> mpf:
    """A negative number to a fraction p/q with a small odd q: the real one."""
    for degree in range(3, 22, 2):
        top = mp.nint(exponent * degree)
        if abs(exponent * degree - top) < mp.ldexp(1, 10 - mp.prec):
            return (-1) ** (int(top) % 2) * mp.power(-base, exponent)
    raise _UndefinedError


def _integer(value: Number) -> int:
    nearest = mp.nint(value.real)
    if abs(value - nearest) > mp.ldexp(1, -mp.prec // 2):
        raise _UndefinedError
    return int(nearest)


def _factorial(count: Number) -> mpf:
    """Of whole numbers only: between them, formulas for whole numbers need not agree."""
    count = _integer(count)
    if count < 0:
        raise _UndefinedError
    if count > 10 * LARGEST_FACTORIAL:
        raise _TooLargeError
    return mp.factorial(count)


def _binomial(total: Number, chosen: Number) -> mpf:
    total, chosen = _integer(total), _integer(chosen)
    if min(total, chosen) < 0:
        raise _UndefinedError
    if total > LARGEST_FACTORIAL:
        raise _TooLargeError
    return mp.binomial(total, chosen)


def _floor(value: Number) -> mpf:
    nearest = mp.nint(value)
    return nearest if abs(value - nearest) < mp.ldexp(1, -mp.prec // 2) else mp.floor(value)


_RULES: dict[type, Callable[..., Number] | None] = {
    Add: mp.fsum,
    Mul: lambda *factors: mp.fprod(factors),
    Pow: mp.power,
    UnevaluatedExpr: lambda value: value,
    log: lambda value, *base: mp.log(value) / mp.log(*base) if base else mp.log(value),
    factorial: _factorial,
    binomial: _binomial,
    floor: _floor,
    ceiling: lambda value: -_floor(-value),
    Mod: lambda value, divisor: value - divisor * _floor(value / divisor),
    Max: max,
    Min: min,
}


def _mpmath_function(formula: Function) -> Callable[..., Number]:
    name = type(formula).__name__
    function = getattr(mp, MPMATH_TRANSLATIONS.get(name, name), None)
    if function is None or type(formula).__module__.split(".")[0] != "sympy":
        raise _UnsupportedError
    return function


def _exact(number: Rational | Float) -> Fraction:
    """The number as it was written: 0.1 is a tenth."""
    exact = Rational(str(number)) if isinstance(number, Float) else number
    return Fraction(int(exact.p), int(exact.q))


def _decimal(formula: Expr) -> Fraction | None:
    """A decimal, perhaps times a power of ten; None for anything else."""
    if isinstance(formula, Float):
        return _exact(formula)
    if not isinstance(formula, Mul):
        return None
    number, decimals = Fraction(1), 0
    for factor in formula.args:
        if isinstance(factor, Float):
            number, decimals = number * _exact(factor), decimals + 1
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
    return any(part.free_symbols and _ignores_sign(part) for part in formula.atoms(Abs, Max, Min, Pow))


def _ignores_sign(formula: Expr) -> bool:
    if not isinstance(formula, Pow):
        return True
    base, root = formula.base, 1 / formula.exp
    is_even_root = root.is_Integer and root % 2 == 0
    return bool(is_even_root and isinstance(base, Pow) and base.exp.is_Integer and base.exp % 2 == 0)
